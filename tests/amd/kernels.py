"""Small kernels whose results are known, for tests of the emulator itself."""

import triton
import triton.language as tl


@triton.jit
def add_kernel(x, y, z, n, BLOCK: tl.constexpr):
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(z + o_x, tl.load(x + o_x, mask=o_x < n) + tl.load(y + o_x, mask=o_x < n), mask=o_x < n)


@triton.jit
def dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    b_a = tl.load(a + o_m[:, None] * K + o_k[None, :])
    b_b = tl.load(b + o_k[:, None] * N + o_n[None, :])
    tl.store(c + o_m[:, None] * N + o_n[None, :], tl.dot(b_a, b_b, input_precision="ieee"))


@triton.jit
def reduce_kernel(x, sums, maxima, places, running, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    o_rows, o_columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    b_x = tl.load(x + o_rows[:, None] * COLUMNS + o_columns[None, :])
    tl.store(sums + o_rows, tl.sum(b_x, 1))
    tl.store(maxima + o_rows, tl.max(b_x, 1))
    tl.store(places + o_rows, tl.argmax(b_x, 1))
    tl.store(running + o_rows[:, None] * COLUMNS + o_columns[None, :], tl.cumsum(b_x, 1))


@triton.jit
def atomic_kernel(x, total, BLOCK: tl.constexpr):
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total + o_x % 16, tl.load(x + o_x), sem="relaxed")


@triton.jit
def unmasked_kernel(x, z, BLOCK: tl.constexpr):
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(z + o_x, tl.load(x + o_x))
