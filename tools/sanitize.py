"""The GPU suite's small problems under NVIDIA's compute-sanitizer: out of bounds, races in shared memory, unset memory.

    python tools/sanitize.py                      memcheck, racecheck and initcheck, one after the other
    python tools/sanitize.py --tool memcheck --select "causal or varlen"

Each tool must find nothing. Kernels run tens of times slower under it, so that compiled ones should lie in Triton's
folder before: `--warm` runs the tests once without a tool. The exit status is 0 where all tools found nothing, 1 where
one found something or a test failed, and 2 where there is no compute-sanitizer.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = {
    "memcheck": ["--leak-check", "no", "--padding", "64"],
    "racecheck": ["--racecheck-report", "analysis", "--print-limit", "10000"],
    "initcheck": [],
}
"""Each tool's own options. Padding: what lies behind a tensor is no other tensor's."""
PLACES = [str(path) for path in (*sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True), Path("/opt/cuda/bin"))]
SELECT = (
    "test_matches_reference and bfloat16 and (causal_square or document or varlen_used or all_in_one or bias_queries)"
)
TESTS = ("tests/gpu/test_attention.py", "tests/gpu/test_decoding.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", action="append", choices=list(TOOLS), help="default: all three")
    parser.add_argument("--select", default=SELECT, help="pytest's -k")
    parser.add_argument("--workers", type=int, default=0, help="processes of pytest; default: none but its own")
    parser.add_argument("--warm", action="store_true", help="compile the kernels first, without a tool")
    given = parser.parse_args()
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))
    if sanitizer is None:
        print(
            "there is no compute-sanitizer here: it comes with NVIDIA's CUDA toolkit, not with PyTorch; nothing was run"
        )
        return 2
    workers = str(given.workers)
    tests = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-o", "addopts=", "-k", given.select, *TESTS]
    if given.warm and subprocess.run(tests, cwd=ROOT).returncode:
        return 1
    return max([_run(sanitizer, tool, tests) for tool in given.tool or TOOLS])


def _run(sanitizer: str, tool: str, tests: list[str]) -> int:
    # Every tensor is an allocation of its own, whose end the tool knows.
    own = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    common = ["--error-exitcode", "1", "--target-processes", "all", "--show-backtrace", "device"]
    command = [sanitizer, "--tool", tool, *common, *TOOLS[tool], *tests]
    done = subprocess.run(command, cwd=ROOT, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    findings = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", done.stdout)
    tested = re.findall(r"\d+ (?:passed|failed)[^\n]*", done.stdout)
    print(
        f"{tool}: {sum(int(one or other) for one, other in findings)} findings; {tested[-1] if tested else 'no test'}"
    )
    if done.returncode:
        for finding, count in _kinds(done.stdout).most_common():
            print(f"  {count} x {finding}")
        print("\n".join(line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))))
    return 1 if done.returncode or not tested else 0


_NUMBERS = re.compile(r"0x[0-9a-f]+|\(\d+,\d+,\d+\)|(?<!\.py:)\b\d+\b")
"""Addresses, threads and blocks, in which findings of one kind differ."""


def _kinds(said: str) -> Counter[str]:
    """Findings that differ in numbers alone, counted: what was found, and at which lines of the kernels."""
    found: list[list[str]] = []
    for line in said.splitlines():
        text = _NUMBERS.sub("_", line.removeprefix("=========").strip())
        if line.startswith("========= ") and not line.startswith("=========  ") and "SUMMARY" not in line:
            found.append([text])
        elif line.startswith("=========  ") and ".py:" in line and found:
            found[-1].append(text)
    return Counter("; ".join(parts) for parts in found if ":" in parts[0])


if __name__ == "__main__":
    sys.exit(main())
