"""The portable backend's kernels compiled for GPUs that are not there, and what came out: `flashtile compile`."""
