"""What compute-sanitizer says of the kernels: its findings by kind, and those that are explained."""

import ast
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Explained(NamedTuple):
    """Findings of a `tool` in `kernels` all of whose places lie in `functions`, and why they are none.

    counted: there may be as many of them as the calls say that the copy engine stored pieces of outputs.
    """

    tool: str
    kernels: frozenset[str]
    functions: frozenset[str]
    why: str
    counted: bool = False


EXPLAINED = (
    Explained(
        "racecheck",
        frozenset({"forward_kernel", "query_kernel"}),
        frozenset({"hopper/schedule.write", "hopper/schedule.read"}),
        "one warp writes, then bar.warp.sync, then a lane arrives at an mbarrier that all readers wait for; they read, "
        "then bar.sync, then a thread arrives at the mbarrier that the writer waits for",
    ),
    Explained(
        "racecheck",
        frozenset({"backward_kernel"}),
        frozenset({"hopper/steps.value_step", "hopper/steps.key_step"}),
        "one warpgroup writes, then bar.sync, then a thread arrives at the mbarrier that all of the other wait for; "
        "they read, then bar.sync, then a thread arrives at the mbarrier that the writers wait for; each half has two "
        "mbarriers of its own",
    ),
    Explained(
        "racecheck",
        frozenset({"backward_kernel"}),
        frozenset({"hopper/backward.loader", "hopper/steps.step", "hopper/steps.value_step", "hopper/steps.key_step"}),
        "one warp writes, then bar.warp.sync, then a lane arrives at the slot's mbarrier that all readers wait for; "
        "they read and come to the slot's named barrier (bar.arrive), at which the writer waits (bar.sync)",
    ),
    Explained(
        "racecheck",
        frozenset({"latent_kernel"}),
        frozenset({"hopper/latent.hand_over", "hopper/latent.rescaled"}),
        "one warpgroup writes, then bar.sync, then a thread arrives at the mbarrier that all of the others wait for; "
        "they read, multiply, then bar.sync, then a thread of each arrives at the mbarrier that the writers wait for "
        "in the step after, before they write the same place in the next",
    ),
    Explained(
        "racecheck",
        frozenset({"forward_kernel"}),
        frozenset({"hopper/forward.specialize", "hopper/forward.forward_kernel"}),
        "Triton's own: which role a warp takes is written before a barrier.sync of all threads, read after it, and "
        "written again after another two",
    ),
    Explained(
        "racecheck",
        frozenset({"backward_kernel"}),
        frozenset({"hopper/backward.specialize", "hopper/backward.backward_kernel"}),
        "as forward.specialize",
    ),
    Explained(
        "racecheck",
        frozenset({"backward_kernel"}),
        frozenset({"hopper/backward.specialize", "hopper/backward.backward_kernel", "hopper/schedule.write"}),
        "as forward.specialize; schedule.write is no store of this kernel, its line must be another kernel's",
    ),
    Explained(
        "initcheck",
        frozenset({"combine_kernel"}),
        frozenset({"joining.some_parts"}),
        "of rows that saw no key of a part the output is not written, but read with all others, and not used",
    ),
    Explained(
        "initcheck",
        frozenset({"before_kernel"}),
        frozenset({"tiles.load_rows"}),
        "the output, which the copy engine stored, unseen by the tool: no more reads than outputs have pieces of 16 "
        "bytes",
        counted=True,
    ),
)
"""`tests/emulated/test_handing.py` holds what is compiled to these words."""


class Kind(NamedTuple):
    """What was found, in the tool's words, in which kernel ("": one of PyTorch's), and at which places, as often as it
    may be."""

    what: str
    kernel: str
    places: frozenset[str]

    def __str__(self) -> str:
        where = f" in {self.kernel}" if self.kernel else ""
        return f"{self.what}{where}: {', '.join(sorted(self.places)) or 'nowhere that has a line'}"


class Found(NamedTuple):
    """times: as told; explained: how many of them `why` accounts for, all, some or none."""

    kind: Kind
    times: int
    explained: int
    why: str


class Report(NamedTuple):
    """What a tool said. total: findings, told or not."""

    total: int
    found: list[Found]

    @property
    def told(self) -> int:
        return sum(each.times for each in self.found)

    @property
    def unexplained(self) -> int:
        """What was not told is not explained."""
        return max(self.total, self.told) - sum(each.explained for each in self.found)


