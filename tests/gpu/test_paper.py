"""What `flashtile bench paper` asks of a GPU alone."""

import torch

from flashtile.bench.paper import experiment
from flashtile.bench.paper.experiment import Pair, Setting


def test_busy_share() -> None:
    """A long product keeps the GPU at work nearly all the time, many small ones leave it waiting."""
    large = torch.randn(8192, 8192, device="cuda")
    small = torch.randn(8, device="cuda")

    def waits() -> torch.Tensor:
        for _ in range(200):
            small.add(1.0)
        return small

    setting = Setting("cuda", torch.float32, seconds=0.1)
    pair = Pair(lambda: large @ large, waits, same=False)
    found = experiment.with_busy(experiment.timed(pair, setting, print), pair, setting, print)
    busy = found.details["gpu_busy"]
    # No more than 1, but for tests beside this one, which may slow down what is profiled and not what was timed.
    assert busy["baseline"] > 0.8
    assert 0.0 < busy["ours"] < 0.8
