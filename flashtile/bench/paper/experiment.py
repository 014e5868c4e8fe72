"""A row: what was claimed, by whom over what, and how to measure it here, with a gate before any figure."""

import gc
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flashtile.bench import machine, memory, records, timing

Note = Callable[[str], None]
Call = Callable[[], Tensor]

ALLOWED = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far ours may be from the baseline's result, in norm relative to it, whole models' rounding included."""

BURST = 0.03
"""Seconds of work between two looks at the clock, at least."""


@dataclass(frozen=True)
class Setting:
    """Where and how thoroughly; `quick`: toy sizes, to see that it works; `rehearsal`: for the kernels that this builds
    alone, so the batch is as small as can be."""

    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False
    seconds: float = 4.0
    rehearsal: bool = False

    def pick(self, full: Any, small: Any) -> Any:
        return small if self.quick else full

    def batch(self, full: int, small: int) -> int:
        """Of models, whose kernels are the same for any."""
        return 1 if self.rehearsal else int(self.pick(full, small))

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


def dumped(setting: Setting) -> str:
    """The setting as JSON."""
    return json.dumps({**asdict(setting), "dtype": name_of(setting.dtype)})


def loaded(text: str) -> Setting:
    """The setting that `dumped` wrote."""
    found = json.loads(text)
    return Setting(**{**found, "dtype": getattr(torch, found["dtype"])})


class Figures(NamedTuple):
    """What a row found. `ratio`: how many times better ours is; baseline and ours in `unit`.

    difference: of the two results, in norm, relative to the baseline's; None where there is nothing to compare.
    """

    baseline: float
    ours: float
    unit: str
    ratio: float
    difference: float | None
    details: dict[str, Any]


class Wrong(Exception):
    """The two variants do not compute the same; there is no figure."""


@dataclass(frozen=True)
class Row:
    """One claim. `claimed` None: it came without a ratio. `share`: what part attention plays in it, and what differs.

    needs: modules that must be installed. rehearsed: False where other rows build all of its kernels.
    """

    name: str
    title: str
    claim: str
    claimed: float | None
    baseline: str
    share: str
    measure: Callable[[Setting, Note], Figures]
    needs: tuple[str, ...] = ()
    rehearsed: bool = True


class Pair(NamedTuple):
    """Two ways of doing the same. `work`: what a call of each gets done, in one unit; `same`: results are comparable.

    probes: calls whose results are compared, where those of the timed calls say too little. without: the same with no
    attention in it but sums, which no attention can beat.
    """

    baseline: Call
    ours: Call
    work: tuple[float, float] = (1.0, 1.0)
    probes: tuple[Call, Call] | None = None
    same: bool = True
    without: Call | None = None


def timed(pair: Pair, setting: Setting, note: Note) -> Figures:
    """Milliseconds a call, medians of rounds in turns, and the ratio of work in a given time."""
    note("comparing results")
    difference = _gate(pair, setting) if pair.same else None
    calls = {"baseline": pair.baseline, "ours": pair.ours}
    repeats = {name: _repeats(call, setting) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + setting.seconds
    while len(samples["ours"]) < 3 or (time.perf_counter() < end and len(samples["ours"]) < 50):
        for name, call in calls.items():
            note(f"{name}: round {len(samples[name]) + 1}")
            samples[name].append(_burst(call, repeats[name], setting))
    baseline, ours = (timing.summary(samples[name])["median"] for name in ("baseline", "ours"))
    ratio = (baseline / pair.work[0]) / (ours / pair.work[1])
    details: dict[str, Any] = {"rounds": len(samples["ours"])}
    if pair.without is not None:
        note("without attention")
        rest = _alone(pair.without, setting)
        details |= {"without_attention_ms": rest, "ceiling": (baseline / pair.work[0]) / (rest / pair.work[1])}
    return Figures(baseline, ours, "ms", ratio, difference, details)


def with_busy(found: Figures, pair: Pair, setting: Setting, note: Note) -> Figures:
    """The figures with the share of a call's time in which the GPU runs kernels, of both; the host's time is the rest.

    Not for graphs, which the host does not hold up. Where the profiler sees no kernels, nothing is added.
    """
    if not setting.cuda or setting.rehearsal:
        return found
    note("profiling")
    calls = {"baseline": (pair.baseline, found.baseline), "ours": (pair.ours, found.ours)}
    busy = {name: round(_kernels(call) / ms, 3) for name, (call, ms) in calls.items()}
    return found._replace(details={**found.details, "gpu_busy": busy}) if all(busy.values()) else found


def _kernels(call: Call) -> float:
    """Milliseconds that a call's kernels take."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in trace.key_averages()) / 1e3


