"""One query a sequence over a full KV cache: what the suite `decode` times, beside a plain read of the same bytes.

On a GPU every peer is captured in a CUDA graph, so that no host's time is counted; one that cannot be is timed as it is
called, and its row says so.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashtile
from flashtile import reference
from flashtile.bench import accuracy, records, timing
from flashtile.bench.cases import Case
from flashtile.bench.peers import Bound, Peer, Refused
from flashtile.bench.records import Row
from flashtile.bench.timing import Effort

PASS = "decode"
PAGE = 64

CELLS = ((64, 8192), (16, 8192), (4, 65536), (1, 131072), (1, 8192))
"""(batch, rows of each sequence) on a GPU."""

HEADS = ((32, 8), (64, 8))
"""(query heads, key/value heads), head dimension 128."""

LATENT_CELLS, LATENT_HEADS = ((64, 8192), (16, 8192)), (16, 128)
"""Of multi-head latent attention: one key head of `LATENT` columns, of which the first `VALUES` are the values."""

LATENT, VALUES = 576, 512


class Tensors(NamedTuple):
    """A query a sequence (batch, 1, heads, headdim), caches (batch, seqlen, heads_kv, headdim), the same in pages, and
    the same as 8-bit floats of scale 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    k_pages: Tensor
    v_pages: Tensor
    table: Tensor
    k_narrow: Tensor
    v_narrow: Tensor
    scale: Tensor


NARROW = torch.float8_e4m3fn


def tensors(case: Case) -> Tensors:
    """Normal inputs, drawn on the device; pages in an order drawn too."""
    generator = torch.Generator(case.device).manual_seed(case.seqlen)

    def normal(rows: int, heads: int) -> Tensor:
        sizes = (case.batch, rows, heads, case.headdim)
        return torch.randn(sizes, generator=generator, device=case.device, dtype=case.torch_dtype)

    q, k = normal(1, case.heads), normal(case.seqlen, case.heads_kv)
    latent = case.headdim == LATENT
    v = k[..., :VALUES] if latent else normal(case.seqlen, case.heads_kv)
    lengths = torch.full((case.batch,), case.seqlen, dtype=torch.int32, device=case.device)
    pages = case.batch * case.seqlen // PAGE
    order = torch.randperm(pages, generator=generator, device=case.device)
    k_pages = torch.empty_like(k).view(pages, PAGE, *k.shape[2:])
    k_pages[order] = k.view_as(k_pages)
    v_pages = k_pages[..., :VALUES] if latent else torch.empty_like(k_pages)
    if not latent:
        v_pages[order] = v.view_as(v_pages)
    k_narrow = k.to(NARROW)
    v_narrow = k_narrow[..., :VALUES] if latent else v.to(NARROW)
    scale = torch.ones(case.heads_kv, device=case.device)
    table = order.view(case.batch, -1).int()
    return Tensors(q, k, v, lengths, k_pages, v_pages, table, k_narrow, v_narrow, scale)


Call = Callable[[], Tensor]


def _flashtile(case: Case, t: Tensors) -> Call:
    return lambda: flashtile.attention_kvcache(t.q, t.k, t.v, cache_seqlens=t.lengths)


def _flashtile_paged(case: Case, t: Tensors) -> Call:
    return lambda: flashtile.attention_kvcache(t.q, t.k_pages, t.v_pages, cache_seqlens=t.lengths, block_table=t.table)


def _flashtile_narrow(case: Case, t: Tensors) -> Call:
    return lambda: flashtile.attention_kvcache(
        t.q, t.k_narrow, t.v_narrow, cache_seqlens=t.lengths, k_scale=t.scale, v_scale=t.scale
    )


def _sdpa(case: Case, t: Tensors) -> Call:
    """Heads before rows, its own best layout."""
    _only_narrow(case)
    q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in (t.q, t.k, t.v))
    gqa = case.group > 1
    return lambda: scaled_dot_product_attention(q, k, v, enable_gqa=gqa).transpose(1, 2)


def _sdpa_cudnn(case: Case, t: Tensors) -> Call:
    attend = _sdpa(case, t)

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attend()

    return call


def _only_narrow(case: Case) -> None:
    if case.headdim > 256:
        raise Refused("it has no kernel for heads of more than 256 columns")


def _fa3(case: Case, t: Tensors) -> Call:
    _only_narrow(case)
    try:
        attend = importlib.import_module("fa3_fwd_interface").flash_attn_with_kvcache
    except (ImportError, AttributeError) as error:
        raise Refused("fa3_fwd_interface.flash_attn_with_kvcache is not installed") from error

    def call() -> Tensor:
        found = attend(t.q, t.k, t.v, cache_seqlens=t.lengths, causal=True)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out

    return call


def _read(case: Case, t: Tensors) -> Call:
    """The largest number of the caches' bytes, as integers: what a kernel that reads and does little else takes."""
    words = [cache.view(torch.int32) for cache in ((t.k,) if case.headdim == LATENT else (t.k, t.v))]
    return lambda: torch.stack([cache.amax() for cache in words])


class Known(NamedTuple):
    """A peer: what stands over its column, where it runs, what makes its call, and whether its cache is `NARROW`."""

    title: str
    devices: tuple[str, ...]
    prepare: Callable[[Case, Tensors], Call]
    narrow: bool = False


