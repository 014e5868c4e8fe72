"""Rounding to 8-bit floats: a block of rows of a head a program, which is read once where it has a scale of its own."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.forgetting import make_room
from flashtile.kernels.arguments import numbers_of, rows_of
from flashtile.kernels.places import number_of
from flashtile.kernels.tape import Tape, perform, prepared
from flashtile.kernels.words import odd
from flashtile.scaled import GROUP, KEYS, QUERIES, SMALLEST, blocks, largest, rotation

LEAST = tl.constexpr(SMALLEST)


@triton.jit
def rotate(b_rows, signs, matrix, factor, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Rows times an orthogonal matrix, see `flashtile.scaled.Rotation`."""
    ROWS: tl.constexpr = b_rows.shape[0]
    BLOCK: tl.constexpr = b_rows.shape[1]
    o_columns = tl.arange(0, BLOCK)
    b_signed = b_rows * tl.load(signs + o_columns, mask=o_columns < DIM, other=0.0)[None, :]
    o_width = tl.arange(0, WIDTH)
    b_matrix = tl.load(matrix + o_width[:, None] * WIDTH + o_width[None, :])
    b_runs = b_signed.reshape(ROWS * BLOCK // WIDTH, WIDTH)
    return tl.dot(b_runs, b_matrix, input_precision="ieee").reshape(ROWS, BLOCK) * factor


@triton.jit
def store_turned(out, stride_column, b_rows, first, length, DIM: tl.constexpr, GROUP: tl.constexpr):
    """Rows as columns, in each group of 16 key 8 j + 2 t + e at place 4 t + 2 j + e (see `flashtile.scaled`)."""
    ROWS: tl.constexpr = b_rows.shape[0]
    BLOCK: tl.constexpr = b_rows.shape[1]
    b_groups = b_rows.reshape(ROWS // GROUP, 2, 4, 2, BLOCK)
    b_columns = tl.permute(b_groups, (4, 0, 2, 1, 3)).reshape(BLOCK, ROWS)
    o_columns, o_rows = tl.arange(0, BLOCK), first + tl.arange(0, ROWS)
    m_tile = (o_columns < DIM)[:, None] & (o_rows < length)[None, :]
    tl.store(out + o_columns[:, None] * stride_column + o_rows[None, :], b_columns, mask=m_tile)


@triton.jit
def quantize_kernel(
    x, signs, matrix, factor, out, out_batch, out_row, out_head, scale, peak, seqlen, heads, tiles,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, LARGEST: tl.constexpr,
    MODE: tl.constexpr, TURNED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """MODE: "own", a block finds its scale; "peak", it adds to what its head or tensor finds; "given", that is known.

    `out_row`: with TURNED the stride of a column. WIDTH: of the rotation, 0: there is none.
    """
    i_block = tl.program_id(0) % number_of(tiles)
    i_pair = tl.program_id(0) // number_of(tiles)
    i_batch, i_head = (i_pair // number_of(heads)).to(tl.int64), (i_pair % number_of(heads)).to(tl.int64)
    o_rows, o_columns = i_block * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    length = number_of(seqlen)
    p_rows = x.pointer + i_batch * x.batch + i_head * x.head + o_rows.to(tl.int64)[:, None] * x.row
    m_tile = (o_rows < length)[:, None] & (o_columns < DIM)[None, :]
    b_rows = tl.load(p_rows + o_columns[None, :], mask=m_tile, other=0.0)
    if WIDTH:
        b_rows = rotate(b_rows, signs, matrix, factor, DIM, WIDTH)
    b_rows = b_rows.to(tl.float32)
    m_finite = tl.abs(b_rows) < float("inf")
    p_scale = scale.pointer + i_batch * number_of(scale.batch) + i_head * number_of(scale.head)
    p_peak = peak.pointer + i_batch * number_of(peak.batch) + i_head * number_of(peak.head)
    if MODE == "given":
        largest = tl.load(p_peak)
    else:
        largest = tl.max(tl.max(tl.where(m_finite, tl.abs(b_rows), 0.0), 1), 0)
    if MODE == "peak":
        tl.atomic_max(p_peak, largest)
    else:
        size = tl.where(largest == 0.0, 1.0, tl.maximum(largest * (1.0 / LARGEST), LEAST))
        if MODE == "own":
            tl.store(p_scale + i_block, size)
        elif i_block == 0:
            tl.store(p_scale, size)
        b_rows = tl.minimum(tl.maximum(b_rows * (1.0 / size), -LARGEST), LARGEST)
        b_low = tl.where(m_finite, b_rows, float("nan")).to(out.dtype.element_ty)
        p_out = out + i_batch * out_batch + i_head * out_head
        if TURNED:
            store_turned(p_out, out_row, b_low, i_block * ROWS, (length + GROUP - 1) // GROUP * GROUP, DIM, GROUP)
        else:
            tl.store(p_out + o_rows.to(tl.int64)[:, None] * out_row + o_columns[None, :], b_low, mask=m_tile)


KERNELS = (quantize_kernel,)


def quantize(
    q: Tensor, k: Tensor, v: Tensor, granularity: str, incoherent: bool, dtype: torch.dtype, seed: int
) -> tuple[tuple[Tensor, Tensor], ...]:
    """(data, scale) of each, the values of a batch turned."""
    turn = seed if incoherent else None
    return (
        _rounded(q, granularity, dtype, QUERIES, turn),
        _rounded(k, granularity, dtype, KEYS, turn),
        _rounded(v, granularity, dtype, KEYS, None, turned=v.ndim == 4),
    )


def on_device(kernel: Any, programs: int, given: dict[str, Any], warps: int) -> Any:
    """Launches on the device of the tensors; returns the compiled kernel."""
    with prepared(given["out"].device):
        return kernel[(programs,)](**given, num_warps=warps)


_memories: dict[Any, dict[Any, Any]] = {}
_KEPT = 1024
"""Kinds of tensors whose launches are remembered (see `kernels.tape`)."""


def _memory(*key: Any) -> dict[Any, Any]:
    """What earlier calls of a kind left; the oldest make room."""
    found = _memories.get(key)
    if found is None:
        make_room(_memories, _KEPT)
        found = _memories[key] = {}
    return found


def _rounded(
    tensor: Tensor,
    granularity: str,
    dtype: torch.dtype,
    rows: int,
    seed: int | None,
    turned: bool = False,
    launch: Any = on_device,
) -> tuple[Tensor, Tensor]:
    """(data, scale); `launch`: where to, for an emulator, which leaves nothing behind."""
    *batch, seqlen, heads, headdim = tensor.shape
    count = blocks(seqlen, rows)
    make: dict[str, Any] = {"dtype": torch.float32, "device": tensor.device}
    sizes = (*batch, heads, count if granularity == "block" else 1)
    scale = torch.empty((), **make).expand(sizes) if granularity == "tensor" else torch.empty(sizes, **make)
    peak = torch.zeros((), **make).expand(sizes) if granularity == "tensor" else torch.zeros(sizes, **make)
    shape = (*batch, heads, headdim, seqlen + -seqlen % GROUP) if turned else tensor.shape
    out = torch.empty(shape, dtype=dtype, device=tensor.device)
    block = max(GROUP, 1 << (headdim - 1).bit_length())
    turn = None if seed is None else rotation(headdim, seed, tensor.device, tensor.dtype)
    loaded = rows_of(tensor)
    head, row = (out.stride(-3), out.stride(-2)) if turned else (out.stride(-2), out.stride(-3))
    given = {
        "x": loaded,
        "signs": turn and turn.signs,
        "matrix": turn and turn.matrix,
        "factor": turn.factor if turn else 0.0,
        "out": out,
        "out_batch": out.stride(0) if batch else 0,
        "out_row": row,
        "out_head": head,
        "scale": numbers_of(scale),
        "peak": numbers_of(peak),
        **{"seqlen": odd(seqlen), "heads": odd(heads), "tiles": odd(count)},
        **{"ROWS": rows, "DIM": headdim, "BLOCK": block, "WIDTH": len(turn.matrix) if turn else 0},
        **{"LARGEST": largest(dtype), "TURNED": turned, "GROUP": GROUP},
    }
    programs = count * heads * (batch[0] if batch else 1)
    warps = 4 if rows * block <= 8192 else 8

    def launches(tape: Tape | None) -> None:
        for mode in ("own",) if granularity == "block" else ("peak", "given"):
            named = {**given, "MODE": mode}
            compiled = launch(quantize_kernel, programs, named, warps)
            if tape is not None:
                arguments = [named[parameter.name] for parameter in quantize_kernel.params]
                tape.record(compiled, programs, arguments)

    if programs and seqlen:
        beside = (None, None) if turn is None else (turn.signs, turn.matrix)
        kind = (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() & 15)
        memory = _memory(*kind, granularity, dtype, rows, seed, turned) if launch is on_device else None
        perform(launches, (loaded.pointer, out, scale, peak, *beside), memory)
    return out, scale
