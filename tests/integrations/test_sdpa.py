"""`sdpa` against PyTorch's function in float64: results, gradients, what is left to PyTorch; and the ways it is put in
that function's place."""

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention.bias
import torch.nn.functional as F
from torch import Tensor

import flashtile
from flashtile.integrations import sdpa as module
from tests import conformance
from tests.integrations.rule import assert_close, ran


def _normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def _allowed(*shape: int) -> Tensor:
    allowed = torch.rand(*shape) > 0.4
    allowed[..., 0, :] = False  # a query that sees nothing
    return allowed


def _both(leaves: dict[str, Tensor], function: Any, dtype: torch.dtype | None = None, **options: Any) -> list[Tensor]:
    """The result and the gradients of the floating leaves."""
    used = {
        name: leaf.detach().to(dtype or leaf.dtype).requires_grad_() if leaf.is_floating_point() else leaf
        for name, leaf in leaves.items()
    }
    out = function(*used.values(), **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).sin()
    wanted = [leaf for leaf in used.values() if leaf.requires_grad]
    return [out, *torch.autograd.grad((out * weights.to(out.dtype)).sum(), wanted)]


def check(leaves: dict[str, Tensor], function: Any = flashtile.sdpa, **options: Any) -> None:
    with ran():
        found = _both(leaves, function, **options)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        textbook = _both(leaves, F.scaled_dot_product_attention, **options)
        truth = _both(leaves, F.scaled_dot_product_attention, torch.float64, **options)
    for name, *three in zip(("out", *(f"d{name}" for name in leaves)), found, textbook, truth, strict=False):
        assert_close(*three, name)


def _leaves(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...] | None = None, **more: Any) -> Any:
    dtype = more.pop("dtype", torch.float32)
    tensors = zip(("query", "key", "value"), (query, key, value or key), strict=True)
    return {**{name: _normal(*shape, dtype=dtype) for name, shape in tensors}, **more}


