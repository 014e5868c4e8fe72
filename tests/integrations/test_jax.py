"""JAX on the CPU: results and gradients under every transformation, beside the textbook formula in float64."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as Spec  # noqa: E402

from flashtile.integrations.jax import attention, ffi  # noqa: E402
from tests.integrations.jax_calls import HEADS, LENGTHS, array, compare, leaves, tensor_of, textbook  # noqa: E402
from tests.integrations.rule import assert_close, ran  # noqa: E402

causal = partial(attention, causal=True)


@pytest.fixture(autouse=True)
def _on_the_cpu() -> Iterator[None]:
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def _arrays(*names: str, **sizes: Any) -> dict[str, Any]:
    return {name: array(tensor) for name, tensor in leaves(*names, **sizes).items()}


class TestResults:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        plans = compare(causal, leaves(dtype=dtype), causal=True)
        assert [(plan.problem.backward, plan.problem.heads_kv) for plan in plans] == [(False, 2), (True, 2)]

    @pytest.mark.parametrize("named", [("bias",), ("shared", "sinks"), ("alibi_slopes",)])
    def test_gradients_of_what_is_added(self, named: tuple[str, ...]) -> None:
        compare(causal, leaves(*named), causal=True)

    def test_without_jit(self) -> None:
        compare(attention, leaves(), jitted=False)

    @pytest.mark.parametrize("rows", [(), (2,)])
    def test_segments(self, rows: tuple[int, ...]) -> None:
        """Ids of queries and of keys, shared by the batch or not, beside a mask of keys."""
        ids = [(torch.arange(length) * 3 // length).expand(*rows, length) for length in LENGTHS]
        kept = torch.arange(LENGTHS[1]) != 1
        given = partial(attention, segment_ids=tuple(map(array, ids)), mask=array(kept))
        compare(given, leaves(), allowed=(ids[0][..., :, None] == ids[1][..., None, :])[..., None, :, :] & kept)

    def test_one_array_of_segments(self) -> None:
        ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2], [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 1, 1, 1]])
        allowed = (ids[:, :, None] == ids[:, None, :])[:, None]
        compare(partial(causal, segment_ids=array(ids)), leaves(lengths=(13, 13)), allowed=allowed, causal=True)

    def test_log_sum_exp_has_a_gradient(self) -> None:
        given = leaves("sinks")

        def ours(arrays: Any) -> Any:
            out, lse = causal(**arrays, return_lse=True)
            return out.sum() + jnp.sin(lse).sum(), lse

        with ran():
            gradients, lse = jax.grad(ours, has_aux=True)({name: array(leaf) for name, leaf in given.items()})
        found = {"lse": lse, **gradients}
        two = []
        for dtype in (torch.float32, torch.float64):
            used = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in given.items()}
            out, expected = textbook(**used, causal=True)
            (out.sum() + expected.sin().sum()).backward()
            two.append({"lse": expected, **{name: leaf.grad for name, leaf in used.items()}})
        for name, result in found.items():
            assert_close(tensor_of(result), two[0][name], two[1][name], name)

    @pytest.mark.parametrize("batch", [(), (2, 3)])
    @pytest.mark.parametrize("name", ["bias", "shared"])
    def test_leading_dimensions(self, batch: tuple[int, ...], name: str) -> None:
        compare(attention, leaves(name, batch=batch))

    def test_constants_get_no_gradient(self) -> None:
        arrays = _arrays("shared")
        with ran() as plans:
            found = jax.grad(lambda given: attention(**given, constant=("bias",)).sum())(arrays)
        assert not plans[1].problem.wanted.bias
        assert not found["bias"].any()
        assert found["q"].any()

    def test_other_options_reach_the_kernel(self) -> None:
        with ran() as plans:
            attention(**_arrays(), window=(3, 0), softcap=2.0, scale=0.5, alignment="top_left", backend="pytorch")
        (plan,) = plans
        assert plan.problem.softcap
        assert "window" in plan.problem.mask
        assert "top_left" in plan.problem.mask

    @pytest.mark.parametrize("batch", [0, 2])
    def test_nothing_to_do(self, batch: int) -> None:
        assert attention(**_arrays(batch=(batch,), lengths=(0, 3))).shape == (batch, 0, HEADS, 8)


class TestTransformations:
    def test_checkpoint(self) -> None:
        plans = compare(jax.checkpoint(causal), leaves("shared"), jitted=False, causal=True)
        assert [plan.problem.backward for plan in plans] == [False, False, True]

    @pytest.mark.parametrize("named", [(), ("bias",), ("shared",), ("sinks",), ("alibi_slopes",)])
    def test_vmap_over_the_batch(self, named: tuple[str, ...]) -> None:
        given = leaves(*named)
        axes = {name: 0 if tensor.ndim == 4 else None for name, tensor in given.items()}
        axes |= {"bias": None} if named == ("shared",) else {}
        call = jax.vmap(lambda arrays: causal(**arrays), in_axes=(axes,))
        plans = compare(lambda **arrays: call(arrays), given, causal=True)
        # One call for all entries; only sinks, which a call knows once, need one for each entry's gradient.
        assert len(plans) == (3 if named == ("sinks",) else 2)

    @pytest.mark.parametrize("twice", [False, True])
    def test_vmap_of_batches(self, twice: bool) -> None:
        """A mapped axis beside a batch, and another inside of it, over some operands alone."""
        given = leaves("bias", batch=(3, 2))
        given["k"] = given["k"][0]
        inner = jax.vmap(lambda q, k, v, bias: attention(q, k, v, bias=bias)) if twice else None
        call = jax.vmap(inner or (lambda q, k, v, bias: attention(q, k, v, bias=bias)), in_axes=(0, None, 0, 0))
        plans = compare(lambda q, k, v, bias: call(q, k, v, bias), given)
        assert [plan.problem.batch for plan in plans] == [6, 6]

    def test_gradients_of_each_entry(self) -> None:
        """vmap of grad: every entry has its own gradient of a bias that all share."""
        given = leaves("shared")
        one = jax.grad(lambda bias, q, k, v: attention(q, k, v, bias=bias).sum())
        with ran():
            found = jax.vmap(one, in_axes=(None, 0, 0, 0))(*(array(given[name]) for name in ("bias", "q", "k", "v")))
        for entry in range(2):
            two = []
            for dtype in (torch.float32, torch.float64):
                bias = given["bias"].detach().to(dtype).requires_grad_()
                textbook(*(given[name][entry].to(dtype) for name in "qkv"), bias=bias)[0].sum().backward()
                two.append(bias.grad)
            assert_close(tensor_of(found[entry]), *two, "dbias")

    def test_sinks_of_each_entry(self) -> None:
        given = {**leaves(), "sinks": torch.randn(2, HEADS)}
        call = jax.vmap(lambda arrays: attention(**arrays))
        assert len(compare(lambda **arrays: call(arrays), given)) == 4

    @pytest.mark.parametrize("counted", [True, False])
    def test_shard_map(self, counted: bool) -> None:
        """Batch and heads over a mesh; the gradient of a bias that the batch's devices share is summed over them."""
        mesh = Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("batch", "heads"))
        rows, tables = Spec("batch", None, "heads"), Spec("heads")
        sharded = jax.shard_map(
            lambda q, k, v, bias: causal(q, k, v, bias=bias),
            mesh=mesh,
            in_specs=(rows, rows, rows, tables),
            out_specs=rows,
            check_vma=counted,
        )
        everywhere = NamedSharding(mesh, Spec())
        plans = compare(lambda q, k, v, bias: sharded(q, k, v, bias), leaves("shared"), everywhere, causal=True)
        assert len(plans) == 8
        assert {(plan.problem.batch, plan.problem.heads, plan.problem.heads_kv) for plan in plans} == {(1, 2, 1)}

    def test_sharded_arguments(self) -> None:
        """Without shard_map XLA gathers what a call needs."""
        mesh = Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("batch", "heads"))
        compare(causal, leaves(), NamedSharding(mesh, Spec("batch", None, "heads")), causal=True)

    def test_scan(self) -> None:
        given = leaves(lengths=(13, 13))

        def ours(q: Any, k: Any, v: Any) -> Any:
            return jax.lax.scan(lambda x, _: (attention(x, k, v), None), q, length=2)[0]

        with ran():
            found = tensor_of(jax.jit(ours)(**{name: array(tensor) for name, tensor in given.items()}))
        two = []
        for dtype in (torch.float32, torch.float64):
            q, k, v = (given[name].to(dtype) for name in "qkv")
            two.append(textbook(textbook(q, k, v)[0], k, v)[0])
        assert_close(found, *two)

    def test_text_of_the_call(self) -> None:
        """It says everything and the same each time, so that a cache of compiled functions holds."""
        arrays = _arrays()
        first, second = (jax.jit(partial(attention, window=(4, 0))).lower(**arrays).as_text() for _ in range(2))
        assert first == second
        assert "flashtile_forward" in first


