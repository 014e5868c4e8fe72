"""Kernels in plain Triton: what its compiler makes of them on Ampere and on Hopper."""

import triton
import triton.language as tl


@triton.jit
def scale_and_add(x, y, out, length, BLOCK: tl.constexpr):
    """2 x + exp(y), with a ragged end."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    b_x = tl.load(x + at, mask=inside)
    b_y = tl.load(y + at, mask=inside)
    tl.store(out + at, b_x * 2 + tl.exp(b_y), mask=inside)


@triton.jit
def softmax(x, out, length, BLOCK: tl.constexpr):
    """A row for each program."""
    at = tl.arange(0, BLOCK)
    start = tl.program_id(0) * length
    values = tl.load(x + start + at, mask=at < length, other=-float("inf")).to(tl.float32)
    powers = tl.exp(values - tl.max(values, 0))
    tl.store(out + start + at, powers / tl.sum(powers, 0), mask=at < length)


@triton.jit
def count_and_last(x, counts, last, length, BLOCK: tl.constexpr):
    """How often each number occurs, and where last."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    values = tl.load(x + at, mask=inside, other=0)
    tl.atomic_add(counts + values, 1, mask=inside)
    tl.atomic_max(last + values, at, mask=inside)


@triton.jit
def running_sum(x, out, largest, BLOCK: tl.constexpr):
    """Sums of all that came before, and where the largest number is."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at)
    tl.store(out + at, tl.cumsum(values, 0))
    tl.store(largest + tl.program_id(0), tl.argmax(values, 0))


@triton.jit
def collatz(x, out, START: tl.constexpr):
    """Steps to 1, for a number of each program: a loop that no two programs leave together."""
    value = tl.load(x + tl.program_id(0))
    steps = START
    while value != 1:
        if value % 2 == 0:
            value = value // 2
        else:
            value = 3 * value + 1
        steps += 1
    tl.store(out + tl.program_id(0), steps)


@triton.jit
def casts(x, as_bf16, as_fp16, as_int, mixed, BLOCK: tl.constexpr):
    """Conversions, and integer arithmetic with signs."""
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    whole = values.to(tl.int32)
    tl.store(as_bf16 + at, values.to(tl.bfloat16))
    tl.store(as_fp16 + at, values.to(tl.float16))
    tl.store(as_int + at, whole)
    tl.store(mixed + at, ((whole // 7) ^ (whole % 5)) + (whole >> 2) * 3 + tl.where(whole > 3, whole & 12, whole | 3))


@triton.jit
def product(a, b, out, ROWS, COLUMNS, DEPTH, TILE: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr):
    """A B, with ragged ends on all sides."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    m_row = (row < ROWS)[:, None]
    m_column = (column < COLUMNS)[None, :]
    acc = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, DEPTH, STEP):
        k = start + tl.arange(0, STEP)
        b_a = tl.load(a + row[:, None] * DEPTH + k[None, :], mask=m_row & (k < DEPTH)[None, :], other=0.0)
        b_b = tl.load(b + k[:, None] * COLUMNS + column[None, :], mask=(k < DEPTH)[:, None] & m_column, other=0.0)
        acc = tl.dot(b_a, b_b, acc, input_precision=PRECISION)
    tl.store(out + row[:, None] * COLUMNS + column[None, :], acc, mask=m_row & m_column)
