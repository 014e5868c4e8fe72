"""What `attention_kvcache` takes."""

from typing import Any

import torch
from torch import Tensor

from flashtile.check.tensors import (
    DTYPES,
    beside,
    floating,
    heads_and_sizes,
    integers,
    is_integer,
    shape_of,
    tensor,
)
from flashtile.problem import INT4, CacheTensors, Inputs, Problem

SMALLEST_PAGE = 16
QUANTIZED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, INT4)
"""What a cache may hold in place of the queries' dtype, beside scales."""


def cache(q: Any, k_cache: Any, v_cache: Any, block_table: Any) -> None:
    """q and the cache against each other."""
    for name, value in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        tensor(name, value)
        if value.dtype not in (DTYPES if name == "q" else DTYPES + QUANTIZED):
            more = "" if name == "q" else f", or with scales {NARROW}"
            raise TypeError(f"{name}: got {value.dtype}, need float16, bfloat16, float32 or float64{more}")
        if value.ndim != 4:
            layout = "(batch, seqlen, heads, headdim)" if name == "q" or block_table is None else _PAGES
            raise ValueError(f"{name}: got shape {shape_of(value)}, need {layout}")
        if value.dtype != q.dtype and value.dtype not in QUANTIZED:
            raise TypeError(f"{name}: got {value.dtype}, need {q.dtype} as q; try q.to({value.dtype})")
        beside(name, value, q)
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(f"v_cache: got {v_cache.dtype}, need {k_cache.dtype} as k_cache")
    if k_cache.shape[0] != v_cache.shape[0]:
        what = "rows" if block_table is None else "pages"
        raise ValueError(f"v_cache: got {v_cache.shape[0]} {what}, need {k_cache.shape[0]} as k_cache")
    heads_and_sizes(q, _as_read(k_cache), _as_read(v_cache), ("q", "k_cache", "v_cache"))
    for name, value in (("k_cache", k_cache), ("v_cache", v_cache)):
        if value.stride(-1) != 1:
            raise ValueError(
                f"{name}: got strides {value.stride()}, need columns side by side (a last stride of 1), for rows are "
                f"written in place; try {name}.contiguous() once, where the cache is made"
            )


NARROW = "float8_e4m3fn, float8_e5m2, int8 or uint8 (four-bit integers, two a byte)"


def _as_read(cache: Tensor) -> Tensor:
    """A tensor with the shape that a cache has for queries: four-bit integers lie two in a byte."""
    if cache.dtype is not INT4:
        return cache
    return torch.empty(*cache.shape[:3], 2 * cache.shape[3], device="meta")


_PAGES = "(pages, page_size, heads_kv, headdim), as there is a block_table"


def new_rows(q: Tensor, k: Any, v: Any, k_cache: Tensor, v_cache: Tensor) -> None:
    """The keys and values that a call appends."""
    if (k is None) != (v is None):
        missing, given = ("k", "v") if k is None else ("v", "k")
        raise ValueError(f"{missing}: got None beside {given}, need both or neither; a new key has one value")
    if k is None:
        return
    for name, value, store in (("k", k, k_cache), ("v", v, v_cache)):
        tensor(name, value)
        if value.dtype != q.dtype:
            raise TypeError(f"{name}: got {value.dtype}, need {q.dtype} as q; try {name}.to(q.dtype)")
        beside(name, value, q)
        wanted = (q.shape[0], k.shape[1] if k.ndim == 4 else 1, *_as_read(store).shape[2:])
        if shape_of(value) != wanted:
            raise ValueError(
                f"{name}: got shape {shape_of(value)}, need (batch, seqlen_new, heads_kv, headdim) = {wanted}, as q, "
                f"k and {name}_cache have them"
            )


def places(q: Tensor, k_cache: Tensor, batch_idx: Any, leftpad: Any, block_table: Any) -> None:
    """Where sequences lie in the cache: shapes, dtypes and devices. Reads no tensor."""
    batch = q.shape[0]
    if block_table is not None:
        tensor("block_table", block_table)
        integers("block_table", block_table)
        beside("block_table", block_table, q)
        if block_table.ndim != 2 or (batch_idx is None and len(block_table) < batch):
            raise ValueError(
                f"block_table: got shape {shape_of(block_table)}, need (batch, pages of a sequence) with a row for "
                f"each of {batch} sequences; try cache_batch_idx if sequences have other rows than their own"
            )
        if k_cache.shape[1] < SMALLEST_PAGE:
            raise ValueError(f"k_cache: got pages of {k_cache.shape[1]} rows, need {SMALLEST_PAGE} or more")
    elif batch_idx is None and k_cache.shape[0] < batch:
        raise ValueError(
            f"k_cache: got {k_cache.shape[0]} rows, need one for each of q's {batch} sequences; try cache_batch_idx if "
            "sequences share rows, or block_table if it is paged"
        )
    for name, value in (("cache_batch_idx", batch_idx), ("cache_leftpad", leftpad)):
        if value is not None:
            _one_a_sequence(name, value, q)


