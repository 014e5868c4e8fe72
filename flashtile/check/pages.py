"""What `kvcache.PagedCache` takes."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from flashtile.check.caches import NARROW, QUANTIZED, SMALLEST_PAGE
from flashtile.check.tensors import DTYPES, beside, is_integer, shape_of, tensor
from flashtile.problem import INT4


class OutOfPages(RuntimeError):
    """A `PagedCache` has too few free pages for what it was asked; it is as it was before."""


def pool(sizes: dict[str, Any], dtype: Any) -> None:
    for name, value in sizes.items():
        _count(name, value, SMALLEST_PAGE if name == "page_size" else 1)
    if dtype not in DTYPES + QUANTIZED:
        raise TypeError(f"dtype: got {dtype}, need float16, bfloat16, float32, float64, {NARROW}")
    for name in ("headdim", "headdim_v"):
        if dtype is INT4 and sizes[name] % 2:
            raise ValueError(f"{name}: got {sizes[name]}, need an even number, for four-bit integers lie two in a byte")


def _count(name: str, value: Any, least: int) -> None:
    if not is_integer(value):
        raise TypeError(f"{name}: got {type(value).__name__}, need an int; try int({name})")
    if value < least:
        raise ValueError(f"{name}: got {value}, need {least} or more")


def tokens(value: Any) -> None:
    _count("tokens", value, 0)


def known_sequence(sequence: Any, known: Sequence[int] | Any) -> None:
    if sequence not in known:
        raise ValueError(
            f"sequence: got {sequence!r}, need one that allocate or fork returned and that was not freed since"
        )


def each_once(sequences: Sequence[Any]) -> None:
    if len(set(sequences)) < len(sequences):
        raise ValueError(f"sequences: got {list(sequences)}, need each one once, for rows are added to it")


def enough_pages(needed: int, free: int, total: int) -> None:
    """Asked before anything changes."""
    if needed > free:
        raise OutOfPages(
            f"pages: got {free} free of {total}, need {needed} more; nothing has changed; try freeing a sequence "
            "first, or a cache with more pages"
        )


def table_width(width: int | None, longest: int) -> None:
    if width is not None and width < longest:
        raise ValueError(f"width: got {width}, need {longest}, the pages of the longest sequence; try None")


def paged_rows(k: Any, v: Any, k_pages: Tensor, v_pages: Tensor) -> None:
    """Rows for `PagedCache.append`; the pools are (layers, pages, page_size, heads_kv, d)."""
    for name, value, pages in (("k", k, k_pages), ("v", v, v_pages)):
        tensor(name, value)
        if value.dtype != pages.dtype:
            raise TypeError(f"{name}: got {value.dtype}, need {pages.dtype} as the cache; try {name}.to({pages.dtype})")
        beside(name, value, pages, "the cache")
        wanted = (len(pages), k.shape[1] if k.ndim == 4 else 0, *pages.shape[3:])
        if shape_of(value) != wanted:
            raise ValueError(f"{name}: got shape {shape_of(value)}, need (layers, tokens, heads_kv, d) = {wanted}")
