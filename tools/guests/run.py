"""Other libraries' own tests, run with flashtile in the place of their attention.

    python tools/guests/run.py flash-attn=CLONE diffusers=CLONE ... --record benchmarks/robustness/guests.json
    python tools/guests/run.py --table benchmarks/robustness/guests.json

CLONE is a checkout of the library's repository, outside of this one, whose settings of pytest would hold there too.
Tests that fail are run once more without flashtile, where the library has an attention of its own that runs here; what
fails then too is counted apart. It works without a GPU, where tests that ask for one are skipped by their own marks, or
get the CPU (flash-attn's). The libraries' tests need pytest, einops and parameterized beside what the library needs
itself, PyTorch's expecttest, diffusers' accelerate and requests-mock.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


class Suite(NamedTuple):
    """Tests of a library. `folder`: where pytest runs; `version`: a file that says it, or the name of a distribution.

    own: the library's attention runs without flashtile too, with the door `none`. source: folder of the clone to import
    the library from.
    """

    repository: str
    door: str
    folder: str
    arguments: tuple[str, ...]
    version: str
    own: bool = True
    none: str = "none"
    source: str = ""
    most: int = 0


MODELS = (
    *("gpt2", "bert", "gpt_oss", "t5", "gemma3", "whisper", "vit", "llama"),
    *("mistral", "gemma2", "qwen3", "deepseek_v3"),
)
"""Those of transformers that `tests/integrations/test_transformers.py` has, too."""

_OF_ATTENTION = (
    "sdpa or flex or attention or greedy_generate or static_cache or padding_free or left_padding or continue_from or "
    "training or eager or 4d_attention"
)

SUITES: dict[str, Suite] = {
    "flash-attn 2": Suite(
        "flash-attn",
        "flash-attn",
        "tests",
        # The first makes one call 250 times over, at a batch of 60, to meet a race between a GPU's threads; the second
        # calls compiled functions whose arguments are not flash-attn's interface.
        ("test_flash_attn.py", "-k", "not race_condition and not generator_arg"),
        "flash_attn/__init__.py",
        False,
        most=160,
    ),
    "flash-attn 3": Suite(
        "flash-attn",
        "flash-attn-3",
        "hopper",
        # The first allocates 70 GiB, the second looks at the schema of compiled operators.
        ("test_flash_attn.py", "-k", "not race_condition and not bw_compatibility"),
        "3.0.0",
        False,
        most=24,
    ),
    "DeepSpeed4Science": Suite(
        "DeepSpeed",
        "evoformer",
        "tests/unit/ops/deepspeed4science",
        # Its settings of pytest leave tests of single operators out.
        ("test_DS4Sci_EvoformerAttention.py", "--noconftest", "-o", "addopts="),
        "version.txt",
        False,
    ),
    "PyTorch": Suite(
        "pytorch",
        "pytorch",
        "test",
        (
            *("test_transformers.py", "xpu/test_transformers_xpu.py", "-k"),
            # Of a product of all sizes the longest is left out, for it takes most of the time.
            "(TestSDPACPU or TestSDPACpuOnly or scaled_dot) and not q_seq_len_1030",
        ),
        "torch",
    ),
    # Their tests, on the installed version: the door opens to tested versions alone.
    "diffusers, Flux": Suite(
        "diffusers",
        "diffusers",
        ".",
        ("tests/models/transformers/test_models_transformer_flux.py",),
        "diffusers",
        none="no-diffusers",
    ),
    "diffusers, UNets": Suite("diffusers", "diffusers", ".", ("tests/models/unets",), "diffusers", none="no-diffusers"),
    "transformers": Suite(
        "transformers",
        "transformers",
        ".",
        (*(f"tests/models/{name}/test_modeling_{name}.py" for name in MODELS), "-k", _OF_ATTENTION),
        "src/transformers/__init__.py",
        source="src",
    ),
}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clones", nargs="*", metavar="LIBRARY=CLONE", help=", ".join(_repositories()))
    parser.add_argument("--suite", action="append", choices=SUITES, help="default: all of the libraries given")
    parser.add_argument(
        "--seconds", type=float, default=900.0, help="after which a suite is cut off; default %(default)s"
    )
    parser.add_argument("--most", type=int, help="cases of a test with many; default: the suite's own number")
    parser.add_argument("--workers", default="0", help="processes that share the tests; default: none but pytest's own")
    parser.add_argument("--record", type=Path, help="where results are kept, as JSON; those of other suites stay")
    parser.add_argument("--table", type=Path, help="print a record as a table")
    given = parser.parse_args()
    if given.table:
        print(table(json.loads(given.table.read_text())))
        return 0
    clones = dict(each.split("=", 1) for each in given.clones)
    unknown = sorted(set(clones) - set(_repositories()))
    if unknown:
        parser.error(f"got {unknown[0]!r}, need some of {', '.join(_repositories())}")
    inside = [clone for clone in clones.values() if Path(clone).resolve().is_relative_to(ROOT)]
    if inside:
        parser.error(f"got {inside[0]}, need a checkout outside of {ROOT}, whose settings of pytest would hold there")
    results: dict[str, Any] = json.loads(given.record.read_text()) if given.record and given.record.exists() else {}
    for name, suite in SUITES.items():
        if suite.repository not in clones or (given.suite and name not in given.suite):
            continue
        suite = suite._replace(most=suite.most if given.most is None else given.most)
        results[name] = run(suite, Path(clones[suite.repository]).resolve(), given.seconds, given.workers)
        print(name, json.dumps({**results[name], "failed": len(results[name]["failed"])}), flush=True)
        if given.record:
            given.record.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0


def _repositories() -> list[str]:
    return list(dict.fromkeys(suite.repository for suite in SUITES.values()))


def run(suite: Suite, clone: Path, seconds: float, workers: str = "0") -> dict[str, Any]:
    """What became of a suite's tests; see `_counted`."""
    arguments = [each for each in suite.arguments if not each.endswith(".py") or (clone / suite.folder / each).exists()]
    begin = time.monotonic()
    outcomes, ended = _outcomes(suite, clone, suite.door, [*arguments, "-n", workers], seconds)
    failed = [line["test"] for line in outcomes if line["outcome"] == "failed"]
    without: set[str] = set()
    if failed and suite.own:
        again, _ = _outcomes(suite, clone, suite.none, [*failed, "-n", workers], seconds)
        without = {line["test"] for line in again if line["outcome"] == "failed"}
    return {
        "version": _version(suite, clone),
        "commit": _commit(clone),
        "python": sys.version.split()[0],
        "torch": metadata.version("torch"),
        **_counted(outcomes, without),
        "ended": ended,
        "seconds": round(time.monotonic() - begin),
    }


