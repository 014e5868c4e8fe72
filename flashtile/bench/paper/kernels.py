"""Rows of attention alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flashtile
from flashtile.bench import cases, eight, peers, suite
from flashtile.bench.cases import Case
from flashtile.bench.paper.experiment import Call, Figures, Note, Pair, Row, Setting, Wrong, name_of, peaks, timed
from flashtile.bench.timing import Effort

ALONE = "attention alone"


def _case(feature: str, batch: int, seqlen: int, heads: int, headdim: int, setting: Setting) -> Case:
    dtype = name_of(setting.dtype)
    if setting.quick:
        batch, seqlen, heads, headdim = 1, 160, 2, 16
    return Case(feature, batch, seqlen, heads, heads, headdim, dtype, setting.device)


def _variants(case: Case, training: bool, theirs: Any, options: dict[str, Any] | None = None) -> Pair:
    """`theirs(q, k, v)` takes heads before the sequence, as views; ours the library's layout and the case's options."""
    inputs = cases.tensors(case)
    options = cases.options(case) if options is None else options
    leaves = [tensor.requires_grad_(training) for tensor in inputs[:3]]

    def variant(forward: Any) -> Call:
        def call() -> Tensor:
            out: Tensor = forward()
            if not training:
                return out
            return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(out, leaves, inputs.grad)])

        return call

    def baseline() -> Tensor:
        found: Tensor = theirs(*(leaf.transpose(1, 2) for leaf in leaves)).transpose(1, 2)
        return found

    return Pair(variant(baseline), variant(lambda: flashtile.attention(*leaves, **options)))


def _flash(case: Case) -> Any:
    """PyTorch's FlashAttention-2 on a GPU, its own choice on the CPU."""
    causal = "causal" in case.feature

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not q.is_cuda:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return call


def _over_flash(training: bool) -> Any:
    def measure(setting: Setting, note: Note) -> Figures:
        case = _case("causal", 2, 8192, 16, 128, setting)
        return timed(_variants(case, training, _flash(case)), setting, note)

    return measure


def _over_mask_tensor(feature: str, seqlen: int) -> Any:
    """PyTorch's attention with the mask as a tensor of all pairs."""

    def measure(setting: Setting, note: Note) -> Figures:
        case = _case(feature, 1, seqlen, 16, 128, setting)
        allowed = cases.allowed(case)

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

        found = timed(_variants(case, True, dense), setting, note)
        return found._replace(details={**found.details, "share_of_pairs": cases.pairs(case) / case.seqlen**2})

    return measure


def _prefix(setting: Setting, note: Note) -> Figures:
    """Causal but for a prefix that all see, a quarter of the tokens, over the mask as a tensor."""
    case = _case("causal", 1, 16384, 16, 128, setting)
    length = case.seqlen // 4
    index = torch.arange(case.seqlen, device=case.device)
    allowed = (index[None, :] <= index[:, None]) | (index < length)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)

    mask = flashtile.masks.causal() | flashtile.masks.prefix(length)
    return timed(_variants(case, True, dense, {"mask": mask}), setting, note)


def _documents_over_dense(seqlen: int) -> Any:
    """Document masks over causal attention across the documents' borders; results differ, so none are compared."""

    def measure(setting: Setting, note: Note) -> Figures:
        case = _case("causal document", 1, seqlen, 16, 128, setting)
        return timed(_variants(case, True, _flash(case))._replace(same=False), setting, note)

    return measure


def _over_flex(seqlen: int) -> Any:
    """FlexAttention, compiled, its block mask made before; on the CPU, where it does not train, a mask tensor."""

    def measure(setting: Setting, note: Note) -> Figures:
        case = _case("causal document", 1, seqlen, 16, 128, setting)
        note("compiling FlexAttention")
        flex = peers.PEERS["flex" if setting.cuda else "sdpa"].prepare(case)
        return timed(_variants(case, True, flex), setting, note)

    return measure


def _textbook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flashtile.bench import textbook

    return textbook.attention(q, k, v, causal=True)


def _memory(setting: Setting, note: Note) -> Figures:
    """Peak memory of forward and backward pass; the ratio is that at 4096 tokens, the details hold longer ones."""
    ours: dict[int, int] = {}
    theirs: dict[int, int] = {}
    pivot = setting.pick(4096, 160)
    for seqlen in setting.pick((1024, 2048, 4096, 8192, 16384, 32768, 65536), (160,)):
        note(f"{seqlen} tokens")
        case = _case("causal", 1, seqlen, 16, 64, setting)
        pair = _variants(case, True, _textbook)
        ours[seqlen] = peaks(pair._replace(baseline=pair.ours), setting)[1]
        if seqlen <= 2 * pivot:
            theirs[seqlen] = peaks(pair, setting)[0]
    details = {"peak_bytes": {"baseline": theirs, "ours": ours}}
    return Figures(theirs[pivot], ours[pivot], "bytes", theirs[pivot] / ours[pivot], None, details)


