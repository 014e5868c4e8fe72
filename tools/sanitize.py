"""Small calls of the GPU suite under NVIDIA's compute-sanitizer: out of bounds, races in shared memory, unset memory.

    python tools/sanitize.py                              memcheck, racecheck and initcheck, one after the other
    python tools/sanitize.py --tools memcheck --calls hopper:causal_square cache:plain
    python tools/sanitize.py --sanitizer /opt/other/compute-sanitizer --logs said --limit 75

Before, the calls (`tests/sanitized.py`) run side by side without a tool, so that all kernels are compiled, and with NaN
in unwritten memory, none of which may be left in a result. Each tool must find nothing that `tools/findings.py` does
not explain; what it explains is counted and printed too. All of it goes to benchmarks/robustness/sanitizer-<gpu>.json,
and from there to docs/robustness.md by `python tools/fill_docs.py`. The exit status is 0 where all calls ran and all
that was found is explained, 1 where not, and 2 where there is no compute-sanitizer or no GPU.

Take 2026.1 or newer, from CUDA 13.2 on. By NVIDIA's release notes racecheck tells races at mbarriers and at barriers of
a warpgroup that are none before 2025.4 and 2026.1. All of them need a driver from 580 on. PyPI's
`nvidia-cuda-sanitizer-api` is whole in 13.4.92 and 13.5.25 (2026.3, 2026.4): `pip install --target` it anywhere and
name its `nvidia/cu13/compute-sanitizer/compute-sanitizer`. 13.1 and 13.2 lack `TreeLauncherSubreaper`, which starts
programs: lay their `bin` and `lib` over a copy of the folder `compute-sanitizer` of a CUDA toolkit from 13.0 on, all in
one folder.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.findings import Report, report  # noqa: E402

# 0: all findings are printed.
COMMON = ["--error-exitcode", "1", "--target-processes", "all", "--show-backtrace", "device", "--print-limit", "0"]
TOOLS = {
    "memcheck": ["--leak-check", "no", "--padding", "64"],
    # PyTorch's kernels take time, and are not asked about.
    "racecheck": ["--racecheck-report", "analysis", "--kernel-name", "regex=^[a-z]+_kernel$"],
    "initcheck": [],
}
"""Each tool's own options. Padding: what lies behind a tensor is no other tensor's."""
INSTALLED = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"), reverse=True)
TOOLKITS = [*sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True), Path("/opt/cuda/bin")]
RECORDS = ROOT / "benchmarks" / "robustness"
PROGRAM = [sys.executable, "-m", "tests.sanitized"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS), help="default: all three")
    parser.add_argument("--calls", nargs="+", metavar="KIND:CASE", help="default: those of tests/sanitized.py")
    parser.add_argument("--limit", type=float, default=600, metavar="SECONDS", help="of each tool, and before")
    parser.add_argument("--sanitizer", default="compute-sanitizer", metavar="PATH", help="default: the first one found")
    parser.add_argument("--logs", type=Path, metavar="FOLDER", help="what each tool says goes there as it comes")
    parser.add_argument("--records", type=Path, default=RECORDS, metavar="FOLDER", help="where the record goes")
    parser.add_argument("more", nargs="*", metavar="OPTION", help="compute-sanitizer's other options, after --")
    given = parser.parse_args()
    places = [*map(str, INSTALLED), os.environ.get("PATH", ""), *map(str, TOOLKITS)]
    sanitizer = shutil.which(given.sanitizer, path=os.pathsep.join(places))
    if sanitizer is None:
        print(f"there is no {given.sanitizer} here: it comes with NVIDIA's CUDA toolkit, not with PyTorch")
        return 2
    machine = describe()
    if machine is None:
        print("there is no NVIDIA GPU here")
        return 2
    calls = given.calls or _all_calls()
    with tempfile.TemporaryDirectory() as folder:
        logs = given.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        record = {"sanitizer": version_of(sanitizer), **machine, "calls": calls, "tools": {}}
        print(f"compute-sanitizer {record['sanitizer']}, {machine['gpu']}", flush=True)
        record["before"] = warm(calls, logs, given.limit)
        print(f"before: {_ran(record['before'])}", flush=True)
        for tool in given.tools:
            command = [sanitizer, *COMMON, *given.more, "--tool", tool, *TOOLS[tool], *PROGRAM, *calls]
            record["tools"][tool] = check(tool, command, logs, given.limit)
    given.records.mkdir(parents=True, exist_ok=True)
    path = given.records / f"sanitizer-{machine['slug']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path)
    return int(not passed(record))


def version_of(sanitizer: str) -> str:
    said = subprocess.run([sanitizer, "--version"], stdout=subprocess.PIPE, text=True).stdout
    return " ".join(re.findall(r"Version ([\d.]+)", said))


def describe() -> dict[str, Any] | None:
    """Of the first GPU; None where there is none. In a process of its own, for this one needs no memory there."""
    text = "from flashtile.bench.machine import device_name, slug, versions; import json, torch; "
    text += "print(json.dumps({'gpu': device_name('cuda'), 'slug': slug('cuda'), 'versions': versions()}))"
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**json.loads(done.stdout.splitlines()[-1]), "driver": driver, "date": date}


def _all_calls() -> list[str]:
    from tests.sanitized import CALLS

    return list(CALLS)


def warm(calls: list[str], logs: Path, limit: float) -> dict[str, Any]:
    """All calls side by side, without a tool."""
    begin = time.monotonic()

    def one(index: int) -> str:
        log = logs / f"before-{index}.log"
        run_in_time([*PROGRAM, "--unwritten", calls[index]], log, limit - (time.monotonic() - begin))
        said = log.read_text(errors="replace")
        log.unlink()
        return said

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = "".join(pool.map(one, range(len(calls))))
    (logs / "before.log").write_text(said)
    return outcome(said, begin, said.count("CALLS ended") < len(calls))


def check(tool: str, command: list[str], logs: Path, limit: float) -> dict[str, Any]:
    """What a tool says of the calls, printed and as a part of the record."""
    begin, log = time.monotonic(), logs / f"{tool}.log"
    # Every tensor is an allocation of its own, whose end the tool knows.
    cut_off = run_in_time(command, log, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    said = log.read_text(errors="replace")
    found, result = report(tool, said), outcome(said, begin, cut_off)
    print("\n".join(lines_of(tool, found, result)), flush=True)
    kinds = [
        {
            "what": each.kind.what, "kernel": each.kind.kernel, "places": sorted(each.kind.places),
            "count": each.times, "explained": each.explained, "why": each.why,
        }
        for each in found.found
    ]  # fmt: skip
    return {**result, "findings": found.total, "unexplained": found.unexplained, "kinds": kinds}


def run_in_time(command: list[str], log: Path, limit: float, **more: str) -> bool:
    """Whether it had to be stopped, with all that it started; the log has what was said until then."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **more}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(max(limit, 0))
            return False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True


