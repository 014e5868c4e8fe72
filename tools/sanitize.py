"""The GPU suite's small problems under NVIDIA's compute-sanitizer: out of bounds, races in shared memory, unset memory.

    python tools/sanitize.py                      memcheck, racecheck and initcheck, one after the other
    python tools/sanitize.py --tool memcheck --select "causal or varlen"
    python tools/sanitize.py --sanitizer /opt/other/compute-sanitizer --logs said -- --kernel-name kns=forward_kernel

Each tool must find nothing that `EXPLAINED` does not name; what it names is counted and printed too. Kernels run tens
of times slower under it, so that compiled ones should lie in Triton's folder before: `--warm` runs the tests once
without a tool. The exit status is 0 where all that was found is explained, 1 where something is not or a test failed,
and 2 where there is no compute-sanitizer.

Take 2026.1 or newer, from CUDA 13.2 on. By NVIDIA's release notes initcheck sees what the copy engine writes
(cp.async.bulk) from 2025.4 on, and racecheck tells races at mbarriers and at barriers of a warpgroup that are none
before 2025.4 and 2026.1. All of them need a driver from 580 on. PyPI's `nvidia-cuda-sanitizer-api` is whole in 13.4.92
and 13.5.25 (2026.3, 2026.4): `pip install --target` it anywhere and name its `nvidia/cu13/bin/compute-sanitizer`. 13.1
and 13.2 lack `TreeLauncherSubreaper`, which starts programs: lay their `bin` and `lib` over a copy of the folder
`compute-sanitizer` of a CUDA toolkit from 13.0 on, all in one folder.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
COMMON = ["--error-exitcode", "1", "--target-processes", "all", "--show-backtrace", "device", "--print-limit", "10000"]
TOOLS = {
    "memcheck": ["--leak-check", "no", "--padding", "64"],
    "racecheck": ["--racecheck-report", "analysis"],
    "initcheck": [],
}
"""Each tool's own options. Padding: what lies behind a tensor is no other tensor's."""
INSTALLED = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"), reverse=True)
TOOLKITS = [*sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True), Path("/opt/cuda/bin")]
SELECT = (
    "test_matches_reference and bfloat16 and (causal_square or document or varlen_used or all_in_one or bias_queries)"
)
TESTS = ("tests/gpu/test_attention.py", "tests/gpu/test_decoding.py")


class Explained(NamedTuple):
    """Findings of a `tool` all of whose places lie in `functions`, and why they are none."""

    tool: str
    functions: frozenset[str]
    why: str


EXPLAINED = (
    Explained(
        "racecheck",
        frozenset({"hopper/schedule.write", "hopper/schedule.read"}),
        "one warp writes, then bar.warp.sync, then a lane arrives at an mbarrier that all readers wait for; they read, "
        "then bar.sync, then a thread arrives at the mbarrier that the writer waits for",
    ),
    Explained(
        "racecheck",
        frozenset({"hopper/backward.loader", "hopper/steps.step", "hopper/steps.value_step"}),
        "as schedule.write and schedule.read, with an mbarrier of its own for each slot",
    ),
    Explained(
        "racecheck",
        frozenset({"hopper/forward.specialize", "hopper/forward.forward_kernel"}),
        "Triton's own: which role a warp takes is written before a barrier.sync of all threads, read after it, and "
        "written again after another two",
    ),
    Explained(
        "racecheck",
        frozenset({"hopper/backward.specialize", "hopper/backward.backward_kernel"}),
        "as forward.specialize",
    ),
    Explained(
        "racecheck",
        frozenset({"hopper/backward.specialize", "hopper/backward.backward_kernel", "hopper/schedule.write"}),
        "as forward.specialize; schedule.write is no store of this kernel, its line must be another kernel's",
    ),
    Explained(
        "initcheck",
        frozenset({"joining.some_parts"}),
        "of rows that saw no key of a part the output is not written, but read with all others, and not used",
    ),
)
"""`tests/emulated/test_handing.py` holds what is compiled to these words."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", action="append", choices=list(TOOLS), help="default: all three")
    parser.add_argument("--select", default=SELECT, help="pytest's -k")
    parser.add_argument("--workers", type=int, default=0, help="processes of pytest; default: none but its own")
    parser.add_argument("--warm", action="store_true", help="compile the kernels first, without a tool")
    parser.add_argument("--sanitizer", default="compute-sanitizer", metavar="PATH", help="default: the first one found")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="what each tool says goes there as it comes")
    parser.add_argument("more", nargs="*", metavar="OPTION", help="compute-sanitizer's other options, after --")
    given = parser.parse_args()
    places = [*map(str, INSTALLED), os.environ.get("PATH", ""), *map(str, TOOLKITS)]
    sanitizer = shutil.which(given.sanitizer, path=os.pathsep.join(places))
    if sanitizer is None:
        print(f"there is no {given.sanitizer} here: it comes with NVIDIA's CUDA toolkit, not with PyTorch")
        return 2
    version = subprocess.run([sanitizer, "--version"], stdout=subprocess.PIPE, text=True).stdout
    print(f"compute-sanitizer {' '.join(re.findall(r'Version (.+)', version))}", flush=True)
    workers = str(given.workers)
    tests = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-o", "addopts=", "-k", given.select, *TESTS]
    if given.warm and subprocess.run(tests, cwd=ROOT).returncode:
        return 1
    with tempfile.TemporaryDirectory() as folder:
        logs = given.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        begin = [sanitizer, *COMMON, *given.more]
        return max([_run(tool, [*begin, "--tool", tool, *TOOLS[tool], *tests], logs) for tool in given.tool or TOOLS])