PETA = 1200.0
"""TFLOP/s that the FlashAttention-3 paper gives for 8-bit floats on an H100."""


def _eight_bits(setting: Setting, note: Note) -> Figures:
    """The benchmark's cell of head dimension 256 and 16k tokens, its gate included."""
    case = _case("plain", 1, 16384, 8, 256, setting)
    effort = Effort(seconds=setting.seconds)
    settings = suite.Settings(device=setting.device, dtypes=(case.dtype,), effort=effort)
    return eight_bits(list(suite.timed(case, settings, eight.PEERS, note)))


def eight_bits(rows: list[dict[str, Any]]) -> Figures:
    """The figures of that cell, from the suite's rows of it; details: everyone's rates."""
    found = {row["peer"]: row for row in rows if row["pass"] == "forward"}
    ours = found["flashtile_eight"]
    if ours["status"] != "ok":
        raise Wrong(ours["reason"])
    rates = {peer: row["gflops"] / 1e3 for peer, row in found.items() if row["status"] == "ok"}
    rate = rates["flashtile_eight"]
    return Figures(PETA, rate, "TFLOP/s", rate / PETA, None, {"rates": rates, "gate": ours["gate"]})


ROWS = (
    Row(
        "memory",
        "Peak memory of attention, forward and backward, 4k tokens",
        "linear, not quadratic: 20x less at 4k",
        20.0,
        "the textbook formula in PyTorch",
        ALONE,
        _memory,
        rehearsed=False,
    ),
    Row(
        "fa2-forward",
        "Over FlashAttention-2, causal, 8k tokens, head dimension 128, forward",
        "1.5x to 2x (FlashAttention-3)",
        1.5,
        "PyTorch's FlashAttention-2",
        ALONE,
        _over_flash(False),
        rehearsed=False,
    ),
    Row(
        "fa2-training",
        "Over FlashAttention-2, causal, 8k tokens, head dimension 128, forward and backward",
        "1.5x to 1.75x (FlashAttention-3)",
        1.5,
        "PyTorch's FlashAttention-2",
        ALONE,
        _over_flash(True),
    ),
    Row(
        "fp8",
        "8-bit floats, 16k tokens, head dimension 256, forward",
        "1.2 PFLOP/s (FlashAttention-3)",
        1.0,
        "the figure claimed",
        "attention alone, a scale for each head as in the claim's program, inputs rounded before",
        _eight_bits,
    ),
    Row(
        "masks-blocks",
        "A random block mask, 1/16 of the blocks, 16k tokens, forward and backward",
        "up to 9x (partially filled masks)",
        9.0,
        "PyTorch's attention with a mask tensor",
        ALONE,
        _over_mask_tensor("blocks 1/16", 16384),
    ),
    Row(
        "masks-documents",
        "A document mask, 16k tokens, forward and backward",
        "up to 9x (partially filled masks)",
        9.0,
        "PyTorch's attention with a mask tensor",
        ALONE,
        _over_mask_tensor("causal document", 16384),
    ),
    Row(
        "masks-prefix",
        "Causal with a prefix of 4k that all see, 16k tokens, forward and backward",
        "up to 9x (partially filled masks)",
        9.0,
        "PyTorch's attention with a mask tensor",
        "attention alone; over half of the pairs attend, so that little more than 2x can come from what is skipped",
        _prefix,
    ),
    *(
        Row(
            f"documents-{seqlen // 1024}k",
            f"Causal document masks at {seqlen // 1024}k tokens, forward and backward",
            "document masks at long context (Kvax)",
            None,
            "PyTorch's FlashAttention-2, causal over everything",
            "attention alone; the baseline ignores documents, which is what one does without such masks",
            _documents_over_dense(seqlen),
            rehearsed=seqlen == 32768,
        )
        for seqlen in (32768, 131072)
    ),
    *(
        Row(
            name,
            f"Causal document masks at {seqlen // 1024}k tokens over FlexAttention, forward and backward",
            "document masks at long context (Kvax)",
            None,
            "FlexAttention, compiled, its block mask made before",
            ALONE,
            _over_flex(seqlen),
            rehearsed=seqlen == 32768,
        )
        for name, seqlen in (("documents-flex", 32768), ("documents-flex-128k", 131072))
    ),
)
