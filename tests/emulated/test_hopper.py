"""The Hopper kernels against the reference, emulated: under every schedule of their asynchronous operations."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile.backends import hopper
from flashtile.backends.hopper import launch
from flashtile.problem import describe
from flashtile.request import Arguments, build
from flashtile.tuning.hopper import HopperConfig
from tests import oracle
from tests.emulated.hopper import Emulated
from tests.oracle import assert_equal_bits
from tests.problems import Case, Shape, dense
from tools.ptx_emulation import SWEEP

HALF, BRAIN = torch.float16, torch.bfloat16


def _case(name: str, shape: Shape, *features: str, dtype: torch.dtype = BRAIN) -> Case:
    return Case(name, shape, features, (dtype,))


CASES = (
    _case("plain", dense(1, 256, 256, 2, 2, 128)),
    _case("float16", dense(2, 130, 200, 1, 1, 128), dtype=HALF),
    _case("causal_gqa", dense(2, 200, 333, 4, 2, 128), "causal"),
    _case("causal_more_queries", dense(1, 300, 100, 2, 1, 128), "causal"),
    _case("headdim_64", dense(1, 300, 300, 2, 2, 64), "causal"),
    _case("window", dense(1, 200, 450, 2, 2, 64), "window"),
    _case("headdim_96", dense(1, 100, 150, 2, 1, 96), "causal"),
    _case("headdim_256", dense(1, 150, 200, 2, 2, 256), "causal"),
    _case("headdim_192_v_128", dense(1, 100, 130, 1, 1, 192, 128), "causal"),
    _case("one_query", dense(1, 1, 70, 2, 2, 64)),
)


def _run(case: Case, schedule: dict[str, Any], config: HopperConfig | None = None) -> tuple[Any, dict[str, Tensor]]:
    """(the call, its out, lse and gradients where there is a backward pass), with no complaint."""
    call = case.call(case.dtypes[0], "cpu")
    usual: dict[str, Any] = dict.fromkeys(Arguments._fields)
    usual |= {"causal": False, "dropout_p": 0.0, "alignment": "bottom_right", "return_lse": True}
    tensors = [call.leaves[name] for name in "qkv"]
    inputs, options = build(*tensors, Arguments(**{**usual, **call.arguments(call.leaves)}))  # type: ignore[arg-type]
    problem = describe(inputs, options)
    emulated = Emulated(schedule)
    out, lse = launch.forward(inputs, problem, config or hopper.configure(problem), emulated.machine)
    found = {"out": out, "lse": lse}
    back = describe(inputs, options, backward=True)
    if max(back.headdim, back.headdim_v) <= 128 and config is None:
        grads = (call.grads["out"], call.grads.get("lse"))
        gradients = launch.backward(inputs, back, hopper.configure(back), out, lse, *grads, emulated.machine)
        found |= {"dq": gradients.q, "dk": gradients.k, "dv": gradients.v}
    assert emulated.complaints == []
    return call, found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_matches_reference(case: Case) -> None:
    call, found = _run(case, SWEEP[0])
    oracle.compare(found, call)


@pytest.mark.parametrize("name", ["causal_gqa", "window"])
def test_every_schedule_gives_the_same_bits(name: str) -> None:
    """But for dQ, to which programs add in any order."""
    case = next(case for case in CASES if case.name == name)
    _, first = _run(case, SWEEP[0])
    for schedule in SWEEP[1:]:
        call, found = _run(case, schedule)
        oracle.compare({"dq": found.pop("dq")}, call)
        assert_equal_bits([*found.values()], [first[name] for name in found])


@pytest.mark.parametrize("stages", [1, 3])
def test_any_number_of_stages(stages: int) -> None:
    config = HopperConfig(consumers=2, tile_kv=64, stages=stages)
    call, found = _run(CASES[2], SWEEP[-1], config)
    oracle.compare(found, call)
