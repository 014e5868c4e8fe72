"""Attention with 8-bit inputs: who is measured, which errors pass, and the FlashAttention-3 paper's table of errors."""

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import flashtile
from flashtile import fp8, reference
from flashtile.bench import accuracy, cases, records, textbook
from flashtile.bench.accuracy import Error, Truth
from flashtile.bench.cases import Case, Tensors
from flashtile.bench.peers import Attend, Refused, peer
from flashtile.bench.records import Row
from flashtile.scaled import KEYS, rounded

PEERS = ("fa3_fp8", "flashtile", "flashtile_eight_whole", "flashtile_eight_blocks", "flashtile_eight")


def _once(make: Callable[[Tensor, Tensor, Tensor], Any]) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """`make`, called again only for other tensors: what a model that keeps 8-bit numbers has at hand."""
    known: dict[tuple[int, ...], Any] = {}

    def made(q: Tensor, k: Tensor, v: Tensor) -> Any:
        key = (q.data_ptr(), k.data_ptr(), v.data_ptr())
        if key not in known:
            known.clear()
            known[key] = make(q.detach(), k.detach(), v.detach())
        return known[key]

    return made


def _dense(case: Case) -> bool:
    """Whether it is causal."""
    if case.feature not in ("plain", "causal"):
        raise Refused(f"it is measured with no {case.feature}")
    return case.feature == "causal"


def _rounded_once(case: Case, granularity: str) -> Attend:
    causal = _dense(case)
    made = _once(functools.partial(fp8.quantize, granularity=granularity))
    return lambda q, k, v: flashtile.attention(*made(q, k, v), causal=causal)


@peer("flashtile_eight", title="flashtile FP8", trains=False, eight=True)
def _heads(case: Case) -> Attend:
    """A scale for each head, as the peer's; rounding is not timed."""
    return _rounded_once(case, "head")


@peer("flashtile_eight_blocks", title="flashtile FP8, blocks", trains=False, eight=True)
def _blocks(case: Case) -> Attend:
    return _rounded_once(case, "block")


@peer("flashtile_eight_whole", title="flashtile FP8, blocks, with rounding", trains=False, eight=True)
def _whole(case: Case) -> Attend:
    causal = _dense(case)
    return lambda q, k, v: flashtile.attention(*fp8.quantize(q.detach(), k.detach(), v.detach()), causal=causal)


@peer("fa3_fp8", title="FlashAttention-3 FP8", devices=("cuda",), trains=False, eight=True)
def _fa3(case: Case) -> Attend:
    """A scale for each head; rounding is not timed."""
    causal = _dense(case)
    try:
        attend = importlib.import_module("fa3_fwd_interface").flash_attn_func
    except ImportError as error:
        raise Refused("fa3_fwd_interface is not installed") from error
    if case.group > 1:
        raise Refused("its scales of queries are those of key heads")

    def make(*tensors: Tensor) -> Any:
        found = [rounded(tensor.float(), torch.float8_e4m3fn, "head", KEYS) for tensor in tensors]
        names = ("q_descale", "k_descale", "v_descale")
        return [data for data, _ in found], {name: scale[..., 0] for name, (_, scale) in zip(names, found, strict=True)}

    made = _once(make)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        data, scales = made(q, k, v)
        found = attend(*data, causal=causal, **scales)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out

    return call


def coarse(truth: Truth, inputs: Tensors) -> Truth:
    """The same results; the yardstick rounds inputs, with a scale for each head, and weights to e4m3."""
    case = truth.case
    found = {head: _formula(accuracy._heads(inputs[:3], head, case), case) for head in truth.results}
    pairs = ((found[head], results[0]) for head, results in truth.results.items())
    return replace(truth, formula={"out": accuracy._error(pairs)})


def _formula(tensors: tuple[Tensor, ...], case: Case) -> Tensor:
    """(batch, seqlen, 1, headdim) of heads that are rounded; matrices of one batch entry at a time."""
    quantized = fp8.quantize(tensors[0], tensors[1], tensors[2], "head", False)
    q, k, v = (part.dequantize(torch.float32).transpose(1, 2) for part in quantized)
    outs = []
    for i in range(case.batch):
        scores = q[i] @ k[i].mT * case.headdim**-0.5
        if case.feature == "causal":
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        low = (weights * 256.0).to(torch.float8_e4m3fn).float() / 256.0
        outs.append((low @ v[i]) / weights.sum(-1, keepdim=True))
    return torch.stack(outs).transpose(1, 2)


def outliers(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, float16, some of them far larger than others."""
    generator = torch.Generator().manual_seed(case.seqlen)
    shape = (case.batch, case.seqlen, case.heads, case.headdim)
    q, k, v = (cases.with_outliers(shape, generator).to(case.device, torch.float16) for _ in range(3))
    return q, k, v


def accuracy_rows(case: Case, note: Callable[[str], None]) -> Iterator[Row]:
    """The paper's table 3: each way of computing attention of the same float16 inputs, against float64."""
    q, k, v = outliers(case)
    note(f"{case}: float64")
    truth = reference.attention(q, k, v).out
    for name, compute in _WAYS.items():
        note(f"{case}: {name}")
        error: Error = accuracy._error([(compute(q, k, v), truth)])
        yield records.row(case, name, errors={"out": error._asdict()})


def _eight(granularity: str, incoherent: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flashtile.attention(*fp8.quantize(q, k, v, granularity, incoherent))
        return out

    return compute


def _standard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every intermediate result in float16."""
    return textbook.attention(*(tensor.transpose(1, 2) for tensor in (q, k, v))).transpose(1, 2)


def _baseline(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The paper's baseline: one scale a tensor, intermediate results in float16."""
    parts = fp8.quantize(q, k, v, "tensor", False)
    return _standard(*(part.dequantize(torch.float16) for part in parts))


_WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "float16, standard": _standard,
    "float16, flashtile": flashtile.attention,
    "FP8, standard, one scale a tensor": _baseline,
    "FP8, flashtile, one scale a tensor": _eight("tensor", False),
    "FP8, flashtile, blocks": _eight("block", False),
    "FP8, flashtile, one scale a tensor, incoherent": _eight("tensor", True),
    "FP8, flashtile, blocks, incoherent": _eight("block", True),
}


def cell(seqlen: int, headdim: int, feature: str, device: str) -> Case:
    """Of the accuracy table."""
    return Case(feature, 1, seqlen, 4, 4, headdim, "float16", device)
