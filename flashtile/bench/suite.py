"""The suites: which cases are put to which peers, and what is recorded. One function a suite, registered by name."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flashtile.bench import accuracy, cases, decode, eight, machine, memory, records, subject, timing
from flashtile.bench.cases import Case
from flashtile.bench.peers import FORWARD_ALONE, FUSED, PEERS, Bound, Peer, Refused
from flashtile.bench.records import Record, Row
from flashtile.bench.timing import Effort

Note = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What a user may choose; `peers` None: those that the suite names."""

    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32",)
    batch: int = 1
    heads: int = 8
    heads_kv: int = 8
    headdim: int = 64
    seqlens: tuple[int, ...] = (1024, 2048, 4096, 8192)
    peers: tuple[str, ...] | None = None
    error_seqlen: int = 768
    effort: Effort = field(default_factory=Effort)

    @property
    def longest(self) -> int:
        return max(self.seqlens)

    def case(self, feature: str, seqlen: int, dtype: str) -> Case:
        return Case(feature, self.batch, seqlen, self.heads, self.heads_kv, self.headdim, dtype, self.device)

    def quick(self) -> "Settings":
        """The same in seconds: too short for figures that mean anything, long enough to see that all works."""
        effort = Effort(seconds=0.2, least=2, most=3)
        return replace(self, seqlens=(256, 512), error_seqlen=160, heads=2, heads_kv=2, headdim=32, effort=effort)


@dataclass(frozen=True)
class Suite:
    """`run` yields the rows; `title` says what they are; `devices`: where it runs unless asked for by name."""

    name: str
    title: str
    kind: str
    run: Callable[[Settings, Note], Iterator[Row]]
    devices: tuple[str, ...]


SUITES: dict[str, Suite] = {}

Runner = Callable[[Settings, Note], Iterator[Row]]


def suite(name: str, title: str, kind: str, devices: tuple[str, ...] = ("cpu", "cuda")) -> Callable[[Runner], Runner]:
    """Registers a suite; its rows are of the kind "time", "bandwidth", "memory" or "error"."""

    def register(run: Runner) -> Runner:
        SUITES[name] = Suite(name, title, kind, run, devices)
        return run

    return register


def usual(device: str) -> list[str]:
    """The suites that run on a device where none is named."""
    return [name for name, found in SUITES.items() if device.split(":")[0] in found.devices]


def run(name: str, settings: Settings, folder: Path, note: Note = lambda text: None) -> tuple[Record, Path]:
    """Runs one suite and writes its record; returns both."""
    start = time.monotonic()
    rows = list(SUITES[name].run(settings, lambda text: note(f"{name}: {text}")))
    record = {
        "schema": records.SCHEMA,
        "suite": name,
        "title": SUITES[name].title,
        "kind": SUITES[name].kind,
        "machine": machine.describe(settings.device),
        "settings": {
            **asdict(settings),
            "slack": accuracy.SLACK,
            "roundings": accuracy.ROUNDINGS,
            "order": timing.ORDER,
        },
        "seconds": round(time.monotonic() - start, 1),
        "rows": rows,
    }
    return record, records.write(record, folder)


@suite("dense", "Plain and causal attention", "time")
def _dense(settings: Settings, note: Note) -> Iterator[Row]:
    for dtype in settings.dtypes:
        for feature in ("plain", "causal"):
            for seqlen in settings.seqlens:
                case = settings.case(feature, seqlen, dtype)
                yield from timed(case, settings, ("sdpa", "textbook", "flashtile"), note)


@suite("masks", "Window and document masks", "time")
def _masks(settings: Settings, note: Note) -> Iterator[Row]:
    for dtype in settings.dtypes:
        for feature in ("window", "document", "causal document"):
            yield from timed(settings.case(feature, settings.longest, dtype), settings, ("sdpa", "flashtile"), note)


TOKENS, HIDDEN = 16384, 2048
"""Tokens of a batch and width of all heads, the grid of the FlashAttention-3 paper."""


@suite("grid", "16k tokens, hidden dimension 2048", "time", devices=("cuda",))
def _grid(settings: Settings, note: Note) -> Iterator[Row]:
    yield from _cells(settings, note, (1024, 4096, 16384), FUSED)


@suite("lengths", "16k tokens, hidden dimension 2048, the lengths between", "time", devices=("cuda",))
def _lengths(settings: Settings, note: Note) -> Iterator[Row]:
    yield from _cells(settings, note, (512, 2048, 8192), FUSED)


@suite("portable", "16k tokens, hidden dimension 2048, the portable backend", "time", devices=("cuda",))
def _portable(settings: Settings, note: Note) -> Iterator[Row]:
    yield from _cells(settings, note, (4096, 16384), ("sdpa_flash", "flashtile_portable"))


