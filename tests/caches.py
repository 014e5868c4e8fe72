"""Calls over KV caches: random ones, what they must give, and how that is checked; the same on every device.

A call is made of each sequence's own rows, laid into a cache whose every other row is NaN. What it must give is found
from those rows by the reference, one sequence after the other: nothing here reads the cache that the library reads.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import flashtile
from flashtile import State, reference
from tests import oracle
from tests.oracle import Ratio
from tests.problems import Draw, Shape


@dataclass(frozen=True)
class CacheCase:
    """lengths: rows in the cache, left padding included. appended: None: nothing is new. page: 0: one piece a row.
    indexed: sequences have rows in another order than their own. rotary: columns that are turned. stored: what a
    quantised cache holds, with a scale for each head, or each page of each head. latent: values are the first columns
    of the keys, in the cache too."""

    name: str
    lengths: tuple[int, ...] = (5, 41, 0)
    seqlen_q: int = 3
    appended: int | None = 3
    heads: int = 4
    heads_kv: int = 2
    headdim: int = 16
    headdim_v: int = 16
    capacity: int = 64
    page: int = 0
    leftpad: tuple[int, ...] | None = None
    indexed: bool = False
    rotary: int = 0
    interleaved: bool = True
    causal: bool = True
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    stored: torch.dtype | None = None
    scale_by_page: bool = False
    latent: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def turned(self) -> bool:
        """Whether queries turn with their place."""
        return self.causal or self.window not in (None, (None, None))


EVERYTHING = CacheCase(
    "everything",
    leftpad=(2, 17, 0),
    page=16,
    indexed=True,
    rotary=12,
    window=(30, 0),
    softcap=8.0,
    alibi=True,
    sinks=True,
)
"""Append, left padding, paging, batch index and rotary embedding in one call, and all modifiers."""

FP8, INT8, INT4 = torch.float8_e4m3fn, torch.int8, torch.uint8
QUANTIZED = (
    CacheCase("int8", stored=INT8),
    CacheCase("fp8", stored=FP8, page=16, rotary=8),
    CacheCase("fp8_wide", stored=torch.float8_e5m2),
    CacheCase("int8_by_page", stored=INT8, page=16, scale_by_page=True, leftpad=(2, 17, 0)),
    CacheCase("int4", stored=INT4),
    CacheCase("int4_by_page", stored=INT4, page=16, scale_by_page=True, rotary=8, headdim=24, headdim_v=40),
    replace(EVERYTHING, name="everything_fp8", stored=FP8, scale_by_page=True),
    replace(EVERYTHING, name="everything_int8", stored=INT8, seqlen_q=20),
)
"""Caches of fewer bits than the queries have."""

WIDE = (
    CacheCase("latent", latent=True, heads=12, heads_kv=1, headdim=576, headdim_v=512, page=16),
    CacheCase("latent_fp8", latent=True, heads=5, heads_kv=1, headdim=576, headdim_v=512, stored=FP8),
    CacheCase("latent_int4", latent=True, heads=5, heads_kv=1, headdim=576, headdim_v=512, stored=INT4, page=16),
    CacheCase("wide", seqlen_q=1, appended=1, headdim=530, headdim_v=40),
)
"""Keys of more than 512 columns: multi-head latent attention, and others."""

_LATENT: dict[str, Any] = {"latent": True, "heads_kv": 1, "headdim": 576, "headdim_v": 512}
LATENT = (
    CacheCase("latent_many", heads=70, seqlen_q=1, appended=1, lengths=(5, 70, 0), capacity=80, **_LATENT),
    CacheCase("latent_pages", lengths=(95, 30, 0), heads=20, seqlen_q=2, appended=2, capacity=128, page=64,
              indexed=True, softcap=5.0, **_LATENT),
    CacheCase("latent_padded", lengths=(100, 63, 40), heads=23, appended=None, capacity=128, leftpad=(3, 40, 40),
              alibi=True, causal=False, **_LATENT),
    CacheCase("latent_many_fp8", heads=70, seqlen_q=1, appended=1, lengths=(5, 70, 0), capacity=80, stored=FP8,
              **_LATENT),
    CacheCase("latent_pages_fp8", lengths=(95, 190, 0), heads=20, seqlen_q=2, appended=2, capacity=192, page=64,
              indexed=True, softcap=5.0, stored=torch.float8_e5m2, **_LATENT),
)  # fmt: skip
"""Latent attention with more rows of queries than one tile holds, as Hopper has a kernel for."""

CASES = (
    CacheCase("plain"),
    CacheCase("one_query", seqlen_q=1, appended=1),
    CacheCase("nothing_new", lengths=(5, 41, 2), appended=None),
    CacheCase("not_causal", causal=False),
    CacheCase("sixty_four_queries", lengths=(5, 90), seqlen_q=64, appended=64, capacity=160),
    CacheCase("more_queries_than_new", lengths=(9, 33), seqlen_q=5, appended=2),
    CacheCase("more_new_than_queries", lengths=(0, 33), seqlen_q=2, appended=19),
    CacheCase("no_group", heads_kv=4),
    CacheCase("group_of_seven", heads=7, heads_kv=1, headdim=24, headdim_v=40),
    CacheCase("window", window=(7, 2), causal=False),
    CacheCase("rotary", rotary=16),
    CacheCase("rotary_apart", rotary=12, interleaved=False),
    CacheCase("rotary_not_causal", rotary=8, causal=False),
    CacheCase("turned_beyond", lengths=(5, 62), seqlen_q=5, appended=2, rotary=8),
    CacheCase("modifiers", softcap=5.0, alibi=True, sinks=True),
    CacheCase("paged", page=16),
    CacheCase("paged_tiles", page=128, lengths=(300, 128, 5), capacity=384),
    CacheCase("paged_odd", page=24, capacity=72, lengths=(5, 60, 23)),
    CacheCase("paged_nothing_new", page=32, lengths=(64, 0, 33), appended=None, capacity=96),
    CacheCase("leftpad", leftpad=(5, 20, 0)),
    CacheCase("indexed", indexed=True),
    CacheCase("paged_leftpad", page=16, leftpad=(4, 33, 0)),
    replace(EVERYTHING, name="everything_apart", interleaved=False, window=None, headdim=24, headdim_v=8),
    replace(EVERYTHING, name="everything_long", lengths=(40, 130, 3), leftpad=(2, 50, 0), capacity=192, window=None),
    EVERYTHING,
)


@dataclass
class CacheCall:
    """The tensors of a call, and each sequence's own rows: `old`, (k, v), those in the cache behind the padding.
    `dtype`: what turned rows are rounded to."""

    case: CacheCase
    dtype: torch.dtype
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    options: dict[str, Any]
    old: list[tuple[Tensor, Tensor]]

    def run(self, **more: Any) -> State:
        """The library's result; the caches of the call get the new rows."""
        found: State = flashtile.attention_kvcache(
            self.q, self.k_cache, self.v_cache, **self.options, **more, return_lse=True
        )
        return found

    def copy(self) -> "CacheCall":
        k_cache = self.k_cache.clone()
        v_cache = k_cache[..., : self.v_cache.shape[-1]] if self.case.latent else self.v_cache.clone()
        return replace(self, k_cache=k_cache, v_cache=v_cache)

    def read(self, sequence: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """(k, v) of rows [begin, end) as a quantised cache holds them, float64."""
        where = self.places(sequence, begin, end)
        stores = (("k", self.k_cache), ("v", self.v_cache))
        k, v = (
            _numbers(as_bytes(store)[where].view(store.dtype)) * _scale(self, name, where) for name, store in stores
        )
        return k, v

    def places(self, sequence: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Where rows [begin, end) of a sequence lie: indices of the first two dimensions of the caches."""
        rows = torch.arange(begin, end)
        index = self.options.get("cache_batch_idx")
        row = sequence if index is None else int(index[sequence])
        table = self.options.get("block_table")
        if table is None:
            return torch.full_like(rows, row), rows
        return table[row].cpu().long()[rows // self.case.page], rows % self.case.page


def make(case: CacheCase, dtype: torch.dtype, device: str = "cpu") -> CacheCall:
    """Normal numbers from a fixed seed; NaN wherever no sequence has a row."""
    draw = Draw(case.name, device)

    def normal(*sizes: int) -> Tensor:
        return draw.normal(*sizes).to(dtype)

    batch, heads_kv = len(case.lengths), case.heads_kv
    widths = (case.headdim, case.headdim_v)
    pads = case.leftpad or (0,) * batch
    old = [
        tuple(normal(length - pad, heads_kv, width) for width in widths)
        for length, pad in zip(case.lengths, pads, strict=True)
    ]
    options: dict[str, Any] = {
        "cache_seqlens": torch.tensor(case.lengths, dtype=torch.int32, device=device),
        "causal": case.causal,
        "window": case.window,
        "softcap": case.softcap,
    }
    rows = batch + 2 if case.indexed else batch
    if case.page:
        columns = -(-case.capacity // case.page)
        pages = draw.integers(2**30, rows * columns + 3).argsort()[: rows * columns]
        options["block_table"] = pages.view(rows, columns).int()
        shape: tuple[int, ...] = (rows * columns + 3, case.page)
    else:
        shape = (rows, case.capacity)
    if case.indexed:
        options["cache_batch_idx"] = torch.arange(rows - 1, 1, -1, device=device, dtype=torch.int32)
    if case.page:
        _forget_unused(case, options)
    if case.leftpad is not None:
        options["cache_leftpad"] = torch.tensor(pads, dtype=torch.int32, device=device)
    if case.appended is not None:
        for name, width in zip("kv", widths, strict=True):
            options[name] = normal(batch, case.appended, heads_kv, width)
    if case.rotary:
        # More queries than new rows are turned to places behind all rows.
        angles = draw.normal(max(case.capacity + case.seqlen_q, 2 * case.page * 8), case.rotary // 2)
        options |= {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}
        options["rotary_interleaved"] = case.interleaved
    if case.alibi:
        options["alibi_slopes"] = draw.normal(batch, case.heads).abs()
    if case.sinks:
        options["sinks"] = draw.normal(case.heads)
    pairs = 2 if case.stored is INT4 else 1
    caches = [_unused((*shape, heads_kv, width // pairs), case.stored or dtype, device) for width in widths]
    if case.stored is not None:
        counts = (shape[0], heads_kv) if case.scale_by_page else (heads_kv,)
        # 3 is what normal numbers seldom pass: some are cut off.
        largest = _largest(case.stored)
        for name in ("k_scale", "v_scale"):
            options[name] = (draw.normal(*counts).abs() + 1.0) * (3.0 / largest)
    call = CacheCall(case, dtype, normal(batch, case.seqlen_q, case.heads, case.headdim), *caches, options, old)
    if case.latent:
        call.v_cache = call.k_cache[..., : case.headdim_v // pairs]
        call.old = old = [(k, k[..., : case.headdim_v]) for k, _ in old]
        if "k" in options:
            options["v"] = options["k"][..., : case.headdim_v]
        if case.stored is not None:
            options["v_scale"] = options["k_scale"]
    for sequence, rows in enumerate(old):
        where = call.places(sequence, pads[sequence], case.lengths[sequence])
        for name, cache, one in zip("kv", (call.k_cache, call.v_cache), rows, strict=True):
            as_bytes(cache)[where] = as_bytes(one if case.stored is None else _quantized(call, name, where, one))
    if case.scale_by_page:
        for name in ("k_scale", "v_scale"):
            options[name] = _scales_in_use(call, options[name])
    if case.stored is not None:
        # What a quantised cache holds is what is attended to.
        call.old = [call.read(i, pads[i], case.lengths[i]) for i in range(batch)]
    return call


def _forget_unused(case: CacheCase, options: dict[str, Any]) -> None:
    """No page that there is, where the block table names none in use."""
    table, index = options["block_table"], options.get("cache_batch_idx")
    used = torch.zeros_like(table, dtype=torch.bool)
    for sequence, length in enumerate(case.lengths):
        row = sequence if index is None else int(index[sequence])
        used[row, : -(-(length + (case.appended or 0)) // case.page)] = True
    table[~used] = 2**30


def _scales_in_use(call: CacheCall, scale: Tensor) -> Tensor:
    """The same, NaN for pages that no sequence has rows in."""
    found = torch.full_like(scale, torch.nan)
    for index, length in enumerate(call.case.lengths):
        begin = call.case.leftpad[index] if call.case.leftpad else 0
        pages, _ = call.places(index, begin, length + (call.case.appended or 0))
        found[pages] = scale[pages]
    return found


def _unused(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """NaN, or of integers the number furthest from all others."""
    made = torch.zeros(shape, dtype=dtype, device=device)
    furthest = {INT8: 0x80, INT4: 0x88}.get(dtype, 0x7F)
    as_bytes(made).fill_(furthest) if dtype.itemsize == 1 else made.fill_(torch.nan)
    return made


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _scale(call: CacheCall, name: str, where: tuple[Tensor, Tensor]) -> Tensor:
    """(rows, heads_kv, 1), float64."""
    scale = call.options[f"{name}_scale"].double()
    pages = where[0].to(scale.device)
    return (scale[pages] if call.case.scale_by_page else scale.expand(len(pages), -1))[..., None]


def _quantized(call: CacheCall, name: str, where: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
    """The nearest numbers that the cache can hold."""
    stored = call.case.stored
    assert stored is not None
    scaled = rows.double() / _scale(call, name, where)
    scaled = scaled.clamp(-_largest(stored), _largest(stored))
    if stored is INT4:
        low, high = (scaled.round().int()[..., first::2] % 16 for first in (0, 1))
        return (low + 16 * high).to(stored)
    return (scaled.round() if stored is INT8 else scaled.float()).to(stored)


def _largest(stored: torch.dtype) -> float:
    return {INT8: 127.0, INT4: 7.0}[stored] if not stored.is_floating_point else torch.finfo(stored).max


def _numbers(rows: Tensor) -> Tensor:
    """What a cache holds, float64; four-bit integers lie two in a byte, the even column in its low bits."""
    if rows.dtype is not INT4:
        return rows.double()
    pairs = torch.stack((rows % 16, rows // 16), dim=-1).double()
    return torch.where(pairs > 7, pairs - 16, pairs).flatten(-2)


def expected(call: CacheCall, dtype: torch.dtype | None) -> tuple[State, list[Tensor]]:
    """The reference's (out, lse) in `dtype` (None: the input's own), and the keys that each sequence gained."""
    case, options = call.case, call.options
    outs, lses, gained = [], [], []
    shared = {"causal": case.causal, "window": case.window, "softcap": case.softcap, "sinks": options.get("sinks")}
    for index, length in enumerate(case.lengths):
        q = call.q[index : index + 1]
        k, v = (part[None] for part in call.old[index])
        new_k, new_v = k[:, :0], v[:, :0]
        if case.appended is not None:
            new_k, new_v = options["k"][index : index + 1], options["v"][index : index + 1]
        if case.rotary:
            q = _turned(call, q, length, case.turned, dtype)
            new_k = _turned(call, new_k, length, True, dtype)
        turned_k = new_k
        if case.stored is not None and case.appended:
            new_k, new_v = (rows[None] for rows in call.read(index, length, length + case.appended))
        wide = dtype or q.dtype
        k, v = (torch.cat((one.to(wide), two.to(wide)), dim=1) for one, two in ((k, new_k), (v, new_v)))
        slopes = options["alibi_slopes"][index : index + 1] if case.alibi else None
        state = reference.attention(q, k, v, dtype=dtype, alibi_slopes=slopes, **shared)
        outs.append(state.out)
        lses.append(state.lse)
        gained.append(turned_k[0])
    return State(torch.cat(outs), torch.cat(lses)), gained


def _turned(call: CacheCall, rows: Tensor, first: int, moving: bool, dtype: torch.dtype | None) -> Tensor:
    """Rotary embedding, pair by pair, in `dtype` or float32, then rounded as the cache holds it."""
    rows = rows.to(dtype or torch.float32).clone()
    cos, sin = (call.options[name].to(rows.dtype) for name in ("rotary_cos", "rotary_sin"))
    half = call.case.rotary // 2
    for row in range(rows.shape[1]):
        for pair in range(half):
            a, b = (2 * pair, 2 * pair + 1) if call.case.interleaved else (pair, pair + half)
            place = first + row if moving else first
            x, y = rows[:, row, :, a].clone(), rows[:, row, :, b].clone()
            rows[:, row, :, a] = x * cos[place, pair] - y * sin[place, pair]
            rows[:, row, :, b] = x * sin[place, pair] + y * cos[place, pair]
    return rows.to(call.dtype).to(dtype or call.q.dtype)


def check(call: CacheCall, run: Callable[..., State] = CacheCall.run, slack: float = 1.0, **more: Any) -> State:
    """Runs the call and asserts the oracle's tolerance rule, and that the caches gained their new rows alone.

    slack: as `oracle.compare` has it.
    """
    case = call.case
    before = call.copy()
    found = run(call, **more)
    truth, gained = expected(call, torch.float64)
    textbook, _ = expected(call, None)
    shape = Shape(len(case.lengths), case.seqlen_q, case.capacity, case.heads, case.heads_kv, case.headdim)
    half = call.q.dtype in (torch.float16, torch.bfloat16)
    if half:
        single = replace(call, q=call.q.float(), old=[(k.float(), v.float()) for k, v in call.old])
        floats = {name: call.options[name].float() for name in ("k", "v") if name in call.options}
        textbook = textbook._replace(lse=expected(replace(single, options=call.options | floats), None)[0].lse)
    extra = oracle.LSE_SHARE * torch.finfo(call.q.dtype).eps if half else 0.0
    ratios: list[Ratio] = []
    for name, share in (("out", 0.0), ("lse", extra)):
        value, exact, plain = (getattr(state, name) for state in (found, truth, textbook))
        error = torch.where(exact == -torch.inf, 0.0, plain.double() - exact)
        ratios += oracle.compare_one(name, value, exact, [error], shape, share)
    worst = max(ratios, key=lambda ratio: ratio.value)
    assert worst.value <= slack, f"{case} {worst.name}: error {worst.error:.3e}, allowed {worst.allowed:.3e}"
    _check_caches(call, before, gained)
    return found


def _check_caches(call: CacheCall, before: CacheCall, gained: list[Tensor]) -> None:
    """New keys within a rounding, new values exactly, and every other row, NaN included, as it was."""
    case = call.case
    for index, length in enumerate(case.lengths):
        where = call.places(index, length, length + len(gained[index]))
        if case.stored is not None:
            _check_quantized(call, index, gained[index])
        elif len(gained[index]):
            oracle.assert_close(call.k_cache[where], gained[index], roundings=2)
            assert torch.equal(call.v_cache[where], call.options["v"][index])
        for cache, old in ((call.k_cache, before.k_cache), (call.v_cache, before.v_cache)):
            as_bytes(old)[where] = as_bytes(cache)[where]
    for cache, old in ((call.k_cache, before.k_cache), (call.v_cache, before.v_cache)):
        torch.testing.assert_close(as_bytes(cache), as_bytes(old), rtol=0, atol=0, equal_nan=True)


def _check_quantized(call: CacheCall, index: int, keys: Tensor) -> None:
    """New rows are stored as near to what they were as the cache can hold, but for a rounding where two are as near."""
    length = call.case.lengths[index]
    where = call.places(index, length, length + len(keys))
    found = call.read(index, length, length + len(keys))
    wanted = (keys, call.options["v"][index] if len(keys) else keys)
    for name, near, exact in zip("kv", found, wanted, strict=True):
        if len(keys):
            best = _numbers(_quantized(call, name, where, exact)) * _scale(call, name, where)
            slack = 2**-6 * _scale(call, name, where) + 2**-7 * exact.double().abs() * (name == "k")
            assert bool(((near - exact).abs() <= (best - exact).abs() + slack).all())


def check_invariance(dtype: torch.dtype, page: int, device: str = "cpu") -> None:
    """Each sequence of a batch gets the same bits alone, in a cache of another size, with pages of `page` rows."""
    case = replace(EVERYTHING, rotary=0, alibi=False)
    call = make(case, dtype, device)
    pads = case.leftpad or ()
    together = call.copy().run(batch_invariant=True)
    for index, length in enumerate(case.lengths):
        alone = replace(case, lengths=(length,), leftpad=pads[index : index + 1], page=page, capacity=96)
        one = make(alone, dtype, device)
        one.q = call.q[index : index + 1]
        one.options |= {name: call.options[name][index : index + 1] for name in ("k", "v")}
        one.options["sinks"] = call.options["sinks"]
        where = one.places(0, pads[index], length)
        one.k_cache[where], one.v_cache[where] = call.old[index]
        found = one.run(batch_invariant=True)
        assert torch.equal(found.out[0], together.out[index])
        assert torch.equal(found.lse[0], together.lse[index])
