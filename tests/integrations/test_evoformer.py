"""Evoformer, gated and triangle attention against their formulas in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile.integrations import evoformer
from flashtile.integrations.evoformer import (
    DS4Sci_EvoformerAttention,
    GatedAttention,
    TriangleAttention,
    evoformer_attention,
    triangle_attention,
)
from tests.integrations.rule import assert_close, ran

ROWS, LENGTH, HEADS, HEADDIM = 3, 13, 2, 8
Leaves = dict[str, Tensor]


def _leaves(*leading: int, keys: int = LENGTH, dtype: torch.dtype = torch.float32) -> Leaves:
    shapes = {
        "q": (*leading, ROWS, LENGTH, HEADS, HEADDIM),
        "k": (*leading, ROWS, keys, HEADS, HEADDIM),
        "v": (*leading, ROWS, keys, HEADS, HEADDIM),
        "over_keys": (*leading, ROWS, 1, 1, keys),
        "over_pairs": (*leading, 1, HEADS, LENGTH, keys),
    }
    return {name: torch.randn(*shape).to(dtype) for name, shape in shapes.items()}


def _textbook(q: Tensor, k: Tensor, v: Tensor, biases: list[Tensor | None], scale: float | None = None) -> Tensor:
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    for bias in biases:
        scores = scores if bias is None else scores + bias
    return torch.einsum("...hqk,...khd->...qhd", torch.softmax(scores, dim=-1), v)


def _run(
    function: Any, leaves: Leaves, order: tuple[str | None, ...], dtype: torch.dtype | None = None
) -> list[Tensor]:
    used = {name: leaf.detach().to(dtype or leaf.dtype).requires_grad_() for name, leaf in leaves.items()}
    out = function(used["q"], used["k"], used["v"], [None if name is None else used[name] for name in order])
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().reshape(out.shape).to(out.dtype)
    wanted = [used[name] for name in ("q", "k", "v", *filter(None, order))]
    return [out, *torch.autograd.grad((out * weights).sum(), wanted)]


def _compare(leaves: Leaves, order: tuple[str | None, ...]) -> None:
    with ran():
        found = _run(evoformer_attention, leaves, order)
    textbook, truth = _run(_textbook, leaves, order), _run(_textbook, leaves, order, torch.float64)
    names = ("out", "dq", "dk", "dv", *(f"d{name}" for name in filter(None, order)))
    for name, *three in zip(names, found, textbook, truth, strict=True):
        assert_close(*three, name)


def _nodes(tensor: Tensor) -> set[str]:
    """The names of all steps of autograd behind a tensor."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node.name() not in seen:
            seen.add(node.name())
            nodes += [following for following, _ in node.next_functions]
    return seen


BIASES = [
    (),
    ("over_keys",),
    ("over_pairs",),
    ("over_keys", "over_pairs"),
    ("over_pairs", "over_keys"),
    (None, "over_pairs"),
    ("over_keys", None),
    (None, None),
]