def seqlens(q: Tensor, value: Any, appended: int, room: int) -> None:
    """cache_seqlens; `room`: rows that a sequence may have."""
    if not is_integer(value):
        _one_a_sequence("cache_seqlens", value, q)
    elif not 0 <= value <= room - appended:
        raise ValueError(_too_long("cache_seqlens", value, appended, room))


def _one_a_sequence(name: str, value: Any, q: Tensor) -> None:
    if not isinstance(value, Tensor):
        need = "an int or an integer tensor" if name == "cache_seqlens" else "an integer tensor"
        raise TypeError(f"{name}: got {type(value).__name__}, need {need} (batch,); try torch.tensor({name})")
    integers(name, value)
    beside(name, value, q)
    if shape_of(value) != (q.shape[0],):
        raise ValueError(f"{name}: got shape {shape_of(value)}, need (batch,) = ({q.shape[0]},), one number a sequence")


def _too_long(name: str, length: int, appended: int, room: int) -> str:
    beside_it = f" beside {appended} new rows" if appended else ""
    return (
        f"{name}: got {length}{beside_it}, need 0 to {room - appended}, for a sequence has room for {room} rows; try a "
        "larger cache, a wider block_table, or longer rotary tables"
    )


def scales(k_scale: Any, v_scale: Any, k_cache: Tensor, block_table: Any) -> None:
    """What a quantised cache's numbers are multiplied by; no other cache has any."""
    quantized = k_cache.dtype in QUANTIZED
    shapes = [(k_cache.shape[2],)] + ([] if block_table is None else [(k_cache.shape[0], k_cache.shape[2])])
    for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
        if not quantized and value is not None:
            raise ValueError(f"{name}: got one beside a cache of {k_cache.dtype}, need None, for it is not quantised")
        if not quantized:
            continue
        wanted = " or ".join(["(heads_kv,)", *(["(pages, heads_kv)"] if len(shapes) > 1 else [])])
        if value is None:
            raise ValueError(f"{name}: got None beside a cache of {k_cache.dtype}, need a float32 tensor {wanted}")
        tensor(name, value)
        beside(name, value, k_cache, "k_cache")
        if value.dtype is not torch.float32 or shape_of(value) not in shapes or value.stride(-1) != 1:
            raise ValueError(
                f"{name}: got {value.dtype} of shape {shape_of(value)}, need float32, heads side by side, of shape "
                f"{wanted} = {' or '.join(map(str, shapes))}"
            )
    if quantized and k_scale.ndim != v_scale.ndim:
        raise ValueError(f"v_scale: got shape {shape_of(v_scale)}, need {shape_of(k_scale)} as k_scale")


def rotary(cos: Any, sin: Any, q: Tensor, appended: int, positions: int, beyond: int) -> None:
    """The tables of rotary embedding, which need so many `positions`; those of pages may end inside of the last.

    beyond: of more queries than new rows the last ones are turned to places behind all rows.
    """
    if (cos is None) != (sin is None):
        missing, given = ("rotary_cos", "rotary_sin") if cos is None else ("rotary_sin", "rotary_cos")
        raise ValueError(f"{missing}: got None beside {given}, need both or neither")
    if cos is None:
        return
    if not appended:
        raise ValueError(
            "rotary_cos: got one without new keys, need k and v beside it, for positions are theirs; try turning q "
            "before the call"
        )
    for name, value in (("rotary_cos", cos), ("rotary_sin", sin)):
        tensor(name, value)
        floating(name, value)
        beside(name, value, q)
        if value.ndim != 2 or value.dtype not in (q.dtype, torch.float32) or value.stride(-1) != 1:
            raise ValueError(
                f"{name}: got {value.dtype} of shape {shape_of(value)} and strides {value.stride()}, need {q.dtype} as "
                "q, or float32, of shape (positions, rotary_dim / 2), columns side by side"
            )
        if shape_of(value) != shape_of(cos):
            raise ValueError(f"{name}: got shape {shape_of(value)}, need {shape_of(cos)} as rotary_cos")
    if not 0 < 2 * cos.shape[1] <= q.shape[-1]:
        raise ValueError(
            f"rotary_cos: got {cos.shape[1]} columns, need 1 to {q.shape[-1] // 2}, half of the columns of q that turn"
        )
    if cos.shape[0] < positions + beyond:
        more = f" and {beyond} queries more than new keys" if beyond else ""
        raise ValueError(
            f"rotary_cos: got {cos.shape[0]} positions, need {positions + beyond}, for the rows that a sequence may "
            f"have{more}; try longer tables"
        )