def outcome(said: str, begin: float, cut_off: bool) -> dict[str, Any]:
    """What became of the calls. Where the program did not come to its end, it was cut off or crashed."""
    return {
        "ran": len(re.findall(r"^CALL \S+: ran", said, re.MULTILINE)),
        "failed": re.findall(r"^CALL (\S+: failed, .*)", said, re.MULTILINE),
        "cut_off": cut_off,
        "ended": "CALLS ended" in said,
        "seconds": round(time.monotonic() - begin, 1),
    }


def lines_of(tool: str, found: Report, result: dict[str, Any]) -> list[str]:
    """What is printed of a tool."""
    explained = sum(each.explained for each in found.found)
    lines = [f"{tool}: {found.total} findings, {found.told} told, {explained} of them explained; {_ran(result)}"]
    for each in found.found:
        lines.append(f"  {each.times} x {each.kind}")
        lines += [f"      {each.explained} explained: {each.why}"] if each.why else []
    return lines


def _ran(result: dict[str, Any]) -> str:
    end = ", cut off" if result["cut_off"] else "" if result["ended"] else ", came to no end"
    return "\n".join([f"{result['ran']} calls ran in {result['seconds']} s{end}", *result["failed"]])


def passed(record: dict[str, Any]) -> bool:
    """Whether all calls ran, everywhere, and all that was found is explained."""
    whole = [
        result["ran"] == len(record["calls"]) and result["ended"] and not result["failed"]
        for result in (record["before"], *record["tools"].values())
    ]
    return all(whole) and not any(result["unexplained"] for result in record["tools"].values())


if __name__ == "__main__":
    sys.exit(main())