def _outcomes(
    suite: Suite, clone: Path, door: str, tests: list[str], seconds: float
) -> tuple[list[dict[str, Any]], str]:
    """(a line for each test, how pytest ended)."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "outcomes"
        lines.touch()
        places = [str(HERE), str(ROOT), *([str(clone / suite.source)] if suite.source else [])]
        kept = [os.environ[name] for name in ("PYTHONPATH",) if name in os.environ]
        path = os.pathsep.join([*places, *kept])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "in_place", "-p", "no:cacheprovider", "--tb=short"]
        command += ["--door", door, "--most", str(suite.most), "--outcomes", str(lines), *tests]
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                command, cwd=clone / suite.folder, env=environment, timeout=seconds, capture_output=True, text=True
            )
            last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]])[-1]
            ended = last if done.returncode in (0, 1) else f"pytest ended with {done.returncode}: {last}"
        except subprocess.TimeoutExpired:
            ended = f"cut off after {seconds:.0f} s"
        return [json.loads(line) for line in lines.read_text().splitlines()], ended


def _counted(outcomes: list[dict[str, Any]], without: set[str]) -> dict[str, Any]:
    """passed, those of them in which a kernel of flashtile ran, reasons of those skipped, those that failed and why.

    without: tests that fail without flashtile too.
    """
    passed = [line for line in outcomes if line["outcome"] == "passed"]
    skipped = Counter(line["why"].removeprefix("Skipped: ")[:120] for line in outcomes if line["outcome"] == "skipped")
    failed = {line["test"]: line["why"] for line in outcomes if line["outcome"] == "failed"}
    return {
        "passed": len(passed),
        "with_kernels": sum(line["kernels"] > 0 for line in passed),
        "kernels": sum(line["kernels"] for line in outcomes),
        "skipped": dict(skipped.most_common()),
        "failed": {test: why for test, why in failed.items() if test not in without},
        "failed_without": {test: why for test, why in failed.items() if test in without},
    }


def _version(suite: Suite, clone: Path) -> str:
    path = clone / suite.version
    if path.is_file():
        found = re.search(r"\d+\.\d+[\w.]*", path.read_text().partition("__version__")[2] or path.read_text())
        return found.group() if found else "unknown"
    try:
        return metadata.version(suite.version)
    except metadata.PackageNotFoundError:
        return suite.version


def _commit(clone: Path) -> str | None:
    asked = subprocess.run(["git", "-C", str(clone), "rev-parse", "HEAD"], capture_output=True, text=True)
    return asked.stdout.strip() or None


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    columns = "| tests of | version | passed | of them with kernels | failed | fail without flashtile too | skipped |"
    lines = [columns, "| --- " * 7 + "|"]
    for name, found in results.items():
        commit = f", commit {found['commit'][:9]}" if found["commit"] else ""
        counts = (found["passed"], found["with_kernels"], len(found["failed"]), len(found["failed_without"]))
        numbers = " | ".join(map(str, (*counts, sum(found["skipped"].values()))))
        lines.append(f"| {name} | {found['version']}{commit} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
