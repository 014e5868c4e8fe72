"""From a traced FlexAttention-style function to a `@triton.jit` function that kernels call: a hook.

The graph of scalars (`scalar_graph`) becomes the text of a function over tiles (`source`), step by step (`graphs`):
each is an operation on values (`operations`) by the tables of `rules`. It is kept by its content, so equal functions
are one function and one compiled kernel. Captured tensors are arguments: their sizes and strides are not part of the
text.
"""

from flashtile.lower.hooks import (
    Hook,
    derivative_hook,
    mask_hook,
    only_adds,
    score_hook,
    unsupported,
    unsupported_mask,
)
from flashtile.lower.values import LONGEST

__all__ = [
    "LONGEST",
    "Hook",
    "derivative_hook",
    "mask_hook",
    "only_adds",
    "score_hook",
    "unsupported",
    "unsupported_mask",
]
