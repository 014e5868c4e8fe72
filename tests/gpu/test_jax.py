"""JAX on a GPU: XLA calls flashtile's kernels on its own stream and buffers."""

import os
from functools import partial
from typing import Any

import pytest
import torch

# JAX would take most of the memory for itself, which PyTorch's tests beside it need.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax = pytest.importorskip("jax", reason="jax is not installed")

from flashtile.integrations.jax import attention  # noqa: E402
from tests.integrations.jax_calls import array, compare, leaves, tensor_of, textbook  # noqa: E402
from tests.integrations.rule import assert_close, ran  # noqa: E402

causal = partial(attention, causal=True)


def _gpu() -> Any:
    try:
        return jax.devices("gpu")[0]
    except RuntimeError:
        return None


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or _gpu() is None, reason="needs a GPU that JAX and PyTorch see"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("headdim", [64, 40])
def test_results_and_gradients(dtype: torch.dtype, headdim: int) -> None:
    plans = compare(causal, leaves(dtype=dtype, headdim=headdim, lengths=(70, 90)), _gpu(), causal=True)
    assert [plan.problem.backward for plan in plans] == [False, True]
    assert {plan.backend for plan in plans} <= {"hopper", "portable"}
    assert {plan.problem.device for plan in plans} == {"cuda"}


@pytest.mark.parametrize("named", [("bias",), ("shared", "sinks"), ("alibi_slopes",)])
def test_gradients_of_what_is_added(named: tuple[str, ...]) -> None:
    given = leaves(*named, dtype=torch.bfloat16, headdim=64, lengths=(70, 90))
    compare(causal, given, _gpu(), causal=True)


def test_segments() -> None:
    """The same call twice with other ids in the same place: lists of tiles are made from what the buffer holds now."""
    given = leaves(dtype=torch.bfloat16, headdim=64, lengths=(300, 300))
    call = jax.jit(lambda ids, **arrays: causal(**arrays, segment_ids=ids))
    for parts in (3, 7):
        ids = torch.arange(300) * parts // 300
        allowed = ids[:, None] == ids[None, :]
        placed = array(ids, _gpu())
        compare(lambda placed=placed, **arrays: call(placed, **arrays), given, _gpu(), allowed=allowed, causal=True)


def test_vmap() -> None:
    given = leaves("shared", dtype=torch.bfloat16, headdim=64, lengths=(70, 90))
    call = jax.vmap(lambda q, k, v, bias: causal(q, k, v, bias=bias), in_axes=(0, 0, 0, None))
    plans = compare(lambda q, k, v, bias: call(q, k, v, bias), given, _gpu(), causal=True)
    assert len(plans) == 2


def test_between_operations_of_xla() -> None:
    """What XLA computes before is read, and what it computes after sees the result: one stream, many times over."""
    given = leaves(dtype=torch.bfloat16, headdim=64, lengths=(512, 512))

    @jax.jit
    def ours(q: Any, k: Any, v: Any) -> Any:
        return jax.lax.scan(lambda x, _: (attention(x * 2, k, v) + x, None), q, length=8)[0]

    with ran() as plans:
        found = ours(**{name: array(tensor, _gpu()) for name, tensor in given.items()})
        found = tensor_of(found)
    assert plans  # later rounds do again what the first ones did, with no plan
    two = []
    for dtype in (torch.bfloat16, torch.float64):
        x, k, v = (given[name].to(dtype) for name in "qkv")
        for _ in range(8):
            x = textbook(x * 2, k, v)[0] + x
        two.append(x)
    assert_close(found, *two)
