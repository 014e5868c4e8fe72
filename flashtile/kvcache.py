"""KV caches: where the rows of a sequence lie, what is appended to them and how it is turned; no kernels.

A cache is a pair of tensors (rows, seqlen, heads_kv, d), a sequence a row, or (pages, page_size, heads_kv, d) with a
block table that names the pages of each sequence in order (vLLM, Kwon et al. 2023, section 4). `PagedCache` keeps such
a pool of pages: who has which, who shares them, and what is free.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile import check
from flashtile.check import OutOfPages as OutOfPages
from flashtile.problem import INT4, CacheTensors


def turned(rows: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding (RoFormer, Su et al. 2021, equation 34) of rows (batch, seqlen, heads, d).

    With angles a at a row's position, each pair of columns (x, y) becomes (x cos a - y sin a, x sin a + y cos a). Pairs
    stand side by side (`interleaved`) or half of the turned columns apart; columns beyond twice the tables' stay. The
    sums are float32 (float64 for float64 rows), rounded once.
    """
    half = cos.shape[1]
    wide = torch.promote_types(rows.dtype, torch.float32)
    cos, sin = (table[positions][:, :, None].to(wide) for table in (cos, sin))
    moving, rest = rows[..., : 2 * half].to(wide), rows[..., 2 * half :]
    pairs = moving.unflatten(-1, (half, 2) if interleaved else (2, half))
    x, y = pairs.unbind(-1 if interleaved else -2)
    pairs = torch.stack((x * cos - y * sin, x * sin + y * cos), dim=-1 if interleaved else -2)
    return torch.cat((pairs.flatten(-2).to(rows.dtype), rest), dim=-1)


def query_positions(tensors: CacheTensors, seqlen_q: int, moving: bool) -> Tensor:
    """(batch, seqlen_q): where queries are turned to, from the first new row on; all to that one unless `moving`."""
    first = tensors.seqlens.long()[:, None]
    return first + torch.arange(seqlen_q, device=first.device) if moving else first.expand(-1, seqlen_q)


