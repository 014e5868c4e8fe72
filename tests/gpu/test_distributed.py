"""Attention over the GPUs of this machine, by the run that `tests.gpu.ranks` is."""

import subprocess
import sys

import pytest
import torch

RANKS = min(2, torch.cuda.device_count())


@pytest.mark.skipif(RANKS < 2, reason="needs two GPUs")
def test_every_check_of_ranks_passes() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    done = subprocess.run([*command, "-m", "tests.gpu.ranks"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "0 failed" in done.stdout