class TestAgainstPyTorch:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("causal", [False, True])
    def test_dtypes(self, dtype: torch.dtype, causal: bool) -> None:
        check(_leaves((2, 3, 21, 8), (2, 3, 21, 8), dtype=dtype), is_causal=causal)

    @pytest.mark.parametrize("lengths", [(9, 21), (21, 9)])
    def test_the_diagonal_starts_at_the_top_left(self, lengths: tuple[int, int]) -> None:
        check(_leaves((2, 2, lengths[0], 8), (2, 2, lengths[1], 8), (2, 2, lengths[1], 5)), is_causal=True, scale=0.7)

    @pytest.mark.parametrize("shape", [(2, 3, 9, 14), (1, 3, 9, 14), (2, 1, 1, 14), (9, 14), (3, 9, 14), (2, 1, 9, 1)])
    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_masks(self, shape: tuple[int, ...], kind: str) -> None:
        mask = _allowed(*shape) if kind == "bool" else _normal(*shape)
        check(_leaves((2, 3, 9, 8), (2, 3, 14, 8), attn_mask=mask))

    def test_float_mask_with_infinities(self) -> None:
        mask = _normal(2, 1, 9, 14).masked_fill(~_allowed(2, 1, 9, 14), -torch.inf)
        leaves = _leaves((2, 3, 9, 8), (2, 3, 14, 8))
        with ran():
            out = flashtile.sdpa(**leaves, attn_mask=mask)
        expected = F.scaled_dot_product_attention(**{k: v.double() for k, v in leaves.items()}, attn_mask=mask.double())
        torch.testing.assert_close(out, expected.float())

    def test_float32_mask_beside_half_precision(self) -> None:
        leaves = _leaves((1, 2, 9, 8), (1, 2, 9, 8), dtype=torch.bfloat16)
        check({**leaves, "attn_mask": _normal(9, 9)})

    @pytest.mark.parametrize("heads", [1, 2])
    def test_grouped_queries(self, heads: int) -> None:
        check(_leaves((2, 4, 9, 8), (2, heads, 9, 8)), enable_gqa=True, is_causal=True)

    @pytest.mark.parametrize(
        "shapes",
        [
            ((9, 8), (11, 8)),
            ((3, 9, 8), (3, 11, 8)),
            ((2, 2, 3, 9, 8), (2, 2, 3, 11, 8)),
            ((2, 1, 2, 3, 9, 8), (2, 1, 2, 3, 11, 8)),
            ((2, 3, 9, 8), (1, 3, 11, 8)),
            ((2, 4, 9, 8), (2, 1, 11, 8)),
            ((2, 1, 9, 8), (2, 4, 11, 8)),
            ((2, 3, 4, 9, 8), (1, 3, 1, 11, 8)),
            ((2, 3, 0, 8), (2, 3, 11, 8)),
            ((0, 3, 9, 8), (0, 3, 11, 8)),
        ],
        ids=str,
    )
    def test_any_number_of_dimensions(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        check(_leaves(*shapes))

    @pytest.mark.parametrize("shape", [(2, 3, 2, 9, 11), (2, 1, 2, 9, 11), (1, 1, 2, 9, 11), (1, 3, 1, 1, 11), (9, 11)])
    def test_masks_of_five_dimensions(self, shape: tuple[int, ...]) -> None:
        check(_leaves((2, 3, 2, 9, 8), (2, 3, 2, 11, 8), attn_mask=_normal(*shape)))

    def test_signature(self) -> None:
        """Names, order and defaults are those of the operator that PyTorch's function calls."""
        arguments = torch.ops.aten.scaled_dot_product_attention.default._schema.arguments
        ours = inspect.signature(flashtile.sdpa).parameters
        assert list(ours) == [argument.name for argument in arguments]
        for argument in arguments[3:]:
            assert ours[argument.name].default == argument.default_value
            assert (ours[argument.name].kind is inspect.Parameter.KEYWORD_ONLY) == argument.kwarg_only

    def test_dropout(self) -> None:
        """Keeps each weight with probability 1 - p: values of ones average to one, and the generator decides."""
        q, k, ones = _normal(2, 4, 64, 8), _normal(2, 4, 64, 8), torch.ones(2, 4, 64, 8)
        with ran():
            torch.manual_seed(1)
            first = flashtile.sdpa(q, k, ones, dropout_p=0.25)
            torch.manual_seed(1)
            again = flashtile.sdpa(q, k, ones, dropout_p=0.25)
        assert torch.equal(first, again)
        assert abs(first.mean().item() - 1) < 0.02
        assert first.std() > 0.05

    def test_the_result_needs_no_copy_for_a_projection(self) -> None:
        q = _normal(2, 3, 9, 8)
        out = flashtile.sdpa(q, q, q)
        assert out.transpose(-3, -2).flatten(-2).data_ptr() == out.data_ptr()

    def test_autocast(self) -> None:
        q = _normal(1, 2, 9, 8)
        with torch.autocast("cpu", torch.bfloat16), ran():
            assert flashtile.sdpa(q, q, q).dtype is torch.bfloat16


Q = torch.randn(2, 4, 9, 8)
LEFT = {
    "fp8": ({"query": Q.to(torch.float8_e4m3fn)}, "dtypes are"),
    "mixed": ({"key": Q.double()}, "dtypes are"),
    "devices": ({"key": Q.to("meta")}, "several devices"),
    "drop everything": ({"dropout_p": 1.0}, "dropout_p is 1.0"),
    "infinite scale": ({"scale": float("inf")}, "scale is inf"),
    "lengths": ({"value": Q[:, :, :5]}, "shapes are"),
    "heads": ({"key": Q[:, :3], "value": Q[:, :3]}, "shapes are"),
    "batch": ({"key": torch.randn(3, 4, 9, 8)}, "shapes are"),
    "rank": ({"key": Q[0]}, "shapes are"),
    "grouped values": ({"key": Q[:, :2], "enable_gqa": True}, "shapes are"),
    "both masks": ({"attn_mask": torch.ones(9, 9, dtype=torch.bool), "is_causal": True}, "both given"),
    "mask shape": ({"attn_mask": torch.ones(3, 9, 9, dtype=torch.bool)}, "attn_mask has shape"),
    "mask dtype": ({"attn_mask": torch.ones(9, 9, dtype=torch.int32)}, "attn_mask is torch.int32"),
    "nested": ({name: torch.nested.nested_tensor([Q[0], Q[1]]) for name in ("query", "key", "value")}, "nested"),
    "sparse": ({"attn_mask": torch.ones(9, 9).to_sparse()}, "strided"),
}


class TestLeftToPyTorch:
    @pytest.mark.parametrize("case", LEFT)
    def test_reasons(self, case: str) -> None:
        changes, reason = LEFT[case]
        assert reason in str(module.refusal(**{"query": Q, "key": Q, "value": Q, **changes}))

    @pytest.mark.parametrize("case", LEFT)
    def test_the_outcome_is_pytorchs(self, case: str, caplog: pytest.LogCaptureFixture) -> None:
        """The same values, or the same error."""
        arguments = {"query": Q, "key": Q, "value": Q, **LEFT[case][0]}

        def outcome(function: Any) -> Any:
            try:
                return function(**arguments)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                return f"{type(error).__name__}: {error}"

        expected = outcome(F.scaled_dot_product_attention)
        with caplog.at_level(logging.INFO, logger="flashtile"), conformance.watched() as plans:
            found = outcome(flashtile.sdpa)
        assert plans == []
        assert "left to PyTorch" in caplog.text
        if isinstance(expected, Tensor) and not expected.is_nested:
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        else:
            assert type(found) is type(expected)
            assert expected.is_nested if isinstance(expected, Tensor) else found == expected

    def test_transforms(self) -> None:
        """torch.func's derivatives are PyTorch's business."""
        found = torch.vmap(flashtile.sdpa)(Q[:, None], Q[:, None], Q[:, None])
        torch.testing.assert_close(found, torch.vmap(F.scaled_dot_product_attention)(*[Q[:, None]] * 3))


def _layer(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


@pytest.mark.parametrize("masked", [False, True])
def test_compiled_for_any_length(masked: bool) -> None:
    """One graph serves all lengths, with flashtile's operator in it."""
    graphs: list[Any] = []

    def keep(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Layer(torch.nn.Module):
        scale = 0.3  # which the compiler makes a symbol

        def forward(self, *tensors: Any) -> Tensor:
            return flashtile.sdpa(*tensors, enable_gqa=True, scale=self.scale)

    compiled = torch.compile(Layer(), fullgraph=True, dynamic=True, backend=keep)
    for length in (9, 13, 17):
        q, k = torch.randn(2, 4, length, 8), torch.randn(2, 2, length + 3, 8)
        mask = torch.rand(2, 1, length, length + 3) > 0.3 if masked else None
        expected = F.scaled_dot_product_attention(q, k, k, mask, enable_gqa=True, scale=0.3)
        torch.testing.assert_close(compiled(q, k, k, mask), expected)
    assert len(graphs) == 1
    assert "flashtile.forward" in graphs[0].code


class TestReplace:
    @pytest.mark.parametrize("masked", [False, True])
    def test_calls_inside_are_ours(self, masked: bool) -> None:
        leaves = _leaves((2, 3, 9, 8), (2, 3, 9, 8), **({"mask": _allowed(2, 1, 9, 9)} if masked else {}))
        with flashtile.replace_sdpa():
            check_like = _both(leaves, _layer)
            with ran():
                _layer(*leaves.values())
        with conformance.watched() as plans:
            expected = _both(leaves, _layer)
        assert plans == [], "the context reaches beyond its end"
        for found, wanted in zip(check_like, expected, strict=True):
            torch.testing.assert_close(found, wanted)

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("causal", [False, True])
    def test_layers_of_pytorch(self, training: bool, causal: bool) -> None:
        """What calls attention inside of a function of PyTorch's own."""
        layer = torch.nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True).train(training)
        x, mask = torch.randn(2, 7, 16), torch.nn.Transformer.generate_square_subsequent_mask(7)
        options = {"src_mask": mask, "is_causal": True} if causal else {}
        padding = torch.arange(7) >= torch.tensor([[5], [7]])
        with flashtile.replace_sdpa(), ran() as plans:
            found = layer(x, src_key_padding_mask=None if causal else padding, **options)
        assert len(plans) == 1
        expected = layer(x, src_key_padding_mask=None if causal else padding, **options)
        kept = torch.ones(2, 7, 1, dtype=torch.bool) if causal else ~padding[..., None]
        torch.testing.assert_close(found.where(kept, 0), expected.where(kept, 0), rtol=1e-4, atol=1e-5)

    def test_layers_of_pytorch_compiled(self) -> None:
        layer = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        x = torch.randn(2, 7, 16)
        with flashtile.replace_sdpa(), ran():
            found, _ = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, x, x, need_weights=False)
        torch.testing.assert_close(found, layer(x, x, x, need_weights=False)[0], rtol=1e-4, atol=1e-5)

    def test_causal_bias(self) -> None:
        """PyTorch's own lazy masks stay PyTorch's."""
        q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
        bias = torch.nn.attention.bias.causal_lower_right(3, 5)
        expected = F.scaled_dot_product_attention(q, k, k, bias)
        with flashtile.replace_sdpa(), conformance.watched() as plans:
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, k, bias), expected)
        assert plans == []

    def test_what_is_left_to_pytorch_ends_there(self) -> None:
        with flashtile.replace_sdpa(), conformance.watched() as plans:
            F.scaled_dot_product_attention(Q, Q, Q, dropout_p=1.0)
        assert plans == []

    def test_compiled(self) -> None:
        compiled = torch.compile(_layer, fullgraph=True, backend="aot_eager")
        with flashtile.replace_sdpa(), ran():
            found = compiled(Q, Q, Q, torch.ones(9, 9, dtype=torch.bool).tril())
        torch.testing.assert_close(found, F.scaled_dot_product_attention(Q, Q, Q, is_causal=True))


