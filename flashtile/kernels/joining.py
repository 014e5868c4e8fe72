"""Parts of a sequence's keys become one: in a kernel behind that of the parts, or in the last of its programs."""

import triton
import triton.language as tl

from flashtile import queues
from flashtile.kernels.caches import wait_for_kernel
from flashtile.kernels.places import number_of, program_of
from flashtile.kernels.rules import LOG2E

LINE = tl.constexpr(queues.LINE)


@triton.jit
def some_parts(pointers, stride, mask, first, splits, other, AT_ONCE: tl.constexpr):
    """What AT_ONCE parts hold, a tuple of them; behind the last of `splits`: `other`. All are under way at once."""
    # A block, for the interpreter does not take a single condition for one of a block.
    b_splits = tl.full([1, 1], splits, tl.int32)
    b_parts = tl.tuple(())
    for STEP in tl.static_range(AT_ONCE):
        i_part = first + STEP
        b_parts += (tl.load(pointers + i_part * stride, mask=mask & (i_part < b_splits), other=other),)
    return b_parts


@triton.jit
def highest_of(b_highest, b_lses, AT_ONCE: tl.constexpr):
    for STEP in tl.static_range(AT_ONCE):
        b_highest = tl.maximum(b_highest, b_lses[STEP])
    return b_highest


@triton.jit
def add_parts(b_out, b_total, b_highest, b_lses, b_parts, AT_ONCE: tl.constexpr):
    """(sum, sum of weights) after some parts more, each weighted by exp(lse - highest), one after the other."""
    b_base = tl.where(b_highest == -float("inf"), 0.0, b_highest)
    for STEP in tl.static_range(AT_ONCE):
        b_weight = tl.exp2((b_lses[STEP] - b_base) * LOG2E)
        b_total += b_weight
        # What no part has written was read too, and may be anything.
        b_out += b_weight * tl.where(b_lses[STEP] == -float("inf"), 0.0, b_parts[STEP])
    return b_out, b_total


@triton.jit
def join_rows(
    parts_out, parts_lse, out, lse, parts, i_batch, o_query, o_head, m_rows,
    DIM: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Rows of a sequence from their parts (see `flashtile.state`); a part that saw no key was not written. o_query,
    o_head: of each row, (rows, 1), as is m_rows: whether it is there. ALL: no more parts than AT_ONCE. Without a loop
    compilers do not put the offsets of all parts into registers before it.

    Each number is added up by one thread in the order of its parts, so a row has the same bits however many come at a
    time, and parts without a key, behind the others, change none.
    """
    splits, batches, i_batch = number_of(parts.splits), number_of(parts.batches).to(tl.int64), i_batch.to(tl.int64)
    o_heads = o_head.to(tl.int64)
    o_columns = tl.arange(0, BLOCK)[None, :]
    m_out = m_rows & (o_columns < DIM)
    stride_lse, stride_out = number_of(parts_lse.batch), parts_out.batch
    p_lses = parts_lse.pointer + i_batch * stride_lse + o_heads * number_of(parts_lse.head) + o_query
    p_outs = parts_out.pointer + i_batch * stride_out + o_heads * parts_out.head
    p_outs += o_query.to(tl.int64) * parts_out.row + o_columns
    stride_lse, stride_out = batches * stride_lse, batches * stride_out
    unseen = -float("inf")
    b_highest = tl.where(m_rows, unseen, unseen)
    b_total = tl.zeros_like(b_highest)
    b_out = tl.where(m_out, 0.0, 0.0)
    if ALL:
        b_lses = some_parts(p_lses, stride_lse, m_rows, 0, splits, unseen, AT_ONCE)
        b_parts = some_parts(p_outs, stride_out, m_out, 0, splits, 0.0, AT_ONCE)
        b_highest = highest_of(b_highest, b_lses, AT_ONCE)
        b_out, b_total = add_parts(b_out, b_total, b_highest, b_lses, b_parts, AT_ONCE)
    else:
        for first in range(0, splits, AT_ONCE):
            b_some = some_parts(p_lses, stride_lse, m_rows, first, splits, unseen, AT_ONCE)
            b_highest = highest_of(b_highest, b_some, AT_ONCE)
        for first in range(0, splits, AT_ONCE):
            b_lses = some_parts(p_lses, stride_lse, m_rows, first, splits, unseen, AT_ONCE)
            b_parts = some_parts(p_outs, stride_out, m_out, first, splits, 0.0, AT_ONCE)
            b_out, b_total = add_parts(b_out, b_total, b_highest, b_lses, b_parts, AT_ONCE)
    m_empty = b_total == 0.0
    b_out = b_out / tl.where(m_empty, 1.0, b_total)
    p_out = out.pointer + i_batch * out.batch + o_heads * out.head + o_query.to(tl.int64) * out.row
    tl.store(p_out + o_columns, b_out.to(out.pointer.dtype.element_ty), mask=m_out)
    p_lse = lse.pointer + i_batch * number_of(lse.batch) + o_heads * number_of(lse.head) + o_query
    tl.store(p_lse, tl.where(m_empty, unseen, b_highest + tl.log(b_total)), mask=m_rows)


@triton.jit
def combine_kernel(
    parts_out, parts_lse, out, lse, size, parts,
    DIM: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, ALL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    wait_for_kernel(EARLY)
    i_batch, i_head, i_query = program_of(size)
    o_row = tl.arange(0, 1)[:, None]
    join_rows(
        parts_out, parts_lse, out, lse, parts, i_batch, i_query + o_row, i_head + o_row, o_row == 0,
        DIM, BLOCK, AT_ONCE, ALL,
    )  # fmt: skip


@triton.jit
def comes_last(counters, i_joined, parts):
    """Whether all other programs of what is joined have written their parts, which this one may then read.

    Each counts itself. The barrier puts the stores of all its warps before that, the release makes them visible before
    the number, and whoever acquires the last number sees those of all. It leaves 0 for the next launch.
    """
    p_counter = counters + i_joined * LINE
    tl.debug_barrier()
    last = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu") == number_of(parts.splits) - 1
    if last:
        tl.store(p_counter, 0)
    return last