_TOTAL = re.compile(r"ERROR SUMMARY: (\d+) errors?$|RACECHECK SUMMARY: (\d+) hazard", re.MULTILINE)
_STORED = re.compile(r"^CALL .*, (\d+) pieces stored by the copy engine$", re.MULTILINE)


def report(tool: str, said: str) -> Report:
    total = sum(int(one or other) for one, other in _TOTAL.findall(said))
    stored = sum(map(int, _STORED.findall(said)))
    return Report(total, [_found(tool, kind, count, stored) for kind, count in kinds(said).most_common()])


def _found(tool: str, kind: Kind, count: int, stored: int) -> Found:
    explained = _explained(tool, kind)
    if explained is None:
        return Found(kind, count, 0, "")
    return Found(kind, count, min(count, stored) if explained.counted else count, explained.why)


_FINDING = re.compile(r"========= (?:Error: |Warning: )?(\S.*)")
_DETAIL = re.compile(r"=========\s+((?:at|and) .*)")
_FRAME = re.compile(r"COMPUTE-SANITIZER|\w+ SUMMARY|Target application|This tool|Saved host|=")
"""What the tool says of itself."""
_PLACE = re.compile(r"([\w./-]+\.py):(\d+)")
_KERNEL = re.compile(r"\bat (\w+)\+0x")
_ACCESS = re.compile(r"(Read|Write) access")


def kinds(said: str) -> Counter[Kind]:
    """Findings of the same words, kernel and places, counted."""
    found: list[tuple[str, list[str]]] = []
    for line in said.splitlines():
        opening, detail = _FINDING.match(line), _DETAIL.match(line)
        if opening and not _FRAME.match(opening.group(1)):
            text = opening.group(1)
            found.append((_words(text), [text] if " at " in text else []))
        elif detail and found:
            found[-1][1].append(detail.group(1))
    return Counter(_kind(what, lines) for what, lines in found)


def _kind(what: str, lines: list[str]) -> Kind:
    kernels = _KERNEL.findall("\n".join(lines))
    places = frozenset(place for text in lines for place in _places(text))
    return Kind(what, kernels[0] if kernels else "", places)


def _words(text: str) -> str:
    """The first words of a finding, up to where it was, without addresses."""
    return re.sub(r" (?:between|at) .*|0x[0-9a-f]+", "", text)


def _places(text: str) -> list[str]:
    """What a line of a finding names: functions of the package, with the kind of access, or a foreign kernel."""
    access = _ACCESS.search(text)
    before = f"{access.group(1).lower()} in " if access else ""
    lines = _PLACE.findall(text)
    if lines:
        return [before + "|".join(functions_at(Path(name).name, int(number))) for name, number in lines]
    foreign = re.match(r"at (?:0x[0-9a-f]+ in )?(?:\S*:\d+:)?([\w:~ ]+)", text)
    return [before + foreign.group(1).strip()] if foreign else []


@lru_cache
def functions_at(name: str, line: int) -> tuple[str, ...]:
    """The functions of the package that such a line may lie in, by their files' folders: names of files come alone."""
    found = []
    for path in sorted((ROOT / "flashtile").rglob(name)):
        folder = path.parent.name
        module = path.stem if folder in ("kernels", "flashtile") else f"{folder}/{path.stem}"
        for node in ast.parse(path.read_text()).body:
            decorators = getattr(node, "decorator_list", [])
            begin = min([one.lineno for one in decorators], default=getattr(node, "lineno", 0))
            if isinstance(node, ast.FunctionDef) and begin <= line <= (node.end_lineno or 0):
                found.append(f"{module}.{node.name}")
    return tuple(found) or (f"{name}:{line}",)


def _explained(tool: str, kind: Kind) -> Explained | None:
    """What explains a kind, if anything does. Where a line may be of two files, either will do."""
    choices = [set(place.rpartition(" ")[2].split("|")) for place in kind.places]
    for explained in EXPLAINED:
        if (tool, kind.kernel) not in {(explained.tool, kernel) for kernel in explained.kernels}:
            continue
        if choices and all(names & explained.functions for names in choices):
            return explained
    return None
