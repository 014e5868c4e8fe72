"""One memory measurement in a process of its own, so that no page of an earlier one is counted or reused.

`python -m flashtile.bench.subject '<case as JSON>' <peer> <pass>` prints what it measured as one line of JSON.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from flashtile.bench import cases, memory
from flashtile.bench.cases import Case
from flashtile.bench.peers import PEERS, Refused

PASSES = ("forward", "training")
"""The forward pass without gradients; forward and backward, as a training step does."""

WARM_UP = 128
"""Seqlen of the call before the measured one, which loads libraries and starts threads."""


def in_fresh_process(case: Case, peer: str, which: str) -> dict[str, Any]:
    """What `measure` returns, from a process started for it."""
    command = [sys.executable, "-m", "flashtile.bench.subject", json.dumps(asdict(case)), peer, which]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"status": "failed", "reason": f"the measuring process ended with {done.returncode}: {last}"}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(case: Case, peer: str, which: str) -> dict[str, Any]:
    """Peak memory beyond inputs and outputs.

    `extra_bytes` is by PyTorch's allocations, `resident_bytes` by the operating system (see `memory`); both less what
    the outputs take, which the call must make however it works.
    """
    try:
        small, _ = _call(replace(case, seqlen=min(case.seqlen, WARM_UP)), peer, which)
        call, outputs = _call(case, peer, which)
    except Refused as refusal:
        return {"status": "refused", "reason": str(refusal)}
    small()
    resident = memory.resident_peak(call) if case.device == "cpu" else None
    allocated = memory.allocated_peak(call, case.device)
    return {
        "status": "ok",
        "reason": "",
        "extra_bytes": max(0, allocated - outputs),
        "resident_bytes": None if resident is None else max(0, resident - outputs),
    }


def _call(case: Case, peer: str, which: str) -> tuple[Callable[[], Any], int]:
    """(the call to measure, the bytes of its outputs)."""
    inputs = cases.tensors(case)
    bound = PEERS[peer].bind(case, inputs)

    def forward() -> Any:
        with torch.no_grad():
            return bound.forward()

    def training() -> Any:
        result = bound.forward()
        return result, bound.backward(result)

    made = (inputs.grad,) if which == "forward" else inputs
    return (forward if which == "forward" else training), sum(t.numel() * t.element_size() for t in made)


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])), sys.argv[2], sys.argv[3])))