def _run(tool: str, command: list[str], logs: Path) -> int:
    # Every tensor is an allocation of its own, whose end the tool knows.
    own = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = logs / f"{tool}.log"
    # A file has what was said until then, should the run be cut off.
    with log.open("w") as file:
        code = subprocess.run(command, cwd=ROOT, env=own, stdout=file, stderr=subprocess.STDOUT).returncode
    told = log.read_text(errors="replace")
    said, unexplained = report(tool, told)
    print(said, flush=True)
    failed = code and (unexplained or not kinds(told))
    return 1 if failed or not _passed(told) else 0


def report(tool: str, said: str) -> tuple[str, int]:
    """(what to print of a tool's output, how many findings are not explained)."""
    found = kinds(said)
    totals = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", said)
    total = sum(int(one or other) for one, other in totals)
    reasons = {kind: _why(tool, kind) for kind in found}
    printed, named = sum(found.values()), sum(found[kind] for kind, why in reasons.items() if why)
    lines = [f"{tool}: {total} findings, {printed} told, {named} of them explained; {tested(said)}"]
    for kind, count in found.most_common():
        lines.append(f"  {count} x {kind}")
        lines += [f"      explained: {reasons[kind]}"] if reasons[kind] else []
    lines += [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR "))]
    # What was not told is not explained: the tool tells no more than its limit.
    return "\n".join(lines), max(total, printed) - named


def tested(said: str) -> str:
    """pytest's last line, of what passed and failed."""
    found = re.findall(r"^[= ]*(\d+ (?:passed|failed|error)[^\n]*)", said, re.MULTILINE)
    return found[-1] if found else "no test"


def _passed(said: str) -> bool:
    return "passed" in tested(said) and not re.search("failed|error", tested(said))


class Kind(NamedTuple):
    """What was found, in the tool's words, and where, as often as it may be."""

    what: str
    places: frozenset[str]

    def __str__(self) -> str:
        return f"{self.what}: {', '.join(sorted(self.places)) or 'nowhere that has a line'}"


_FINDING = re.compile(r"========= (?:Error: |Warning: )?(\S.*)")
_DETAIL = re.compile(r"=========\s+((?:at|and) .*)")
_FRAME = re.compile(r"COMPUTE-SANITIZER|\w+ SUMMARY|Target application|This tool|Saved host|=")
"""What the tool says of itself."""
_PLACE = re.compile(r"([\w./-]+\.py):(\d+)")
_ACCESS = re.compile(r"(Read|Write) access")


def kinds(said: str) -> Counter[Kind]:
    """Findings of the same words and places, counted."""
    found: list[tuple[str, list[str]]] = []
    for line in said.splitlines():
        opening, detail = _FINDING.match(line), _DETAIL.match(line)
        if opening and not _FRAME.match(opening.group(1)):
            text = opening.group(1)
            found.append((_words(text), _places(text) if " at " in text else []))
        elif detail and found:
            found[-1][1].extend(_places(detail.group(1)))
    return Counter(Kind(what, frozenset(places)) for what, places in found)


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


def _why(tool: str, kind: Kind) -> str | None:
    """The reason that explains a kind, if there is one. Where a line may be of two files, either will do."""
    choices = [set(place.rpartition(" ")[2].split("|")) for place in kind.places]
    for explained in EXPLAINED:
        if tool == explained.tool and choices and all(names & explained.functions for names in choices):
            return explained.why
    return None


if __name__ == "__main__":
    sys.exit(main())