def append(k_cache: Tensor, v_cache: Tensor, tensors: CacheTensors, interleaved: bool) -> None:
    """Writes the new rows behind those that each sequence has; keys are turned to their own positions first."""
    if tensors.k is None or tensors.v is None:
        return
    positions = query_positions(tensors, tensors.k.shape[1], True)
    k = tensors.k
    if tensors.rotary_cos is not None and tensors.rotary_sin is not None:
        k = turned(k, tensors.rotary_cos, tensors.rotary_sin, positions, interleaved)
    rows = _rows(tensors)[:, None].expand_as(positions)
    if tensors.block_table is not None:
        size = k_cache.shape[1]
        rows, positions = tensors.block_table.long()[rows, positions // size], positions % size
    for cache, new, scale in ((k_cache, k, tensors.k_scale), (v_cache, tensors.v, tensors.v_scale)):
        stored = new if scale is None else quantized(new, scale if scale.ndim == 1 else scale[rows], cache.dtype)
        _bytes(cache)[rows, positions] = _bytes(stored)


def quantized(rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """rows (.., heads_kv, d) divided by scale (.., heads_kv), rounded to the nearest number of the dtype; larger ones
    are cut off to its largest, NaN stays where the dtype has it. torch.uint8: four-bit integers, (.., heads_kv, d / 2),
    see `packed`."""
    scaled = rows.float() / scale[..., None]
    if dtype is INT4:
        return packed(scaled.round().clamp(-7, 7).to(torch.int8))
    if dtype is torch.int8:
        return scaled.round().clamp(-127, 127).to(dtype)
    largest = torch.finfo(dtype).max
    return scaled.clamp(-largest, largest).to(dtype)


def packed(numbers: Tensor) -> Tensor:
    """int8 numbers from -8 to 7, (.., d), two to a byte, (.., d / 2): the even column in the low bits."""
    low, high = numbers.view(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return (low & 15) | (high << 4)


def unpacked(pairs: Tensor) -> Tensor:
    """The int8 numbers of `packed`."""
    signed = pairs.view(torch.int8)
    return torch.stack(((pairs << 4).view(torch.int8) >> 4, signed >> 4), dim=-1).flatten(-2)


def _bytes(tensor: Tensor) -> Tensor:
    """8-bit floats as bytes: PyTorch moves those by index on every device."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _rows(tensors: CacheTensors) -> Tensor:
    """The row of the cache, or of the block table, that each sequence has."""
    if tensors.batch_idx is not None:
        return tensors.batch_idx.long()
    return torch.arange(len(tensors.seqlens), device=tensors.seqlens.device)


def gathered(
    cache: Tensor,
    table: Tensor | None,
    row: int,
    begin: int,
    end: int,
    scale: Tensor | None = None,
    wide: torch.dtype = torch.float32,
) -> Tensor:
    """Rows [begin, end) of one sequence, (1, end - begin, heads_kv, d): a view, or a copy where they lie in pages, or
    are quantised and get multiplied by `scale`, in the dtype `wide`."""
    if table is None:
        rows = _unpacked(cache[row : row + 1, begin:end])
        return rows if scale is None else rows.to(wide) * scale[:, None].to(wide)
    size = cache.shape[1]
    first = begin // size
    pages = table[row, first : -(-end // size)].long()
    rows = _unpacked(_bytes(cache)[pages].view(cache.dtype))
    if scale is not None:
        rows = rows.to(wide) * (scale if scale.ndim == 1 else scale[pages][:, None])[..., None].to(wide)
    return rows.flatten(0, 1)[None, begin - first * size : end - first * size]


def _unpacked(rows: Tensor) -> Tensor:
    return unpacked(rows) if rows.dtype is INT4 else rows


class Batch(NamedTuple):
    """Where sequences lie, for `attention_kvcache`: block_table (sequences, pages) and cache_seqlens (sequences,)."""

    block_table: Tensor
    cache_seqlens: Tensor


class PagedCache:
    """A pool of pages for the keys and values of many sequences, in all layers of a model.

    `extend` makes room for new rows and says where sequences lie, `attention_kvcache` writes them there, layer by
    layer, over `cache.k[layer]` and `cache.v[layer]`; `append` writes them by itself. Forked sequences share their
    pages until one of them writes (copy on write). Pages are given out on the host; nothing waits for a device.

    Args:
        pages: how many there are, for all sequences together.
        page_size: rows of a page, at least 16.
        heads_kv: key/value heads; headdim: columns of a key; headdim_v: of a value, default headdim.
        layers: of the model; a page holds its rows in each of them.
        dtype: of keys and values, as they are stored; torch.uint8: four-bit integers, two a byte. device: where they
            lie.

    Attributes:
        k, v: (layers, pages, page_size, heads_kv, headdim or headdim_v), not initialised; of four-bit integers half as
            many columns.

    Raises:
        TypeError, ValueError: a size or dtype is not as described.
    """

    def __init__(
        self,
        pages: int,
        page_size: int,
        heads_kv: int,
        headdim: int,
        *,
        headdim_v: int | None = None,
        layers: int = 1,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        headdim_v = headdim if headdim_v is None else headdim_v
        sizes = {"pages": pages, "page_size": page_size, "heads_kv": heads_kv, "headdim": headdim}
        check.pool({**sizes, "headdim_v": headdim_v, "layers": layers}, dtype)
        self.page_size = page_size
        shape = (layers, pages, page_size, heads_kv)
        pairs = 2 if dtype is INT4 else 1
        self.k = torch.empty(*shape, headdim // pairs, dtype=dtype, device=device)
        self.v = torch.empty(*shape, headdim_v // pairs, dtype=dtype, device=device)
        # The lowest pages are given out first.
        self._free = list(range(pages))[::-1]
        self._owners = [0] * pages
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0

    @property
    def pages_free(self) -> int:
        """Pages that nobody has."""
        return len(self._free)

    @property
    def sequences(self) -> list[int]:
        """The sequences there are, oldest first."""
        return list(self._pages)

    def seqlen(self, sequence: int) -> int:
        """Rows of a sequence."""
        check.known_sequence(sequence, self._pages)
        return self._lengths[sequence]

    def allocate(self, tokens: int = 0) -> int:
        """A new sequence without rows, with pages set aside for `tokens` of them.

        Raises:
            OutOfPages: there are too few; nothing has changed.
        """
        check.tokens(tokens)
        needed = self._pages_of(tokens)
        check.enough_pages(needed, len(self._free), len(self._owners))
        return self._add([self._take() for _ in range(needed)], 0)

    def fork(self, sequence: int) -> int:
        """A new sequence with the rows of another, sharing its pages. It takes no page until one of them writes."""
        check.known_sequence(sequence, self._pages)
        length = self._lengths[sequence]
        shared = self._pages[sequence][: self._pages_of(length)]
        for page in shared:
            self._owners[page] += 1
        return self._add(list(shared), length)

    def free(self, sequence: int) -> None:
        """Gives a sequence up; pages that nobody shares are free again."""
        check.known_sequence(sequence, self._pages)
        self._release(self._pages.pop(sequence))
        del self._lengths[sequence]

    def truncate(self, sequence: int, tokens: int) -> None:
        """Keeps the first `tokens` rows, as speculative decoding does with what was not accepted, and frees pages."""
        check.known_sequence(sequence, self._pages)
        check.tokens(tokens)
        if tokens < self._lengths[sequence]:
            kept = self._pages_of(tokens)
            self._release(self._pages[sequence][kept:])
            del self._pages[sequence][kept:]
            self._lengths[sequence] = tokens

    def extend(self, sequences: Sequence[int], tokens: int, width: int | None = None) -> Batch:
        """Makes room for `tokens` more rows in each sequence and counts them as there; the caller writes them.

        Args:
            sequences: each once.
            tokens: new rows of each.
            width: columns of the block table, for CUDA graphs that want one shape; default: as the longest needs.

        Returns:
            Batch: block_table and cache_seqlens (the lengths before), int32, for `attention_kvcache`.

        Raises:
            OutOfPages: there are too few free pages for all of them; nothing has changed, for none of them.
        """
        check.tokens(tokens)
        check.each_once(sequences)
        for sequence in sequences:
            check.known_sequence(sequence, self._pages)
        longest = max((self._pages_of(self._lengths[sequence] + tokens) for sequence in sequences), default=0)
        check.table_width(width, longest)
        check.enough_pages(self._needed(sequences, tokens), len(self._free), len(self._owners))
        before = [self._lengths[sequence] for sequence in sequences]
        for sequence in sequences:
            self._grow(sequence, tokens)
        return Batch(self.block_table(sequences, width), torch.tensor(before, dtype=torch.int32, device=self.k.device))

    def append(self, sequence: int, k: Tensor, v: Tensor) -> None:
        """Adds rows k (layers, tokens, heads_kv, headdim) and v (.., headdim_v), as the pool holds them, to a sequence.

        Raises:
            OutOfPages: there are too few; nothing has changed.
        """
        check.known_sequence(sequence, self._pages)
        check.paged_rows(k, v, self.k, self.v)
        begin, tokens = self._lengths[sequence], k.shape[1]
        table = self.extend([sequence], tokens).block_table[0].long()
        rows = torch.arange(begin, begin + tokens, device=self.k.device)
        pages, slots = table[rows // self.page_size], rows % self.page_size
        for pool, new in ((self.k, k), (self.v, v)):
            _bytes(pool)[:, pages, slots] = _bytes(new)

    def read(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Copies of a sequence's rows: k (layers, seqlen, heads_kv, headdim) and v (.., headdim_v)."""
        length = self.seqlen(sequence)
        pages = torch.tensor(self._pages[sequence][: self._pages_of(length)], dtype=torch.int64, device=self.k.device)
        k, v = (_bytes(pool)[:, pages].view(pool.dtype).flatten(1, 2)[:, :length] for pool in (self.k, self.v))
        return k, v

    def block_table(self, sequences: Sequence[int], width: int | None = None) -> Tensor:
        """(sequences, width) int32: the pages of each in order, 0 behind the last; width default: as the longest."""
        for sequence in sequences:
            check.known_sequence(sequence, self._pages)
        rows = [self._pages[sequence] for sequence in sequences]
        longest = max(map(len, rows), default=0)
        width = max(1, longest) if width is None else width
        # Pages that were set aside and hold nothing yet need no place in a narrow table.
        table = [(row + [0] * width)[:width] for row in rows]
        return torch.tensor(table, dtype=torch.int32, device=self.k.device).reshape(len(rows), width)

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _add(self, pages: list[int], length: int) -> int:
        sequence, self._next = self._next, self._next + 1
        self._pages[sequence], self._lengths[sequence] = pages, length
        return sequence

    def _take(self) -> int:
        page = self._free.pop()
        self._owners[page] = 1
        return page

    def _release(self, pages: Sequence[int]) -> None:
        for page in reversed(pages):
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free.append(page)

    def _written(self, sequence: int, tokens: int) -> list[int]:
        """The places, among the pages that a sequence has, of those that its next rows go to."""
        length, pages = self._lengths[sequence], self._pages[sequence]
        last = min(self._pages_of(length + tokens), len(pages)) if tokens else 0
        return list(range(length // self.page_size, last))

    def _needed(self, sequences: Sequence[int], tokens: int) -> int:
        """Pages that `_grow` of all of them will take: new ones, and copies of what others hold too."""
        needed = 0
        owners: dict[int, int] = {}
        for sequence in sequences:
            pages = self._pages[sequence]
            needed += max(0, self._pages_of(self._lengths[sequence] + tokens) - len(pages))
            for place in self._written(sequence, tokens):
                left = owners.get(pages[place], self._owners[pages[place]])
                if left > 1:
                    needed += 1
                    owners[pages[place]] = left - 1
        return needed

    def _grow(self, sequence: int, tokens: int) -> None:
        pages = self._pages[sequence]
        for place in self._written(sequence, tokens):
            shared = pages[place]
            if self._owners[shared] > 1:
                pages[place] = own = self._take()
                self._owners[shared] -= 1
                for pool in (self.k, self.v):
                    pool[:, own] = pool[:, shared]
        self._lengths[sequence] += tokens
        while len(pages) < self._pages_of(self._lengths[sequence]):
            pages.append(self._take())
