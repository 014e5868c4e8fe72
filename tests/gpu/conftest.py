"""Kernels are compiled by many processes before the tests, which then find them on disk."""

import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context

import pytest
import torch

from tests import conformance
from tests.problems import CASES

PROCESSES = 12


def _compile(name: str, dtype: torch.dtype, backend: str) -> None:
    """Whether the result is right is for the tests to say."""
    case = next(case for case in CASES if case.name == name)
    with suppress(Exception):
        conformance.check_case(case, dtype, backend, "cuda")


@pytest.fixture(scope="session", autouse=True)
def compiled() -> None:
    """Every golden problem, once, on every GPU backend."""
    if not torch.cuda.is_available() or (os.cpu_count() or 1) < 4:
        return
    backends = [name for name in conformance.backends() if name != "pytorch"]
    halves = [(case, dtype) for case in CASES for dtype in case.dtypes if dtype is not torch.float64]
    workers = min(PROCESSES, (os.cpu_count() or 1) - 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_compile, case.name, dtype, backend) for case, dtype in halves for backend in backends]
        for job in jobs:
            job.result()
