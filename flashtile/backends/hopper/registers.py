"""Registers that are not there: what LLVM would keep in them from before a loop to its end is computed anew instead."""

import triton
from triton.experimental import gluon

from flashtile.backends.hopper.compat import gl
from flashtile.kernels.words import Numbers, Rows


@triton.constexpr_function
def _copies(bits):
    """(the instruction that copies a number of so many bits, which registers it takes)."""
    return f"mov.b{bits} $0, $1;", {32: "=r,r", 64: "=l,l"}[bits]


@gluon.jit
def here(number):
    """A number that LLVM cannot know to be the same every time, so that what follows from it is computed where that
    stands. What several roles make of an argument LLVM would make in front of all of them, and what a role makes of it
    for a tile, in front of all tiles, in a register that is not there, and ptxas would spill it."""
    number = gl.to_tensor(number)
    COPIES: gl.constexpr = _copies(number.dtype.primitive_bitwidth)
    return gl.inline_asm_elementwise(COPIES[0], COPIES[1], [number], dtype=number.dtype, is_pure=False, pack=1)


@gluon.jit
def numbers_here(numbers):
    """The strides of `Numbers`."""
    return Numbers(numbers.pointer, here(numbers.batch), here(numbers.head))


@gluon.jit
def rows_here(rows):
    """The strides of `Rows`."""
    return Rows(rows.pointer, here(rows.batch), here(rows.row), here(rows.head))