@pytest.fixture
def activated() -> Iterator[None]:
    """PyTorch's CPU operator is ours; on a GPU the same code overrides the GPU's (tests/gpu/test_integrations.py)."""
    flashtile.activate_sdpa("cpu")
    yield
    flashtile.deactivate_sdpa()


@pytest.mark.usefixtures("activated")
class TestActivated:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("causal", [False, True])
    def test_results(self, dtype: torch.dtype, causal: bool) -> None:
        check(
            _leaves((2, 3, 9, 8), (2, 3, 9, 8), dtype=dtype), lambda *t, **o: F.scaled_dot_product_attention(*t, **o),
            is_causal=causal,
        )  # fmt: skip

    def test_forward_and_backward_are_ours(self) -> None:
        q = Q.clone().requires_grad_()
        with ran() as plans:
            F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
        assert [plan.problem.backward for plan in plans] == [False, True]
        assert torch.nn.attention.current_flash_attention_impl() == "flashtile"

    @pytest.mark.parametrize("layout", ["heads first", "sequence first"])
    def test_strides_are_those_that_compiled_code_expects(self, layout: str) -> None:
        q = Q if layout == "heads first" else Q.transpose(1, 2).contiguous().transpose(1, 2)
        with ran():
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)
        meta = q.to("meta")
        promised = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(meta, meta, meta)
        assert out.stride() == torch.empty_like(q).stride()
        assert lse.stride() == promised[1].stride()

    def test_compiled(self) -> None:
        q = Q.clone().requires_grad_()
        compiled = torch.compile(_layer, fullgraph=True, backend="aot_eager")
        with ran() as plans:
            compiled(q, q, q).sum().backward()
        assert [plan.problem.backward for plan in plans] == [False, True]

    def test_masked_calls_run_pytorchs_kernel(self) -> None:
        with conformance.watched() as plans:
            found = F.scaled_dot_product_attention(Q, Q, Q, torch.ones(9, 9, dtype=torch.bool).tril())
        assert plans == []
        torch.testing.assert_close(found, flashtile.sdpa(Q, Q, Q, is_causal=True))

    def test_restored(self) -> None:
        flashtile.deactivate_sdpa()
        with conformance.watched() as plans:
            F.scaled_dot_product_attention(Q, Q, Q)
        assert plans == []
        assert torch.nn.attention.current_flash_attention_impl() is None
        flashtile.deactivate_sdpa()  # once more does nothing


class TestErrors:
    def test_device(self) -> None:
        with pytest.raises(ValueError, match="device: got 'tpu', need one of 'cuda', 'cpu'; try 'cuda'"):
            flashtile.activate_sdpa("tpu")

    def test_older_pytorch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
        with pytest.raises(NotImplementedError, match=r"activate_sdpa: got a PyTorch without .* try flashtile.replace"):
            flashtile.activate_sdpa("cpu")
