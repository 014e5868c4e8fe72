"""Parts of a sequence's keys become one, in a kernel behind that of the parts."""

import triton
import triton.language as tl

from flashtile.kernels.caches import wait_for_kernel
from flashtile.kernels.places import number_of, program_of
from flashtile.kernels.rules import LOG2E


@triton.jit
def some_parts(pointers, stride, mask, first, splits, other, AT_ONCE: tl.constexpr):
    """What AT_ONCE parts hold, a tuple of them; behind the last of `splits`: `other`. All are under way at once."""
    # A block, for the interpreter does not take a single condition for one of a block.
    b_splits = tl.full([1], splits, tl.int32)
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
def combine_kernel(
    parts_out, parts_lse, out, lse, size, parts,
    DIM: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, ALL: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row a program, from its parts (see `flashtile.state`); a part that saw no key was not written. ALL: no more
    parts than AT_ONCE. Without a loop compilers do not put the offsets of all parts into registers before it.

    Each number is added up by one thread in the order of its parts, so a row has the same bits however many come at a
    time, and parts without a key, behind the others, change none.
    """
    i_batch, i_head, i_query = program_of(size)
    splits, batches, i_batch = number_of(parts.splits), number_of(parts.batches).to(tl.int64), i_batch.to(tl.int64)
    o_query, o_columns = i_query + tl.arange(0, 1), tl.arange(0, BLOCK)
    m_row, m_out = tl.full([1], True, tl.int1), o_columns < DIM
    stride_lse, stride_out = number_of(parts_lse.batch), parts_out.batch
    p_lses = parts_lse.pointer + i_batch * stride_lse + i_head.to(tl.int64) * number_of(parts_lse.head) + o_query
    p_outs = parts_out.pointer + i_batch * stride_out + i_head.to(tl.int64) * parts_out.head
    p_outs += o_query.to(tl.int64) * parts_out.row + o_columns
    stride_lse, stride_out = batches * stride_lse, batches * stride_out
    unseen = -float("inf")
    b_highest = tl.full([1], unseen, tl.float32)
    b_total = tl.zeros([1], tl.float32)
    b_out = tl.zeros([BLOCK], tl.float32)
    wait_for_kernel(EARLY)
    if ALL:
        b_lses = some_parts(p_lses, stride_lse, m_row, 0, splits, unseen, AT_ONCE)
        b_parts = some_parts(p_outs, stride_out, m_out, 0, splits, 0.0, AT_ONCE)
        b_highest = highest_of(b_highest, b_lses, AT_ONCE)
        b_out, b_total = add_parts(b_out, b_total, b_highest, b_lses, b_parts, AT_ONCE)
    else:
        for first in range(0, splits, AT_ONCE):
            b_some = some_parts(p_lses, stride_lse, m_row, first, splits, unseen, AT_ONCE)
            b_highest = highest_of(b_highest, b_some, AT_ONCE)
        for first in range(0, splits, AT_ONCE):
            b_lses = some_parts(p_lses, stride_lse, m_row, first, splits, unseen, AT_ONCE)
            b_parts = some_parts(p_outs, stride_out, m_out, first, splits, 0.0, AT_ONCE)
            b_out, b_total = add_parts(b_out, b_total, b_highest, b_lses, b_parts, AT_ONCE)
    m_empty = b_total == 0.0
    b_out = b_out / tl.where(m_empty, 1.0, b_total)
    p_out = out.pointer + i_batch * out.batch + i_head.to(tl.int64) * out.head + o_query.to(tl.int64) * out.row
    tl.store(p_out + o_columns, b_out.to(out.pointer.dtype.element_ty), mask=m_out)
    p_lse = lse.pointer + i_batch * number_of(lse.batch) + i_head.to(tl.int64) * number_of(lse.head) + o_query
    tl.store(p_lse, tl.where(m_empty, unseen, b_highest + tl.log(b_total)))
