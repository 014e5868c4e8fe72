"""Kernels as compiled for NVIDIA's GPUs, executed on the CPU, instruction by instruction."""