@suite("fp8", "8-bit floats, 16k tokens, hidden dimension 2048", "time", devices=("cuda",))
def _fp8(settings: Settings, note: Note) -> Iterator[Row]:
    yield from _cells(settings, note, (1024, 2048, 4096, 8192, 16384), eight.PEERS)


@suite("fp8_error", "Error of 8-bit floats where some inputs are far larger than others", "error", devices=("cuda",))
def _fp8_error(settings: Settings, note: Note) -> Iterator[Row]:
    for headdim in (64, 128):
        yield from eight.accuracy_rows(eight.cell(settings.error_seqlen, headdim, "plain", settings.device), note)


def _cells(settings: Settings, note: Note, seqlens: Sequence[int], names: tuple[str, ...]) -> Iterator[Row]:
    for headdim in (64, 128, 256):
        for feature in ("plain", "causal"):
            for seqlen in seqlens:
                heads = HIDDEN // headdim
                case = Case(feature, TOKENS // seqlen, seqlen, heads, heads, headdim, "bfloat16", settings.device)
                yield from timed(case, settings, names, note)


@suite(
    "grid_error",
    "Error against float64 beside other fused kernels, inputs normal and with outliers",
    "error",
    ("cuda",),
)
def _grid_error(settings: Settings, note: Note) -> Iterator[Row]:
    for headdim in (64, 128, 256):
        for feature in ("plain", "causal"):
            for inputs in ("normal", "outliers"):
                case = Case(feature, 1, settings.error_seqlen, 4, 4, headdim, "bfloat16", settings.device, inputs)
                yield from _errors(case, settings, FUSED, note)


@suite("shapes", "Grouped heads, wide keys, and a window in a long sequence", "time", devices=("cuda",))
def _shapes(settings: Settings, note: Note) -> Iterator[Row]:
    for seqlen in (2048, 8192):
        case = Case("causal", TOKENS // seqlen, seqlen, 32, 8, 128, "bfloat16", settings.device)
        yield from timed(case, settings, FUSED, note)
        case = Case("causal", TOKENS // seqlen, seqlen, 16, 16, 192, "bfloat16", settings.device, headdim_v=128)
        yield from timed(case, settings, FUSED, note)
    case = Case("window 1024", 1, TOKENS, 16, 16, 128, "bfloat16", settings.device)
    yield from timed(case, settings, ("flex", "fa3", "fa4", "flashtile"), note)


@suite("functions", "Masks and score functions beside compiled FlexAttention", "time", devices=("cuda",))
def _functions(settings: Settings, note: Note) -> Iterator[Row]:
    for feature in ("causal", "window", "document", "causal document", "alibi", "softcap", "causal document softcap"):
        case = Case(feature, 2, 8192, 16, 16, 128, "bfloat16", settings.device)
        yield from timed(case, settings, ("flex", "flashtile_functions", "flashtile"), note)


@suite("packed", "Packed sequences of long-tailed lengths", "time", devices=("cuda",))
def _packed(settings: Settings, note: Note) -> Iterator[Row]:
    for headdim in (64, 128):
        for seqlen in (8192, 32768):
            heads = HIDDEN // headdim
            case = Case("packed causal", 1, seqlen, heads, heads, headdim, "bfloat16", settings.device)
            yield from timed(case, settings, ("sdpa_padded", "fa3", "fa4", "flashtile"), note)


@suite("sparsity", "Time against the share of the keys that a mask leaves", "time", devices=("cuda",))
def _sparsity(settings: Settings, note: Note) -> Iterator[Row]:
    for feature in cases.SPARSE:
        case = Case(feature, 1, 16384, 16, 16, 128, "bfloat16", settings.device)
        yield from timed(case, settings, ("flashtile",), note)


@suite("decode", "One query a sequence over a KV cache", "bandwidth", devices=("cuda",))
def _decode(settings: Settings, note: Note) -> Iterator[Row]:
    sizes = (settings.heads, settings.heads_kv, settings.headdim, settings.longest)
    for case in decode.cases(settings.device, settings.dtypes[0], *sizes):
        yield from decode.rows(case, settings.effort, settings.peers, note)


@suite("memory", "Extra memory of a call", "memory")
def _memory(settings: Settings, note: Note) -> Iterator[Row]:
    case = settings.case("causal", settings.longest, settings.dtypes[0])
    for which in subject.PASSES:
        for peer in _chosen(settings, ("textbook", "sdpa", "flashtile")):
            note(f"{case} {which}: {peer.name}")
            yield _memory_row(case, peer, which)


@suite("error", "Error against float64", "error")
def _error(settings: Settings, note: Note) -> Iterator[Row]:
    few = replace(settings, heads=min(settings.heads, 4), heads_kv=min(settings.heads_kv, 4))
    for dtype in ("float32", "bfloat16", "float16"):
        for feature in (name for name, found in cases.FEATURES.items() if found.common):
            case = few.case(feature, settings.error_seqlen, dtype)
            yield from _errors(case, settings, ("flashtile", "sdpa", "sdpa_math"), note)


def _chosen(settings: Settings, names: tuple[str, ...]) -> list[Peer]:
    """Those that a user or the suite names; the suite `decode` has its own."""
    return [PEERS[name] for name in settings.peers or names if name in PEERS]


def _too_big(case: Case, peer: Peer) -> str | None:
    """Why the peer's score matrices do not fit, or None; a fifth of what is free is left alone."""
    needed, free = peer.matrix_memory(case), machine.free_memory(case.device)
    if needed <= 0.8 * free:
        return None
    return f"would need {memory.gib(needed)}, {memory.gib(free)} are free"


def timed(case: Case, settings: Settings, names: tuple[str, ...], note: Note) -> Iterator[Row]:
    """Rows of a case: gate, then interleaved rounds of all that pass it."""
    note(f"{case}: float64 reference")
    inputs = cases.tensors(case)
    truth = accuracy.truth(case, inputs)
    chosen = _chosen(settings, names)
    coarse = eight.coarse(truth, inputs) if any(peer.eight for peer in chosen) else truth
    bounds: dict[str, Bound] = {}
    gates: dict[str, Any] = {}
    known: dict[str, float] = {}
    for peer in chosen:
        note(f"{case}: gate of {peer.name}")
        status, reason = "ok", ""
        try:
            big = _too_big(case, peer)
            if big is not None:
                status, reason = "too big", big
            else:
                bound = peer.bind(case, inputs)
                begin = timing.clock(case.device)
                status, reason, gates[peer.name] = _gate(coarse if peer.eight else truth, bound)
                known[peer.name] = timing.clock(case.device) - begin
        except Refused as refusal:
            status, reason = "refused", str(refusal)
        except Exception as error:  # one peer's crash must not take the others' figures with it
            status, reason = "failed", f"{type(error).__name__}: {error}"[:500]
        missing: tuple[str, ...] = timing.PASSES
        if status == "ok":
            bounds[peer.name] = bound
            missing = () if peer.trains else ("backward",)
            status, reason = "refused", FORWARD_ALONE
        for which in missing:
            yield records.row(case, peer.name, status, reason, **{"pass": which}, gate=gates.get(peer.name))
    del truth, coarse
    samples = timing.interleave(bounds, case.device, settings.effort, lambda text: note(f"{case}: {text}"), known)
    for name in bounds:
        for which in timing.PASSES:
            if not samples[name].of(which):
                continue
            ms = timing.summary(samples[name].of(which))
            gflops = cases.flops(case, which == "backward") / ms["median"] / 1e6
            waits: dict[str, Any] = {"host_us": samples[name].host_us(which), "first_call_s": known[name]}
            yield records.row(case, name, **{"pass": which}, ms=ms, gflops=gflops, gate=gates[name], **waits)


def _gate(truth: accuracy.Truth, bound: Bound) -> tuple[str, str, dict[str, Any]]:
    """(status, reason, what was compared)."""
    errors = truth.errors(bound)
    failures = truth.failures(errors)
    compared = {name: {"error": errors[name].max, "allowed": truth.allowed(name).max} for name in errors}
    gate = {"passed": not failures, "heads_kv_compared": sorted(truth.results), **compared}
    return ("wrong" if failures else "ok"), "; ".join(failures), gate


def _memory_row(case: Case, peer: Peer, which: str) -> Row:
    big = _too_big(case, peer)
    if big is not None:
        return records.row(case, peer.name, "too big", big, **{"pass": which})
    found = subject.in_fresh_process(case, peer.name, which)
    status, reason = found.pop("status"), found.pop("reason")
    return records.row(case, peer.name, status, reason, **{"pass": which}, **found)


def _errors(case: Case, settings: Settings, names: tuple[str, ...], note: Note) -> Iterator[Row]:
    note(f"{case}")
    inputs = cases.tensors(case)
    truth = accuracy.truth(case, inputs)
    formula = {name: error._asdict() for name, error in truth.formula.items()}
    yield records.row(case, "formula", errors=formula)
    for peer in _chosen(settings, names):
        try:
            errors = truth.errors(peer.bind(case, inputs))
        except Refused as refusal:
            yield records.row(case, peer.name, "refused", str(refusal))
        except Exception as error:  # as where times are taken
            yield records.row(case, peer.name, "failed", f"{type(error).__name__}: {error}"[:500])
        else:
            passed = not truth.failures(errors)
            yield records.row(case, peer.name, errors={n: e._asdict() for n, e in errors.items()}, passed=passed)
