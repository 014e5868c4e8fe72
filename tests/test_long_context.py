"""The examples run, and find what they say they find."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def _losses(*command: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, *command, "--device", "cpu", "--tokens", "512", "--steps", "3", "--width", "64"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)]


def test_a_long_context_over_processes_learns_what_one_process_learns() -> None:
    example = str(EXAMPLES / "long_context.py")
    one = _losses(example)
    two = _losses("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", example)
    assert len(one) == 3
    assert one[-1] < one[0]
    torch.testing.assert_close(torch.tensor(two), torch.tensor(one), atol=2e-4, rtol=0)