def _alone(call: Call, setting: Setting) -> float:
    """Milliseconds a call, the median of five rounds."""
    repeats = _repeats(call, setting)
    return float(timing.summary([_burst(call, repeats, setting) for _ in range(5)])["median"])


def no_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What stands for attention where its share is to be known: sums, so that every gradient is still there."""
    return query + key.mean(dim=-2, keepdim=True) + value.mean(dim=-2, keepdim=True)


def peaks(pair: Pair, setting: Setting) -> tuple[int, int]:
    """Bytes that the calls need at most beyond what is there before."""
    return memory.allocated_peak(pair.baseline, setting.device), memory.allocated_peak(pair.ours, setting.device)


def with_peaks(found: Figures, pair: Pair, setting: Setting) -> Figures:
    """The figures with the peak memory of both calls among their details."""
    baseline, ours = peaks(pair, setting)
    return found._replace(details={**found.details, "peak_bytes": {"baseline": baseline, "ours": ours}})


def captured(call: Call, setting: Setting) -> Call:
    """The call as a CUDA graph, which is replayed; on the CPU the call itself."""
    if not setting.cuda:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _gate(pair: Pair, setting: Setting) -> float:
    first, second = pair.probes or (pair.baseline, pair.ours)
    # A captured graph writes to one place each time.
    expected, found = first().float().clone(), second().float().clone()
    scale = expected.norm().item()
    difference = (found - expected).norm().item() / scale if scale else found.norm().item()
    if not difference <= ALLOWED[setting.dtype]:
        raise Wrong(f"results differ by {difference:.2g} in norm, allowed are {ALLOWED[setting.dtype]:.2g}")
    return difference


def _repeats(call: Call, setting: Setting) -> int:
    _burst(call, 1, setting)
    return max(1, round(BURST / _burst(call, 1, setting)))


def _burst(call: Call, repeats: int, setting: Setting) -> float:
    """Seconds a call."""
    begin = timing.clock(setting.device)
    for _ in range(repeats):
        call()
    return (timing.clock(setting.device) - begin) / repeats


def run(row: Row, setting: Setting, note: Note = lambda text: None) -> dict[str, Any]:
    """What the row is, its status ("ok", "absent", "wrong" or "failed"), and its figures if it is ok."""
    missing = [module for module in row.needs if importlib.util.find_spec(module) is None]
    if missing:
        return _entry(row, "absent", f"{' and '.join(missing)} not installed")
    begin = time.monotonic()
    try:
        measured = entry(row, row.measure(setting, note))
        return {**measured, "seconds": round(time.monotonic() - begin, 1)}
    except Wrong as error:
        return _entry(row, "wrong", str(error))
    except Exception as error:  # one row's crash must not take the others with it
        return failed(row, f"{type(error).__name__}: {error}")
    finally:
        # Models refer to themselves; the next row needs their memory.
        gc.collect()
        if setting.cuda:
            torch.cuda.empty_cache()


def entry(row: Row, figures: Figures) -> dict[str, Any]:
    """The entry of a row with these figures."""
    return {**_entry(row, "ok"), "figures": figures._asdict()}


def failed(row: Row, reason: str) -> dict[str, Any]:
    """The entry of a row that has no figures for this reason."""
    return _entry(row, "failed", reason[:500])


def not_run(row: Row) -> dict[str, Any]:
    """The entry of a row that a record does not hold."""
    return _entry(row, "not run", "the record has no figures of it")


def _entry(row: Row, status: str, reason: str = "") -> dict[str, Any]:
    said = {name: getattr(row, name) for name in ("name", "title", "claim", "claimed", "baseline", "share")}
    return {**said, "status": status, "reason": reason}


def record(
    entries: list[dict[str, Any]], setting: Setting, seconds: float, described: dict[str, Any]
) -> dict[str, Any]:
    """What is kept of a run; `described`: the machine, as `machine.describe` has it."""
    versions = {name: _version(name) for name in ("transformers", "diffusers")}
    settings = {"dtype": name_of(setting.dtype), "quick": setting.quick, "seconds": setting.seconds}
    return {
        "schema": records.SCHEMA,
        "suite": "paper",
        "machine": {**described, "versions": {**described["versions"], **versions}},
        "settings": settings,
        "seconds": round(seconds, 1),
        "rows": entries,
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def place(folder: Path, device: str) -> Path:
    """Where the record of a device lies: beside those of the suites, which are of another shape."""
    return folder / machine.slug(device) / "paper" / "rows.json"
