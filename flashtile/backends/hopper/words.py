"""Weights in words of 32 bits, as they travel from one step to the next: a loop would carry smaller numbers in a
register each, and put them together in every step."""

import triton
from triton.experimental import gluon

from flashtile.backends.hopper.compat import gl
from flashtile.backends.hopper.softmax import ROWS

_CONVERTS = {"bf16": "cvt.rn.bf16x2.f32 $0, $2, $1;", "fp16": "cvt.rn.f16x2.f32 $0, $2, $1;"}


@triton.constexpr_function
def _converts(dtype):
    """Two float32 to 16-bit floats in one register."""
    return _CONVERTS[dtype.name]


@gluon.jit
def halves_in_words(b_weights, dtype: gl.constexpr):
    """(64, TILE / 2) of two neighbours each, of 16 bits."""
    b_even, b_odd = b_weights.reshape([ROWS, b_weights.shape[1] // 2, 2]).split()
    TEXT: gl.constexpr = _converts(dtype)
    return gl.inline_asm_elementwise(TEXT, "=r,f,f", [b_even, b_odd], dtype=gl.int32, is_pure=True, pack=1)


@triton.constexpr_function
def _doublings(dtype):
    """How often two numbers of this dtype make a word of 32 bits, as a power of two."""
    return {16: 1, 8: 2}[dtype.primitive_bitwidth]


@triton.constexpr_function
def _one_of(count):
    """Constraints: a register made of `count` that are the same."""
    return "=r" + ",r" * count


@gluon.jit
def from_words(b_words, dtype: gl.constexpr, layout: gl.constexpr):
    """(64, TILE) numbers of 16 or 8 bits that lie in words, in a layout where those of a register follow each other; no
    instruction is left of it."""
    EACH: gl.constexpr = 32 // dtype.primitive_bitwidth
    TILE: gl.constexpr = b_words.numel * EACH // ROWS
    b_all = b_words
    for _ in gl.static_range(_doublings(dtype)):
        b_all = gl.join(b_all, b_all)
    b_all = gl.convert_layout(b_all.reshape([ROWS, TILE]), layout, assert_trivial=True)
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", _one_of(EACH), [b_all], dtype=dtype.value, is_pure=False, pack=EACH
    )