READ = "read"
EVERYWHERE = ("cpu", "cuda")
PEERS: dict[str, Known] = {
    "sdpa": Known("SDPA", EVERYWHERE, _sdpa),
    "sdpa_cudnn": Known("SDPA cuDNN", ("cuda",), _sdpa_cudnn),
    "fa3": Known("FlashAttention-3", ("cuda",), _fa3),
    "flashtile_paged": Known(f"flashtile, pages of {PAGE}", EVERYWHERE, _flashtile_paged),
    "flashtile_fp8": Known("flashtile, FP8 cache", EVERYWHERE, _flashtile_narrow, narrow=True),
    "flashtile": Known("flashtile", EVERYWHERE, _flashtile),
    READ: Known("plain read", EVERYWHERE, _read),
}


def cases(device: str, dtype: str, heads: int, heads_kv: int, headdim: int, longest: int) -> Iterator[Case]:
    """On a GPU those of `CELLS` and `HEADS`; elsewhere a few sequences as long as the settings say."""
    if torch.device(device).type == "cuda":
        for heads, heads_kv in HEADS:
            for batch, seqlen in CELLS:
                yield Case(f"batch {batch}", batch, seqlen, heads, heads_kv, 128, "bfloat16", device)
        for heads in LATENT_HEADS:
            for batch, seqlen in LATENT_CELLS:
                yield Case(f"latent, batch {batch}", batch, seqlen, heads, 1, LATENT, "bfloat16", device)
        return
    rows = max(PAGE, longest // PAGE * PAGE)
    for batch in (1, 4):
        yield Case(f"batch {batch}", batch, rows, heads, heads_kv, headdim, dtype, device)


def bytes_read(case: Case, narrow: bool = False) -> int:
    """Of keys and values, each once; latent values are part of the keys."""
    columns = LATENT if case.headdim == LATENT else 2 * case.headdim
    return case.batch * case.seqlen * case.heads_kv * columns * (1 if narrow else case.torch_dtype.itemsize)


def rows(case: Case, effort: Effort, chosen: tuple[str, ...] | None, note: Callable[[str], None]) -> Iterator[Row]:
    """Gate, then interleaved rounds of all that pass it."""
    note(f"{case}: inputs and float64 reference")
    made = tensors(case)
    truths = [_truth(case, made, narrow) for narrow in (False, True)]
    bounds: dict[str, Bound] = {}
    figures: dict[str, dict[str, Any]] = {}
    for name in PEERS if chosen is None else (name for name in chosen if name in PEERS):
        note(f"{case}: gate of {name}")
        try:
            bounds[name], figures[name] = _gated(name, case, made, *truths[PEERS[name].narrow])
        except Refused as refusal:
            yield records.row(case, name, "refused", str(refusal), **{"pass": PASS})
        except Exception as error:  # one peer's crash must not take the others' figures with it
            reason = f"{type(error).__name__}: {error}"[:500]
            yield records.row(case, name, "failed", reason, **{"pass": PASS})
        else:
            gate = figures[name]["gate"]
            if not gate["passed"]:
                del bounds[name]
                reason = f"error {gate['error']:.2e}, allowed {gate['allowed']:.2e}"
                yield records.row(case, name, "wrong", reason, **{"pass": PASS}, gate=gate)
    samples = timing.interleave(bounds, case.device, effort, lambda text: note(f"{case}: {text}"))
    for name in bounds:
        ms = timing.summary(samples[name].forward)
        speed = bytes_read(case, PEERS[name].narrow) / ms["median"] / 1e6
        yield records.row(case, name, **{"pass": PASS}, ms=ms, gb_per_s=speed, **figures[name])


def _gated(name: str, case: Case, made: Tensors, truth: Tensor, allowed: float) -> tuple[Bound, dict[str, Any]]:
    """A peer ready to run, and what is known of it: its error on the last sequence and key head, whether it is a graph.

    Raises:
        Refused: it cannot take the case.
    """
    known = PEERS[name]
    if torch.device(case.device).type not in known.devices:
        raise Refused(f"it does not run on {case.device}")
    call = known.prepare(case, made)
    out = call()
    error = 0.0 if name == READ else float((out[-1:, :, -case.group :].double() - truth).abs().max())
    graph = _captured(call) if torch.device(case.device).type == "cuda" else None
    run = graph or call
    peer = Peer(name, known.title, lambda case: lambda q, k, v: run(), "bshd", known.devices, 0.0, trains=False)
    bound = Bound(peer, peer.prepare(case), made.q, made.k, made.v, made.q)
    return bound, {"gate": {"passed": error <= allowed, "error": error, "allowed": allowed}, "graph": graph is not None}


def _captured(call: Call) -> Callable[[], Any] | None:
    """The call as a CUDA graph; None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None

    def replay(kept: tuple[Tensor, Call] = (kept, call)) -> None:
        # What the graph writes, and what the call holds for it to read, lives as long as it is replayed.
        graph.replay()

    return replay


def _truth(case: Case, made: Tensors, narrow: bool) -> tuple[Tensor, float]:
    """The last sequence's last key head and its query heads by the formula in float64, over what the cache holds; and
    the error that is allowed: some times that of the formula in the inputs' own dtype."""
    k, v = (made.k_narrow, made.v_narrow) if narrow else (made.k, made.v)
    parts = made.q[-1:, :, -case.group :], *(cache[-1:, :, -1:].to(case.torch_dtype) for cache in (k, v))
    truth, formula = (reference.attention(*parts, dtype=dtype).out for dtype in (torch.float64, None))
    allowed = accuracy.SLACK * float((formula.double() - truth).abs().max())
    return truth, allowed + torch.finfo(case.torch_dtype).eps * float(truth.abs().max())
