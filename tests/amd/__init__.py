"""Kernels as compiled for AMD's GPUs, executed on the CPU, instruction by instruction: where TINYGRAD names a clone."""
