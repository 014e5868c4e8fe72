"""Rounding to 8-bit floats: a block of rows of a head a program, which is read once where it has a scale of its own.

Queries, keys and values are rounded by one launch, or by two where a scale is found before.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.forgetting import make_room
from flashtile.kernels.arguments import numbers_of, rows_of
from flashtile.kernels.places import number_of
from flashtile.kernels.storage import kept
from flashtile.kernels.tape import Tape, perform, prepared
from flashtile.kernels.turning import store_turned
from flashtile.kernels.words import Numbers, Rows, odd
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
def round_block(
    share, i_program, signs, matrix, factor,
    ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, LARGEST: tl.constexpr,
    MODE: tl.constexpr, TURNED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A block of a `Share`. MODE: "own", it finds its scale; "peak", it adds to what its head or tensor finds; "given",
    that is known. WIDTH: of the rotation, 0: there is none."""
    i_block = i_program % number_of(share.tiles)
    i_pair = i_program // number_of(share.tiles)
    heads = number_of(share.heads)
    i_batch, i_head = (i_pair // heads).to(tl.int64), (i_pair % heads).to(tl.int64)
    o_rows, o_columns = i_block * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    length = number_of(share.seqlen)
    x, scale, peak = share.rows, share.scale, share.peak
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
        # Of all at once: on AMD, where a rotation is narrower than a row, Triton 3.6's reduction along rows misses some
        # of the lanes that they lie in.
        largest = tl.max(tl.where(m_finite, tl.abs(b_rows), 0.0))
    if MODE == "peak":
        tl.atomic_max(p_peak, largest)
    else:
        size = tl.where(largest == 0.0, 1.0, tl.maximum(largest * (1.0 / LARGEST), LEAST))
        if MODE == "own":
            tl.store(p_scale + i_block, size)
        elif i_block == 0:
            tl.store(p_scale, size)
        b_rows = tl.minimum(tl.maximum(b_rows * (1.0 / size), -LARGEST), LARGEST)
        b_low = tl.where(m_finite, b_rows, float("nan")).to(share.out.dtype.element_ty)
        p_out = share.out + i_batch * share.out_batch + i_head * share.out_head
        if TURNED:
            padded = (length + GROUP - 1) // GROUP * GROUP
            store_turned(p_out, share.out_row, b_low, i_block * ROWS, padded, DIM, GROUP)
        else:
            tl.store(p_out + o_rows.to(tl.int64)[:, None] * share.out_row + o_columns[None, :], b_low, mask=m_tile)


@triton.jit
def quantize_kernel(
    q, k, v, signs, matrix, factor,
    Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr, WIDTH: tl.constexpr, LARGEST: tl.constexpr, MODE: tl.constexpr, TURNED: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """A program a block of queries, then of keys, then of values. TURNED: values are to lie on their side."""
    i_program = tl.program_id(0)
    keys = number_of(q.programs)
    values = keys + number_of(k.programs)
    if i_program < keys:
        round_block(q, i_program, signs, matrix, factor, Q_ROWS, DIM, BLOCK, WIDTH, LARGEST, MODE, False, GROUP)
    elif i_program < values:
        i_program -= keys
        round_block(k, i_program, signs, matrix, factor, K_ROWS, DIM, BLOCK, WIDTH, LARGEST, MODE, False, GROUP)
    else:
        i_program -= values
        round_block(v, i_program, None, None, 0.0, K_ROWS, DIM_V, BLOCK_V, 0, LARGEST, MODE, TURNED, GROUP)


KERNELS = (quantize_kernel,)


class Share(NamedTuple):
    """A tensor to be rounded, and where to: its rows; 8-bit numbers, and their strides (values on their side: `out_row`
    of a column); scales; what they come from, a number for each, or the scales once more, where each block finds its
    own; sizes, `odd`."""

    rows: Rows
    out: Tensor
    out_batch: int
    out_row: int
    out_head: int
    scale: Numbers
    peak: Numbers
    seqlen: int
    heads: int
    tiles: int
    programs: int


def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    granularity: str,
    incoherent: bool,
    dtype: torch.dtype,
    seed: int,
    launch: Any = None,
) -> tuple[tuple[Tensor, Tensor], ...]:
    """(data, scale) of each, the values of a batch turned; `launch`: where to, for an emulator, which leaves nothing
    behind."""
    turned = v.ndim == 4
    given = ((q, QUERIES, False), (k, KEYS, False), (v, KEYS, turned))
    made = [_room(tensor, granularity, rows, dtype, turned) for tensor, rows, turned in given]
    kinds = [(tensor.shape, tensor.stride(), tensor.data_ptr() & 15) for tensor in (q, k, v)]
    memory = _memory(*kinds, q.dtype, q.device, granularity, incoherent, dtype, seed) if launch is None else None
    # Where a scale is found before, by the largest of many, it begins at 0.
    peaks = (
        [scale for _, scale in made] if granularity == "block" else [_zeros(granularity, scale) for _, scale in made]
    )
    turn = rotation(q.shape[-1], seed, q.device, q.dtype) if incoherent else None
    rows = [rows_of(tensor) for tensor in (q, k, v)]

    def launches(tape: Tape | None) -> None:
        shares = [
            _share(one, *out, peak, size, on_side)
            for one, out, peak, (_, size, on_side) in zip(rows, made, peaks, given, strict=True)
        ]
        programs = sum(count for _, count in shares)
        if programs == 0:
            return
        blocks_of = [_block(tensor.shape[-1]) for tensor in (k, v)]
        named = {
            **dict(zip("qkv", (share for share, _ in shares), strict=True)),
            "signs": turn and turn.signs,
            "matrix": turn and turn.matrix,
            "factor": turn.factor if turn else 0.0,
            **{"Q_ROWS": QUERIES, "K_ROWS": KEYS, "DIM": q.shape[-1], "DIM_V": v.shape[-1]},
            **{"BLOCK": blocks_of[0], "BLOCK_V": blocks_of[1], "WIDTH": len(turn.matrix) if turn else 0},
            **{"LARGEST": largest(dtype), "TURNED": turned, "GROUP": GROUP},
        }
        warps = 4 if KEYS * max(blocks_of) <= 8192 else 8
        for mode in ("own",) if granularity == "block" else ("peak", "given"):
            arguments = {**named, "MODE": mode}
            compiled = (launch or on_device)(quantize_kernel, programs, arguments, warps)
            if tape is not None:
                tape.record(compiled, programs, [arguments[parameter.name] for parameter in quantize_kernel.params])

    beside = (None, None) if turn is None else (turn.signs, turn.matrix)
    perform(launches, (*(one.pointer for one in rows), *_flat(made), *peaks, *beside), memory)
    return tuple(made)


def _room(tensor: Tensor, granularity: str, rows: int, dtype: torch.dtype, turned: bool) -> tuple[Tensor, Tensor]:
    """Memory for (data, scale)."""
    *batch, seqlen, heads, headdim = tensor.shape
    sizes = (*batch, heads, blocks(seqlen, rows) if granularity == "block" else 1)
    whole = granularity == "tensor"
    scale = torch.empty(() if whole else sizes, dtype=torch.float32, device=tensor.device)
    shape = (*batch, heads, headdim, seqlen + -seqlen % GROUP) if turned else tensor.shape
    data = torch.empty(shape, dtype=dtype, device=tensor.device)
    return data, scale.expand(sizes) if whole else scale


def _zeros(granularity: str, scale: Tensor) -> Tensor:
    """A number for each that there is in `scale`."""
    if granularity == "tensor":
        return torch.zeros((), dtype=scale.dtype, device=scale.device).expand(scale.shape)
    return torch.zeros_like(scale)


def _flat(made: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [tensor for pair in made for tensor in pair]


def _share(rows: Rows, data: Tensor, scale: Tensor, peak: Tensor, size: int, turned: bool) -> tuple[Share, int]:
    """(a kernel's argument, its programs)."""
    tensor = rows.pointer
    *batch, seqlen, heads, _headdim = tensor.shape
    tiles = blocks(seqlen, size)
    programs = tiles * heads * (batch[0] if batch else 1)
    head, row = (data.stride(-3), data.stride(-2)) if turned else (data.stride(-2), data.stride(-3))
    places = (data, data.stride(0) if batch else 0, row, head)
    return Share(
        rows, *places, numbers_of(scale), numbers_of(peak), *map(odd, (seqlen, heads, tiles, programs))
    ), programs


def _block(columns: int) -> int:
    """Columns of a tile."""
    return max(GROUP, 1 << (columns - 1).bit_length())


def on_device(kernel: Any, programs: int, given: dict[str, Any], warps: int) -> Any:
    """Launches on the device of the tensors; returns the compiled kernel."""
    with prepared(given["q"].out.device), kept():
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