def apart(latent: bool, rotary: int) -> None:
    """Values that lie among the columns of keys that turn."""
    if latent and rotary:
        raise ValueError(
            "rotary_cos: got one beside a v_cache that is part of k_cache, need None, for new values do not turn with "
            "their keys; try turning q and k before the call"
        )


def num_splits(value: Any, batch_invariant: bool) -> None:
    if value is None:
        return
    if not is_integer(value):
        raise TypeError(f"num_splits: got {value!r}, need an int or None (as many as fill the device)")
    if not 1 <= value <= 256:
        raise ValueError(f"num_splits: got {value}, need 1 to 256; try None for as many as fill the device")
    if batch_invariant:
        raise ValueError(f"num_splits: got {value} beside batch_invariant, need None, for that has parts of one size")


def inference(named: dict[str, Any]) -> None:
    """Rows are written in place, and nothing is kept for a backward pass."""
    if not torch.is_grad_enabled():
        return
    for name, value in named.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"{name}: got a tensor that requires a gradient, need none, for attention_kvcache has no backward "
                "pass; try torch.no_grad() around the call, or attention"
            )


def cache_values(inputs: Inputs, tensors: CacheTensors, problem: Problem) -> None:
    """The contents of lengths, rows, pages and scales: on the CPU, and with `debug` on devices, which then wait."""
    if problem.cached is None:
        return
    appended, room = problem.cached.appended, problem.seqlen_kv
    lengths = tensors.seqlens.tolist()
    for length in lengths:
        if not 0 <= length <= room - appended:
            raise ValueError(_too_long("cache_seqlens", length, appended, room))
    for index, (pad, length) in enumerate(zip(_numbers(tensors.leftpad), lengths, strict=False)):
        if not 0 <= pad <= length:
            raise ValueError(
                f"cache_leftpad: got {pad} for sequence {index}, need 0 to {length}, its rows in the cache"
            )
    rows = _numbers(tensors.batch_idx) or list(range(problem.batch))
    count = len(inputs.k if tensors.block_table is None else tensors.block_table)
    for row in rows:
        if not 0 <= row < count:
            owner = "k_cache" if tensors.block_table is None else "block_table"
            raise ValueError(f"cache_batch_idx: got {row}, need 0 to {count - 1}, the rows of {owner}")
    if appended and len(set(rows)) < len(rows):
        raise ValueError(
            f"cache_batch_idx: got {rows} beside new keys, need a row of its own for each sequence, as it is written"
        )
    used: list[int] = []
    if tensors.block_table is not None:
        table = [tensors.block_table[row].tolist() for row in rows]
        used = _page_ids(table, lengths, _numbers(tensors.leftpad), appended, inputs.k)
    for name, scale in (("k_scale", tensors.k_scale), ("v_scale", tensors.v_scale)):
        if scale is not None:
            _scale_values(name, scale if scale.ndim == 1 else scale[sorted(set(used))])


def _page_ids(table: list[list[int]], lengths: list[int], pads: list[int], appended: int, pages: Tensor) -> list[int]:
    """The pages in use; the others may be anything."""
    size = pages.shape[1]
    used: list[int] = []
    for index, (ids, length) in enumerate(zip(table, lengths, strict=True)):
        begin, end = pads[index] if pads else 0, length + appended
        for page in ids[begin // size : -(-end // size)] if begin < end else ():
            if not 0 <= page < len(pages):
                raise ValueError(
                    f"block_table: got page {page} for sequence {index}, need 0 to {len(pages) - 1}, the "
                    "pages of k_cache"
                )
            used.append(page)
    return used


def _scale_values(name: str, used: Tensor) -> None:
    wrong = used[~((used > 0) & used.isfinite())]
    if len(wrong):
        raise ValueError(
            f"{name}: got {float(wrong[0])}, need finite numbers above 0, for new rows are divided by them; try 1 for "
            "rows of zeros"
        )


def _numbers(value: Tensor | None) -> list[int]:
    return [] if value is None else [int(number) for number in value.tolist()]


def combined(outputs: Any, lses: Any) -> None:
    """What `combine` takes, before `merge` looks at each pair."""
    for name, value in (("outputs", outputs), ("lses", lses)):
        if not isinstance(value, (Tensor, list, tuple)):
            raise TypeError(f"{name}: got {type(value).__name__}, need a tensor (parts, ...) or a list of tensors")
    if len(outputs) != len(lses):
        raise ValueError(f"lses: got {len(lses)} parts, need {len(outputs)} as outputs; each output has its lse")