class TestOperator:
    @pytest.mark.parametrize("order", BIASES, ids=str)
    @pytest.mark.parametrize("leading", [(1,), (2,)])
    def test_results_and_all_gradients(self, order: tuple[str | None, ...], leading: tuple[int, ...]) -> None:
        _compare(_leaves(*leading), order)

    @pytest.mark.parametrize("leading", [(), (2, 1, 2)], ids=str)
    def test_other_leading_dimensions(self, leading: tuple[int, ...]) -> None:
        _compare(_leaves(*leading), ("over_keys", "over_pairs"))

    @pytest.mark.parametrize("leading", [(0,), (0, 2)], ids=str)
    @pytest.mark.parametrize("order", BIASES, ids=str)
    def test_no_batch_entries(self, order: tuple[str | None, ...], leading: tuple[int, ...]) -> None:
        leaves = _leaves(*leading)
        for found, name in zip(_run(evoformer_attention, leaves, order), ("out", *leaves), strict=False):
            assert found.shape[: len(leading)] == leading, name

    def test_half_precision_and_other_keys(self) -> None:
        _compare(_leaves(1, keys=21, dtype=torch.bfloat16), ("over_keys", "over_pairs"))

    def test_one_row(self) -> None:
        """A bias of keys has the shape that one of pairs would have if there were one head and one query."""
        leaves = {name: leaf[:, :1] for name, leaf in _leaves(1).items()}
        _compare(leaves, ("over_keys", "over_pairs"))
        _compare(leaves, ("over_keys",))

    def test_mask_of_large_numbers(self) -> None:
        leaves = _leaves(1)
        kept = torch.rand(1, ROWS, 1, 1, LENGTH) > 0.4
        leaves["over_keys"] = 1e9 * (kept.float() - 1)
        _compare(leaves, ("over_keys", "over_pairs"))

    @pytest.mark.parametrize("entries", [1, 3])
    def test_neither_bias_is_expanded_and_nothing_is_copied(
        self, entries: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        leaves, seen = _leaves(entries), []
        original = evoformer.attention

        def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            seen.append((q, k, v, options["bias"], options["score_mod"].__closure__[0].cell_contents))
            return original(q, k, v, **options)

        monkeypatch.setattr(evoformer, "attention", spy)
        evoformer_attention(*list(leaves.values())[:3], [leaves["over_keys"], leaves["over_pairs"]])
        (tensors,) = seen
        given = [leaves[name] for name in ("q", "k", "v", "over_pairs", "over_keys")]
        assert [tensor.data_ptr() for tensor in tensors] == [tensor.data_ptr() for tensor in given]
        assert tensors[3].shape == ((1,) if entries == 1 else (entries, 1)) + (HEADS, LENGTH, LENGTH)
        assert tensors[4].shape == (entries * ROWS, LENGTH)

    def test_a_projection_of_pairs_is_laid_out_by_keys(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Once for all rows; what is broadcast over keys is left as it is."""
        seen: list[Tensor] = []
        original = evoformer.attention

        def spy(*inputs: Tensor, **options: Any) -> Any:
            seen.append(options["bias"])
            return original(*inputs, **options)

        monkeypatch.setattr(evoformer, "attention", spy)
        leaves = _leaves(1)
        q, k, v, over_keys, over_pairs = leaves.values()
        projected = over_pairs.movedim(-3, -1).contiguous().movedim(-1, -3)
        broadcast = over_pairs[..., :1].expand_as(over_pairs)
        out = evoformer_attention(q, k, v, [over_keys, projected])
        torch.testing.assert_close(out, evoformer_attention(q, k, v, [over_keys, over_pairs]))
        rows_first = [tensor.transpose(2, 3) for tensor in (q, k, v)]
        triangle_attention(*rows_first, projected)
        evoformer_attention(q, k, v, [broadcast])
        assert [bias.stride(-1) for bias in seen] == [1, 1, 1, 0]

    @pytest.mark.parametrize("dims", [(1,), (1, 1), (2,), (2, 3)], ids=str)
    def test_gradients_are_not_copied(self, dims: tuple[int, ...]) -> None:
        """All between the operator and its arguments are views, whose gradients are views too."""
        leaves = [leaf.requires_grad_(name != "over_keys") for name, leaf in _leaves(*dims).items()]
        seen = _nodes(evoformer_attention(*leaves[:3], leaves[3:]))
        assert not seen & {"UnbindBackward0", "SelectBackward0", "StackBackward0", "CatBackward0"}, seen

    def test_the_list_stays_as_it_is(self) -> None:
        leaves = _leaves(1)
        biases = [leaves["over_keys"]]
        DS4Sci_EvoformerAttention(leaves["q"], leaves["k"], leaves["v"], biases)
        assert len(biases) == 1

    def test_no_batch_at_all(self) -> None:
        leaves = {name: leaf.requires_grad_() for name, leaf in _leaves(0).items() if name in "qkv"}
        out = evoformer_attention(leaves["q"], leaves["k"], leaves["v"])
        assert out.shape == leaves["q"].shape
        grads = torch.autograd.grad(out.sum(), list(leaves.values()))
        assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves.values()]


class TestTriangle:
    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_function(self, batch: int, masked: bool) -> None:
        leaves = _leaves(batch)
        del leaves["over_keys"]
        mask = torch.rand(batch, ROWS, 1, 1, LENGTH) > 0.4 if masked else None
        if mask is not None:
            mask[..., 0] = True

        def ours(q: Tensor, k: Tensor, v: Tensor, biases: list[Tensor]) -> Tensor:
            heads_first = (tensor.transpose(-2, -3) for tensor in (q, k, v))
            return triangle_attention(*heads_first, biases[0], mask, 0.4).transpose(-2, -3)

        def formula(q: Tensor, k: Tensor, v: Tensor, biases: list[Tensor]) -> Tensor:
            hidden = None if mask is None else torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
            return _textbook(q, k, v, [biases[0], hidden], scale=0.4)

        with ran():
            found = _run(ours, leaves, ("over_pairs",))
        textbook = _run(formula, leaves, ("over_pairs",))
        truth = _run(formula, leaves, ("over_pairs",), torch.float64)
        for name, *three in zip(("out", "dq", "dk", "dv", "dbias"), found, textbook, truth, strict=True):
            assert_close(*three, name)

    def test_a_row_without_keys(self) -> None:
        q = torch.randn(1, 2, HEADS, 5, HEADDIM)
        mask = torch.ones(1, 2, 1, 1, 5, dtype=torch.bool)
        mask[0, 1] = False
        out = triangle_attention(q, q, q, torch.zeros(1, 1, HEADS, 5, 5), mask)
        assert (out[0, 1] == 0).all()
        assert (out[0, 0] != 0).any()


def _gated(module: GatedAttention, q_x: Tensor, kv_x: Tensor, biases: list[Tensor | None]) -> Tensor:
    """AlphaFold 2's formula."""
    q, k, v = (
        linear(x).unflatten(-1, (HEADS, -1))
        for linear, x in ((module.linear_q, q_x), (module.linear_k, kv_x), (module.linear_v, kv_x))
    )
    out = _textbook(q, k, v, biases).flatten(-2)
    if module.linear_g is not None:
        out = torch.sigmoid(module.linear_g(q_x)) * out
    return module.linear_o(out)


def _triangle(module: TriangleAttention, x: Tensor, mask: Tensor) -> Tensor:
    if not module.starting:
        x, mask = x.transpose(-2, -3), mask.transpose(-1, -2)
    x = module.layer_norm(x)
    pairs = module.linear(x).permute(0, 3, 1, 2)[:, None]
    out = _gated(module.mha, x, x, [(1e9 * (mask - 1))[..., None, None, :], pairs])
    return out if module.starting else out.transpose(-2, -3)


def _module_results(module: torch.nn.Module, call: Any, dtype: torch.dtype, *inputs: Tensor) -> list[Tensor]:
    module = module.to(dtype)
    out = call(module, *[tensor.to(dtype) for tensor in inputs])
    weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).sin().reshape(out.shape)
    found = [out, *torch.autograd.grad((out * weights).sum(), list(module.parameters()))]
    return [tensor.detach().clone() for tensor in found]


def _compare_modules(module: torch.nn.Module, formula: Any, *inputs: Tensor) -> None:
    def own(module: torch.nn.Module, *inputs: Tensor) -> Tensor:
        return module(*inputs)

    with ran():
        found = _module_results(module, own, torch.float32, *inputs)
    textbook = _module_results(module, formula, torch.float32, *inputs)
    truth = _module_results(module, formula, torch.float64, *inputs)
    largest = max(tensor.abs().max().item() for tensor in truth[1:])
    names = ("out", *(name for name, _ in module.named_parameters()))
    for name, *three in zip(names, found, textbook, truth, strict=True):
        assert_close(*three, name, scale=0.0 if name == "out" else largest)


class TestModules:
    @pytest.mark.parametrize("gating", [False, True])
    def test_gated(self, gating: bool) -> None:
        module = GatedAttention(10, 12, 12, HEADDIM, HEADS, gating)
        leaves = _leaves(1)
        biases = [leaves["over_keys"], leaves["over_pairs"]]
        q_x, kv_x = torch.randn(1, ROWS, LENGTH, 10), torch.randn(1, ROWS, LENGTH, 12)

        def own(module: Any, *inputs: Tensor) -> Tensor:
            return module(*inputs[:2], list(inputs[2:]))

        def formula(module: Any, *inputs: Tensor) -> Tensor:
            return _gated(module, *inputs[:2], list(inputs[2:]))

        with ran():
            found = _module_results(module, own, torch.float32, q_x, kv_x, *biases)
        textbook = _module_results(module, formula, torch.float32, q_x, kv_x, *biases)
        truth = _module_results(module, formula, torch.float64, q_x, kv_x, *biases)
        for three in zip(found, textbook, truth, strict=True):
            assert_close(*three)

    @pytest.mark.parametrize("starting", [True, False])
    def test_triangle(self, starting: bool) -> None:
        module = TriangleAttention(10, HEADDIM, HEADS, starting)
        mask = (torch.rand(1, 11, 11) > 0.3).float()
        _compare_modules(module, _triangle, torch.randn(1, 11, 11, 10), mask)

    @pytest.mark.parametrize("starting", [True, False])
    @pytest.mark.parametrize("leading", [(), (1,), (2,), (2, 3), (0,)], ids=str)
    def test_pairs_are_projected_with_heads_in_front(
        self, leading: tuple[int, ...], starting: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As the layer would, and without a copy of anything on the way to the kernels."""
        seen: list[Tensor] = []
        original = evoformer.attention

        def spy(*inputs: Tensor, **options: Any) -> Any:
            seen.extend((*inputs, options["bias"]))
            return original(*inputs, **options)

        monkeypatch.setattr(evoformer, "attention", spy)
        module, x = TriangleAttention(10, HEADDIM, HEADS, starting), torch.randn(*leading, 11, 11, 10)
        out = module(x)
        normed = module.layer_norm(x if starting else x.transpose(-2, -3))
        wanted = module.linear(normed).movedim(-1, -3)
        torch.testing.assert_close(seen[-1].reshape(wanted.shape), wanted)
        assert out.shape == x.shape
        assert all(tensor.is_contiguous() for tensor in seen)
        assert not {"CloneBackward0", "CopyBackwards"} & _nodes(seen[-1])

    def test_names_are_openfolds(self) -> None:
        names = set(TriangleAttention(10, HEADDIM, HEADS).state_dict())
        linear = {f"mha.linear_{part}.weight" for part in "qkvog"} | {"mha.linear_o.bias", "mha.linear_g.bias"}
        assert names == linear | {"layer_norm.weight", "layer_norm.bias", "linear.weight"}


Q = torch.randn(2, ROWS, LENGTH, HEADS, HEADDIM)
PAIR = torch.randn(2, 1, HEADS, LENGTH, LENGTH)
T = Q.transpose(-2, -3)
ERRORS = {
    "rank": (lambda: evoformer_attention(Q[0, 0], Q, Q), r"q: got shape \(13, 2, 8\), need \(\.\.\., rows, seqlen"),
    "rows": (lambda: evoformer_attention(Q, Q[:, :2], Q), r"k: got shape .*, need \(2, 3\) before the last three"),
    "three": (lambda: evoformer_attention(Q, Q, Q, [PAIR] * 3), "biases: got 3, need at most two; try adding"),
    "shape": (lambda: evoformer_attention(Q, Q, Q, [PAIR[:1]]), r"biases\[0\]: got shape \(1, 1, 2, 13, 13\), need"),
    "twice": (lambda: evoformer_attention(Q, Q, Q, [PAIR, PAIR]), "biases: got two of shape .*; try their sum"),
    "triangle": (lambda: triangle_attention(T[0], T, T, PAIR), r"q: got shape .*, need \(batch, rows, heads, seqlen"),
    "triangle bias": (lambda: triangle_attention(T, T, T, PAIR[0]), r"bias: got shape .*, need \(2, 1, 2, 13, 13\)"),
    "triangle mask": (
        lambda: triangle_attention(T, T, T, PAIR, torch.ones(13, dtype=torch.bool)),
        r"mask: got shape \(13,\), need \(2, 3, 1, 1, 13\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call()
