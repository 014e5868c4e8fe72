"""Gloo processes for tests: one start a world size, many jobs in each.

A job is a function `job(rank, ranks) -> value` of a module that processes can import. Its values come back by rank; an
exception comes back as the text of its traceback. Processes are forked from a server that has imported torch once.
"""

import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Job = Callable[[int, int], Any]
SECONDS = 60
"""How long a collective waits for a process that does not come."""


class Failure(str):
    """The traceback of a job that raised."""


def run(jobs: Sequence[Job], ranks: int, folder: Path, seconds: float = SECONDS) -> list[list[Any]]:
    """The values of every job, by rank."""
    context: BaseContext = mp.get_context("forkserver")
    # What takes seconds to import, the compiler above all, which traces functions.
    imported = ["torch", "torch.distributed.tensor", "torch._inductor", "tests.distributed.jobs"]
    context.set_forkserver_preload(imported)  # type: ignore[attr-defined]
    arguments = (jobs, ranks, str(folder), seconds)
    mp.start_processes(_work, arguments, nprocs=ranks, start_method="forkserver")
    by_rank = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
    return [list(values) for values in zip(*by_rank, strict=True)]


def _work(rank: int, jobs: Sequence[Job], ranks: int, folder: str, seconds: float) -> None:
    torch.set_num_threads(1)
    method = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds))
    values = []
    for job in jobs:
        torch.manual_seed(0)
        try:
            values.append(job(rank, ranks))
        except Exception:
            values.append(Failure(traceback.format_exc()))
    torch.save(values, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def raised(values: Sequence[Any]) -> list[str]:
    """The last lines of the tracebacks of a job that every rank must fail."""
    assert all(isinstance(value, Failure) for value in values), values
    return [value.strip().splitlines()[-1] for value in values]


def succeeded(values: Sequence[Any]) -> Sequence[Any]:
    """The values of a job that no rank may fail."""
    for rank, value in enumerate(values):
        assert not isinstance(value, Failure), f"rank {rank}: {value}"
    return values
