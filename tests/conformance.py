"""Every backend against every golden problem: results within the tolerance rule, and the kernel that was meant.

The functions here are what `test_conformance.py` and the GPU suite run; `python -m tests.conformance` prints the
measured errors as a table.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flashtile import decoding, plan, recall
from flashtile.plan import Plan
from tests import oracle
from tests.oracle import Ratio
from tests.problems import CASES, Case

HALF = (torch.float16, torch.bfloat16)

HOPPER_REFUSES = {
    *("headdim_1", "headdim_3_v_5", "headdim_512", "headdim_576_v_512", "no_queries", "no_keys"),
    *("no_keys_sinks", "no_batch", "no_batch_plain"),
    "varlen_no_sequences",
}
"""Problems in half precision whose forward or backward pass the Hopper backend leaves to others."""


@contextmanager
def watched() -> Iterator[list[Plan]]:
    """The Plans that run while the context is open, forward and backward alike. Calls are forgotten first: one that is
    done again asks no plan."""
    recall._known.clear()
    decoding._known.clear()
    ran: list[Plan] = []
    original: Callable[[Plan], Any] = plan.kernel

    def kernel(chosen: Plan) -> Any:
        ran.append(chosen)
        return original(chosen)

    plan.kernel = kernel
    try:
        yield ran
    finally:
        plan.kernel = original


def backends() -> list[str]:
    """The backends that can run here."""
    return [name for name, missing in plan.available() if missing is None]


def check_case(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu") -> tuple[list[Ratio], list[str]]:
    """Asserts that `backend` is right on this problem with the kernel that was meant; (errors, kernels that ran)."""
    call = case.call(dtype, device)
    with watched() as ran:
        results = oracle.ours(call, backend)
    assert [chosen.problem.backward for chosen in ran] == [False, True], "one forward and one backward must run"
    assert {chosen.backend for chosen in ran} == {backend}
    kernels = [chosen.kernel for chosen in ran]
    if backend in case.kernels:
        assert kernels[0] == case.kernels[backend]
    return oracle.compare(results, call), kernels


def main() -> None:
    """Prints, per backend, dtype and result, the largest error over all problems relative to what is allowed."""
    worst: dict[tuple[str, str, str], tuple[float, str]] = {}
    for backend in backends():
        for case in CASES:
            for dtype in case.dtypes:
                for ratio in check_case(case, dtype, backend)[0]:
                    key = (backend, str(dtype).removeprefix("torch."), ratio.name.split(" ")[0])
                    worst[key] = max(worst.get(key, (0.0, "")), (ratio.value, case.name))
    for (backend, name, result), (value, case_name) in sorted(worst.items()):
        print(f"{backend:10} {name:9} {result:14} {value:5.2f}  {case_name}")


if __name__ == "__main__":
    main()