class TestErrors:
    def test_checks_are_made_when_traced(self) -> None:
        given = _arrays()
        shapes = {name: jax.ShapeDtypeStruct(one.shape, one.dtype) for name, one in given.items()}
        with pytest.raises(ValueError, match=r"^softcap: got -1"):
            jax.eval_shape(partial(attention, softcap=-1.0), **shapes)
        with pytest.raises(ValueError, match=r"^bias: got shape"):
            attention(**given, bias=jnp.ones((5, 5)))
        with pytest.raises(ValueError, match=r"^segment_ids: got shape"):
            attention(**given, segment_ids=jnp.zeros(4, int))
        with pytest.raises(TypeError, match=r"^q: got dtype complex64"):
            attention(given["q"].astype(jnp.complex64), given["k"], given["v"])

    def test_what_fails_in_the_call_says_so(self) -> None:
        with pytest.raises(Exception, match="backend"):
            jax.block_until_ready(attention(**_arrays(), backend="hopper"))

    def test_handlers_pass_errors_on(self) -> None:
        def broken(operands: Any, results: Any, told: Any) -> None:
            raise LookupError(f"not {told['what']}")

        ffi.register("flashtile_test_broken", broken)
        call = jax.ffi.ffi_call("flashtile_test_broken", jax.ShapeDtypeStruct((1,), jnp.float32))
        with pytest.raises(Exception, match="LookupError: not this"):
            jax.block_until_ready(call(jnp.ones(1), told='{"what": "this"}'))

    def test_buffers_stay_where_they_are(self) -> None:
        """No copy on the way: the handler sees the addresses that XLA has."""
        seen = []

        def look(operands: Any, results: Any, told: Any) -> None:
            seen.append([tensor.data_ptr() for tensor in operands])
            results[0].copy_(operands[0])

        ffi.register("flashtile_test_look", look)
        given = jnp.ones((300, 7), jnp.bfloat16)
        call = jax.ffi.ffi_call("flashtile_test_look", jax.ShapeDtypeStruct(given.shape, given.dtype))
        assert (call(given, told="{}") == given).all()
        assert seen == [[given.unsafe_buffer_pointer()]]
