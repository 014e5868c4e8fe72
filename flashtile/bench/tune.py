"""`flashtile tune`: the search for tiles. No candidate is timed whose results are not right.

A row of `flashtile.tuning.portable` names tiles for each kernel. They are searched one after the other, on a call of
the row's kind, the other kernels keeping the tiles that they have; what is timed is the one kernel, not the call.
"""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashtile.autograd import wanted_of
from flashtile.backends.portable import configure, launch
from flashtile.bench import accuracy, cases, machine
from flashtile.bench.cases import Case
from flashtile.problem import describe
from flashtile.request import Arguments, build
from flashtile.tuning.portable import PortableConfig, Tiles

Note = Callable[[str], None]

KINDS = {
    "half": ("causal", "bfloat16"),
    "masked": ("causal document", "bfloat16"),
    "modified": ("causal document softcap", "bfloat16"),
    "single": ("causal", "float32"),
}
"""Kind of row -> (feature, dtype) of the call that its tiles are timed on."""

ROLES = {
    "forward": ("forward_kernel", "both"),
    "query": ("query_kernel", "both"),
    "key": ("key_kernel", "both"),
    "dk": ("key_kernel", "dk"),
    "dv": ("key_kernel", "dv"),
}
"""What is searched -> (kernel, `Meta.gives` of the launch)."""

REPEATS = 5
"""Launches in a row that are timed together, so that the host's part is hidden; and how often that is done."""


@dataclass(frozen=True)
class Tried:
    """What came of one candidate: milliseconds, or the reason why it has none."""

    tiles: Tiles
    ms: float | None
    reason: str = ""


def candidates(headdim: int, element_size: int, shared: int) -> Iterator[Tiles]:
    """Tiles worth a try: what is in flight fits into `shared` bytes, and every warp has a tile of its own."""
    for tile_q in (32, 64, 128):
        for tile_kv in (32, 64, 128):
            for stages in (2, 3, 4):
                if 2 * stages * min(tile_q, tile_kv) * headdim * element_size > shared:
                    continue
                for warps in (4, 8):
                    if max(tile_q, tile_kv) >= 16 * warps:
                        yield Tiles(tile_q, tile_kv, warps, stages)


def config_for(role: str, tiles: Tiles, base: PortableConfig) -> PortableConfig:
    """`base` with other tiles for one role."""
    if role in ("forward", "query"):
        return base._replace(**{role: tiles})
    if role == "key":
        return base._replace(key=tiles, value=None)
    value = base.value or base.key
    return base._replace(key=tiles, value=value) if role == "dk" else base._replace(value=tiles)


def tiles_of(role: str, config: PortableConfig) -> Tiles:
    """What `config_for` changes."""
    tiles: Tiles = getattr(config, {"dk": "key", "dv": "value"}.get(role, role)) or config.key
    return tiles


def nearest_first(tried: Iterable[Tiles], base: Tiles) -> list[Tiles]:
    """Those that differ least from the tiles that are in use, these first of all: by halvings and doublings. All are as
    `lean` as these."""

    def distance(tiles: Tiles) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(tiles[:4], base[:4], strict=True))

    alike = {base, *(tiles._replace(lean=base.lean) for tiles in tried)}
    return sorted(alike, key=lambda tiles: (distance(tiles), tiles))


def fastest(
    tried: Iterable[Tiles],
    gate: Callable[[Tiles], str],
    measure: Callable[[Tiles], float],
    note: Note,
    seconds: float | None = None,
) -> list[Tried]:
    """All candidates, or those that come about in so many seconds, one at least, the fastest right one first; `gate`
    says what is wrong, "" if nothing is."""
    found: list[Tried] = []
    begin = time.perf_counter()
    for tiles in tried:
        if found and seconds is not None and time.perf_counter() - begin > seconds:
            break
        note(str(tuple(tiles)))
        try:
            reason = gate(tiles)
            found.append(Tried(tiles, None if reason else measure(tiles), reason))
        except Exception as error:  # compilers and drivers refuse tiles in many ways
            found.append(Tried(tiles, None, f"{type(error).__name__}: {error}"[:200]))
    return sorted(found, key=lambda one: (one.ms is None, one.ms or 0.0))


