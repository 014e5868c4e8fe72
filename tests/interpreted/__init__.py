"""The portable backend's kernels in Triton's interpreter, on the CPU: needs TRITON_INTERPRET=1 (see the Makefile)."""
