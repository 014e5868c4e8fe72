"""The portable backend's kernels compiled for AMD GPUs and executed on the CPU, instruction by instruction."""
