"""JAX: `flashtile.integrations.jax.attention`, differentiable, under jit, grad, vmap and shard_map.

XLA calls flashtile's kernels on its own buffers and, on a GPU, on its own stream (`ffi`); `transforms` says what JAX's
transformations make of a call, `attention` what the arguments mean.
"""

from flashtile.integrations.jax.attention import attention

__all__ = ["attention"]
