"""Training with a long context: over processes it learns what one process learns, here and in the records."""

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
EXAMPLE = str(ROOT / "examples" / "long_context.py")
SIZES = ("--device", "cpu", "--tokens", "512", "--steps", "3", "--width", "64")


def _losses(record: Path, *command: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, *command, EXAMPLE, *SIZES, "--record", str(record)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert found == [round(loss, 5) for loss in json.loads(record.read_text())["losses"]]
    return found


def test_a_long_context_over_processes_learns_what_one_process_learns(tmp_path: Path) -> None:
    one = _losses(tmp_path / "1.json")
    two = _losses(tmp_path / "2.json", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert len(one) == 3
    assert one[-1] < one[0]
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), atol=2e-4, rtol=0)
    assert [json.loads((tmp_path / f"{ranks}.json").read_text())["processes"] for ranks in (1, 2)] == [1, 2]


def _speed(record: dict[str, Any]) -> float:
    """Tokens a second; the first step compiles."""
    return float(record["settings"]["tokens"] / statistics.median(record["seconds"][1:]))


def test_two_cards_learn_128k_tokens_as_one_does() -> None:
    """The record that the page quotes."""
    folder = ROOT / "benchmarks" / "results" / "nvidia-h200" / "long_context"
    one, two = (json.loads((folder / f"{ranks}.json").read_text()) for ranks in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["settings"] == two["settings"]
    assert one["settings"]["tokens"] == 2**17
    apart = max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True))
    assert len(one["losses"]) == 8
    assert apart < 1e-4
    assert _speed(two) > 1.8 * _speed(one)
    assert two["memory"] < 0.55 * one["memory"]
    speeds = " and ".join(f"{_speed(each) / 1e3:.0f} thousand" for each in (two, one))
    memories = " and ".join(f"{each['memory'] / 2**30:.1f}" for each in (two, one))
    page = " ".join((ROOT / "docs" / "distributed.md").read_text().split())
    assert f"two H200s and one read {speeds} tokens a second, and hold {memories} GiB each" in page
    assert f"losses of its eight steps are at most {apart:.5f} apart" in page