class Call:
    """A forward and a backward pass of one case with tiles of choice."""

    def __init__(self, case: Case) -> None:
        self.case, self.tensors = case, cases.tensors(case)
        q, k, v = self.tensors[:3]
        self.inputs, options = build(q, k, v, Arguments(**cases.options(case)))
        self.problem = describe(self.inputs, options)
        self.back = describe(self.inputs, options, backward=True, wanted=wanted_of(self.inputs))

    def run(self, config: PortableConfig, at: launch.Machine | None = None) -> tuple[Tensor, ...]:
        """(out, dq, dk, dv)."""
        at = at or launch.Machine()
        out, lse = launch.forward(self.inputs, self.problem, config, at)
        grads = launch.backward(self.inputs, self.back, config, out, lse, self.tensors.grad, None, at)
        return out, grads.q, grads.k, grads.v

    def milliseconds(self, role: str, config: PortableConfig) -> float:
        """What the launch of one role takes, the median of some."""
        device = self.inputs.q.device
        spent: list[float] = []

        def timed(kernel: Any, programs: int, tiles: Tiles, arguments: Any, options: dict[str, Any]) -> Any:
            searched = (kernel.fn.__name__, options["META"].gives) == ROLES[role]
            begin = _clock(device)
            for _ in range(REPEATS if searched else 1):
                compiled = launch.on_device(kernel, programs, tiles, arguments, options)
            if searched:
                spent.append((_clock(device) - begin) / REPEATS)
            return compiled

        self.run(config)
        for _ in range(REPEATS):
            self.run(config, launch.Machine(timed))
        return 1e3 * statistics.median(spent)


def _clock(device: torch.device) -> float:
    """Seconds, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


INTERPRETED = 64 * 1024
"""Bytes of shared memory that an interpreted program is held to: the least that any GPU has."""


def _shared_memory(device: torch.device) -> int:
    """Bytes that a program may have."""
    if device.type != "cuda":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    plain = properties.shared_memory_per_block
    return int(getattr(properties, "shared_memory_per_block_optin", plain))


@dataclass(frozen=True)
class Search:
    """What is searched for: a row, by head dimension and kind, on a device.

    tokens, heads: of the call that is timed; the call that is compared with float64 is smaller. seconds: for the row,
    shared by its roles; None: until all was tried.
    """

    headdim: int
    kind: str
    device: str = "cuda"
    tokens: int = 8192
    heads: int = 16
    only: tuple[Tiles, ...] | None = None
    seconds: float | None = None

    def case(self, tokens: int, heads: int) -> Case:
        feature, dtype = KINDS[self.kind]
        return Case(feature, 1, tokens, heads, heads, self.headdim, dtype, self.device)

    def run(self, note: Note) -> dict[str, list[Tried]]:
        """By role, all candidates, the fastest first."""
        small, large = (Call(self.case(*size)) for size in ((min(self.tokens, 300), 2), (self.tokens, self.heads)))
        truth = accuracy.truth(small.case, small.tensors)
        base = configure(large.problem)
        tried = self.only or tuple(
            candidates(self.headdim, small.inputs.q.element_size(), _shared_memory(small.inputs.q.device))
        )

        def search(role: str) -> list[Tried]:
            def gate(tiles: Tiles) -> str:
                return "; ".join(truth.failures(truth.errors_of(small.run(config_for(role, tiles, base)))))

            def measure(tiles: Tiles) -> float:
                return large.milliseconds(role, config_for(role, tiles, base))

            ordered = self.only or nearest_first(tried, tiles_of(role, base))
            share = self.seconds and self.seconds / len(ROLES)
            return fastest(
                ordered, gate, measure, lambda text: note(f"{self.headdim} {self.kind} {role}: {text}"), share
            )

        return {role: search(role) for role in ROLES}


def best(found: dict[str, list[Tried]]) -> PortableConfig | None:
    """The row: the fastest of each role; dK and dV apart where that is faster. None: nothing was right."""
    first = {role: tried[0] for role, tried in found.items() if tried and tried[0].ms is not None}
    if set(first) != set(ROLES):
        return None
    ms = {role: tried.ms or 0.0 for role, tried in first.items()}
    apart = ms["dk"] + ms["dv"] < ms["key"]
    key, value = (first["dk"].tiles, first["dv"].tiles) if apart else (first["key"].tiles, None)
    return PortableConfig(first["forward"].tiles, first["query"].tiles, key, value)


def row(headdim: int, config: PortableConfig) -> str:
    """As it stands in `flashtile.tuning.portable`."""
    tiles = ", ".join(f"Tiles{part.chosen()}" for part in config if part is not None)
    return f"({headdim}, PortableConfig({tiles})),"


def write(search: Search, found: dict[str, list[Tried]], folder: Path) -> Path:
    """Writes all that was tried as JSON, beside the device's records."""
    path = folder / machine.slug(search.device) / "tuning" / f"{search.kind}-{search.headdim}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tried = {role: [asdict(one) | {"tiles": list(one.tiles)} for one in ones] for role, ones in found.items()}
    record = {"machine": machine.describe(search.device), "search": asdict(search), "tried": tried}
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
