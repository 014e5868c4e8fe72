"""The versions that are supported, tried: an environment for each cell, and the quick suite in it.

    python tools/matrix.py --record benchmarks/robustness/matrix.json      every cell, one after the other
    python tools/matrix.py --cell 3.12/2.11.0/3.6.0                  one: Python / PyTorch / Triton
    python tools/matrix.py --table benchmarks/robustness/matrix.json       a record as a table

An environment is made from the interpreter of that version (`python3.X` on the path, pyenv's or uv's). It gets PyTorch
with what that asks for, then Triton by itself, whatever version PyTorch pins, and is removed when its tests are over.
PyTorch for Linux brings gigabytes of CUDA libraries along where the index has no build for the CPU.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NEEDS = ("pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "rich>=13", "matplotlib>=3.8")
NUMPY = {"3.6": "numpy>=1.26,<2.4"}
"""Triton 3.6's interpreter makes numbers of arrays in a way that later releases of NumPy refuse."""
SUITES: dict[str, tuple[dict[str, str], list[str]]] = {
    "cpu": ({}, ["tests/test_conformance.py", "tests/test_check.py", "-k", "float32 or bfloat16 or check"]),
    "torch.compile": ({}, ["tests/test_autograd.py", "-k", "aot_eager and (causal or score_mod or masks or method)"]),
    "interpreted": (
        {"TRITON_INTERPRET": "1"},
        ["tests/interpreted/test_portable.py", "-k", "causal_square or varlen_mods or varlen_causal or document"],
    ),
    "compiled": ({}, ["tests/test_compile.py", "-k", "test_kernels_of_a_target and (sm_80 or gfx942)"]),
}
"""The quick suite: environment and pytest's arguments."""


class Cell(NamedTuple):
    """Versions that go together."""

    python: str
    torch: str
    triton: str

    def __str__(self) -> str:
        return "/".join(self)


CELLS = (
    Cell("3.12", "2.11.0", "3.6.0"),
    Cell("3.10", "2.9.1", "3.6.0"),
    Cell("3.13", "2.14.1", "3.9.0"),
    Cell("3.11", "2.13.0", "3.6.0"),
    Cell("3.11", "2.13.0", "3.7.1"),
    Cell("3.11", "2.13.0", "3.8.0"),
    Cell("3.11", "2.13.0", "3.9.0"),
    Cell("3.10", "2.10.0", "3.7.1"),
    Cell("3.12", "2.12.1", "3.8.0"),
)
"""Every Python, PyTorch and Triton at least once, the oldest together and the newest together."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", action="append", help="PYTHON/TORCH/TRITON; default: all")
    parser.add_argument("--record", type=Path, help="where results are kept, as JSON; those of other cells stay")
    parser.add_argument("--table", type=Path, help="print a record as a table")
    parser.add_argument("--folder", type=Path, help="where environments are made; default: a temporary one")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.table.read_text())))
        return 0
    cells = [Cell(*name.split("/")) for name in given.cell] if given.cell else CELLS
    results: dict[str, Any] = json.loads(given.record.read_text()) if given.record and given.record.exists() else {}
    for cell in cells:
        results[str(cell)] = result = run(cell, given.folder)
        print(cell, result, flush=True)
        if given.record:
            given.record.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0 if all(passed(results[str(cell)]) for cell in cells) else 1


def interpreter(version: str) -> str | None:
    """A Python of that version, or None."""
    found = shutil.which(f"python{version}")
    kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python3"))
    if found and subprocess.run([found, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0:
        return found
    if kept:
        return str(kept[-1])
    if shutil.which("uv"):
        asked = subprocess.run(["uv", "python", "find", version], capture_output=True, text=True)
        return asked.stdout.strip() or None
    return None


def run(cell: Cell, folder: Path | None) -> dict[str, Any]:
    """What happened in each suite: {suite: "12 passed"}; or {"missing": why there was nothing to run it with}."""
    base = interpreter(cell.python)
    if base is None:
        return {"missing": f"no Python {cell.python} here; try uv python install {cell.python}"}
    numpy = NUMPY.get(cell.triton.rpartition(".")[0], "numpy>=1.26")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        python = str(Path(place) / "env" / "bin" / "python")
        steps = (
            [base, "-m", "venv", str(Path(place) / "env")],
            [python, "-m", "pip", "install", "-q", "--no-cache-dir", f"torch=={cell.torch}", numpy, *NEEDS],
            [python, "-m", "pip", "install", "-q", "--no-cache-dir", "--no-deps", f"triton=={cell.triton}"],
        )
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                return {"missing": (done.stderr.strip().splitlines() or ["failed"])[-1]}
        return {name: _suite(python, Path(place), *suite) for name, suite in SUITES.items()}


def _suite(python: str, place: Path, environment: dict[str, str], arguments: list[str]) -> str:
    """The closing words of pytest, with the failed tests' names."""
    begin = time.monotonic()
    own = {"TRITON_CACHE_DIR": str(place / "triton"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [python, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-o", "addopts=", *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **own, **environment}, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]]
    summary = re.search(r"\d+ (?:passed|failed).*?(?= in )", done.stdout)
    failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    seconds = f" in {time.monotonic() - begin:.0f} s"
    return "; ".join([(summary.group() if summary else lines[-1]) + seconds, *failed[:5]])


def passed(result: dict[str, str]) -> bool:
    return "missing" not in result and all("passed" in said and "failed" not in said for said in result.values())


def table(results: dict[str, dict[str, str]]) -> str:
    """Markdown."""
    lines = ["| Python | PyTorch | Triton | " + " | ".join(SUITES) + " |", "| --- " * (3 + len(SUITES)) + "|"]
    for name, result in results.items():
        said = [result.get(suite, result.get("missing", "not run")).split(" in ")[0] for suite in SUITES]
        lines.append(f"| {name.replace('/', ' | ')} | " + " | ".join(said) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
