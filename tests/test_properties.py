"""Random shapes, strides and options; awkward lengths; what must not be read; what must repeat."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import flashtile
from flashtile import State, masks
from tests import oracle
from tests.oracle import assert_equal_bits
from tests.problems import Call, Shape, Tensors, make, offsets, packed
from tests.views import VIEWS

SLACK = 4.0
LENGTH = st.integers(0, 80)
MASKINGS = (
    (),
    ("causal",),
    ("causal_top_left",),
    ("window",),
    ("document",),
    ("dense_mask",),
    ("mask_mod",),
    ("block",),
)
MODIFIERS = ("bias", "bias_heads", "bias_keys", "bias_queries", "alibi", "softcap", "sinks", "score_mod", "dropout")
FEATURES = st.builds(
    lambda masking, modifiers: (*masking, *modifiers),
    st.sampled_from(MASKINGS),
    st.lists(st.sampled_from(MODIFIERS), max_size=3, unique_by=lambda name: name.split("_")[0]),
)
HEADS = st.tuples(st.integers(1, 3), st.integers(1, 4))
SHAPES = st.builds(
    lambda batch, seqlen_q, seqlen_kv, heads, headdim, headdim_v: Shape(
        batch, seqlen_q, seqlen_kv, heads[0] * heads[1], heads[0], headdim, headdim_v
    ),
    st.integers(0, 3),
    LENGTH,
    LENGTH,
    HEADS,
    st.integers(1, 24),
    st.integers(1, 24),
)


@given(SHAPES, FEATURES)
@example(Shape(2, 0, 0, 2, 1, 8, 8), ("causal", "bias", "sinks"))
@example(Shape(0, 5, 7, 2, 1, 8, 8), ("document", "score_mod"))
@example(Shape(1, 1, 80, 4, 1, 8, 8), ("causal",))
def test_any_shape_and_options(shape: Shape, features: tuple[str, ...]) -> None:
    oracle.check(make("properties", shape, features, torch.float32), slack=SLACK)


@given(SHAPES, FEATURES, st.sampled_from([torch.bfloat16, torch.float16]))
def test_any_shape_in_half_precision(shape: Shape, features: tuple[str, ...], dtype: torch.dtype) -> None:
    """From 16 queries and keys on: over one key the textbook formula makes no error at all, and twice that is none."""
    shape = replace(shape, seqlen_q=16 + shape.seqlen_q, seqlen_kv=16 + shape.seqlen_kv)
    oracle.check(make("half", shape, features, dtype), slack=SLACK)


LENGTHS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=5)


@given(LENGTHS, HEADS, FEATURES, st.booleans())
def test_any_packing(
    lengths: list[tuple[int, int]], heads: tuple[int, int], features: tuple[str, ...], halved: bool
) -> None:
    """Sequences of any lengths, some without queries or keys; `halved`: only half of each is in use."""
    queries, keys = tuple(pair[0] for pair in lengths), tuple(pair[1] for pair in lengths)
    used = (tuple(n // 2 for n in queries), tuple(n // 2 for n in keys)) if halved else (None, None)
    shape = packed(queries, keys, heads[0] * heads[1], heads[0], 12, *used)
    features = tuple(feature for feature in features if feature != "block")
    oracle.check(make("packing", shape, features, torch.float32), slack=SLACK)


# Strides.


VIEW = st.sampled_from(list(VIEWS))
STRIDED_OPTIONS = ((), ("causal",), ("causal", "bias", "sinks"), ("gqa", "softcap"))


def _restrided(call: Call, views: dict[str, str]) -> Call:
    leaves = {name: VIEWS[views.get(name, "contiguous")](leaf) for name, leaf in call.leaves.items()}
    grads = {**call.grads, "out": VIEWS[views["grad"]](call.grads["out"])}
    return replace(call, leaves=leaves, grads=grads)


def _keep_strides(call: Call) -> Tensors:
    """Like `oracle.ours`, but the views themselves are the leaves."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in call.leaves.items()}
    options = call.arguments(leaves)
    out = flashtile.attention(leaves["q"], leaves["k"], leaves["v"], **options)
    assert isinstance(out, Tensor)
    assert out.is_contiguous()
    grads = torch.autograd.grad(out, list(leaves.values()), call.grads["out"])
    return {"out": out.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


@given(st.fixed_dictionaries(dict.fromkeys(("q", "k", "v", "bias", "grad"), VIEW)), st.sampled_from(STRIDED_OPTIONS))
def test_any_strides(views: dict[str, str], features: tuple[str, ...]) -> None:
    call = make("strides", Shape(2, 21, 21, 4, 4, 8, 8), features, torch.float32, lse_grad=False)
    oracle.compare(_keep_strides(_restrided(call, views)), call, SLACK)


@pytest.mark.parametrize("features", STRIDED_OPTIONS)
@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1, 2)])
def test_expanded_inputs(features: tuple[str, ...], dims: tuple[int, ...]) -> None:
    """Stride 0 in q, k and v: the same as the copied tensors, gradients included."""
    call = make("expanded", Shape(2, 21, 21, 4, 4, 8, 8), features, torch.float32, lse_grad=False)
    firsts = {name: _first(call.leaves[name], dims) for name in ("q", "k", "v")}
    copies = {name: tensor.expand_as(call.leaves[name]).contiguous() for name, tensor in firsts.items()}
    wanted = _keep_strides(replace(call, leaves={**call.leaves, **copies}))
    views = {name: tensor.expand_as(call.leaves[name]) for name, tensor in firsts.items()}
    found = _keep_strides(replace(call, leaves={**call.leaves, **views}))
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-5)


def _first(tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
    for dim in dims:
        tensor = tensor.narrow(dim, 0, 1)
    return tensor


@pytest.mark.parametrize("features", STRIDED_OPTIONS)
@pytest.mark.parametrize("reduce", [Tensor.sum, Tensor.mean, lambda out: out[:, -1].sum(), lambda out: out.mT.sum()])
def test_gradients_with_stride_zero(features: tuple[str, ...], reduce: Callable[[Tensor], Tensor]) -> None:
    """`out.sum().backward()` hands over an expanded gradient."""
    call = make("sum", Shape(2, 21, 21, 4, 4, 8, 8), features, torch.float32)
    leaves = {name: leaf.requires_grad_() for name, leaf in call.leaves.items()}
    out = flashtile.attention(leaves["q"], leaves["k"], leaves["v"], **call.arguments())
    assert isinstance(out, Tensor)
    found = torch.autograd.grad(reduce(out), list(leaves.values()), retain_graph=True)
    copy = out.detach().requires_grad_()
    (plain,) = torch.autograd.grad(reduce(copy), [copy])
    for one, other in zip(found, torch.autograd.grad(out, list(leaves.values()), plain.clone()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_packed_strides() -> None:
    """q, k and v as parts of one tensor, as a fused projection leaves them."""
    shape = packed((9, 0, 14), (9, 0, 14), 4, 4, 8)
    call = make("qkv", shape, ("causal",), torch.float32)
    fused = torch.stack([call.leaves[name] for name in "qkv"], dim=1)
    views = {name: fused[:, i] for i, name in enumerate("qkv")}
    assert_equal_bits(_packed(replace(call, leaves=views)), _packed(call))


def _packed(call: Call) -> State:
    leaves = call.leaves
    cu_seqlens = call.packing()
    state = flashtile.attention_varlen(
        leaves["q"], leaves["k"], leaves["v"], **cu_seqlens, return_lse=True, **call.arguments()
    )
    assert isinstance(state, State)
    return state


# Awkward lengths.


AWKWARD_SLACK = 1.5
AWKWARD = [*range(1, 261), 319, 320, 321, 383, 384, 385, 447, 511, 513]


@pytest.mark.parametrize("shift", [-120.0, 120.0])
def test_awkward_lengths_with_shifted_logits(shift: float) -> None:
    """Scores far from 0: a padded column that scored 0 instead of -inf would overflow or take all the weight.

    A search through hundreds of small problems, which meets the tails of the errors' distribution: on some processors
    one dv errs 2.12 times as much as the textbook formula, which rounds no log-sum-exp near 120.
    """
    for length in AWKWARD:
        shape = Shape(1, length, length, 1, 1, 8, 8)
        call = make(f"awkward{length}", shape, ("causal", "bias", "mask_mod"), torch.float32, shift=shift)
        oracle.check(call, slack=AWKWARD_SLACK)


# What must not be read, and what must not be hidden.


def _finite(state: State, leaves: list[Tensor]) -> bool:
    grads = torch.autograd.grad(state.out.sum() + torch.where(state.lse.isinf(), 0, state.lse).sum(), leaves)
    return all(bool(tensor.isfinite().all()) for tensor in (state.out, *grads))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("features", [(), ("causal",), ("window", "softcap", "sinks"), ("dropout", "mask_mod")])
def test_padding_between_sequences_is_never_read(features: tuple[str, ...], poison: float) -> None:
    shape = packed((24, 50), (60, 30), 4, 2, 8, used_q=(20, 41), used_kv=(47, 11))
    call = make("poison", shape, features, torch.float32)
    clean = _packed(call)
    for name, bounds in (("q", ((20, 24), (65, 74))), ("k", ((47, 60), (71, 90))), ("v", ((47, 60), (71, 90)))):
        for begin, end in bounds:
            call.leaves[name][begin:end] = poison
    for name in "qkv":
        call.leaves[name].requires_grad_()
    dirty = _packed(call)
    assert_equal_bits(dirty, clean)
    assert _finite(dirty, [call.leaves[name] for name in "qkv"])


UNSEEN: dict[str, tuple[int, dict[str, Any]]] = {
    "prefix": (20, {"mask": masks.prefix(20)}),
    "prefix and causal": (20, {"mask": masks.prefix(torch.tensor([20, 9])), "causal": True}),
    "causal_top_left": (30, {"causal": True, "alignment": "top_left"}),
    "dense mask": (13, {"mask": (torch.arange(70) < 13).expand(2, 1, 30, 70)}),
    "mask_mod": (33, {"mask": lambda b, h, q_idx, kv_idx: kv_idx < 33}),
    "modified": (20, {"mask": masks.prefix(20), "softcap": 3.0, "alibi_slopes": torch.ones(4), "sinks": torch.ones(4)}),
}


@pytest.mark.parametrize("case", UNSEEN)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_keys_that_no_query_sees_may_hold_anything(case: str, poison: float, small_tiles: None) -> None:
    """Dense batches are padded at the end, and padding is whatever memory held."""
    length, options = UNSEEN[case]
    generator = torch.Generator().manual_seed(3)
    clean = [torch.randn(2, s, h, 8, generator=generator) for s, h in ((30, 4), (70, 2), (70, 2))]
    dirty = [tensor.clone() for tensor in clean]
    for tensor in dirty[1:]:
        tensor[:, length:] = poison

    def results(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [tensor.requires_grad_() for tensor in tensors]
        state = flashtile.attention(*leaves, return_lse=True, **options)
        return [state.out, state.lse, *torch.autograd.grad(state.out.square().sum() + state.lse.sum(), leaves)]

    for found, wanted in zip(results(dirty), results(clean), strict=True):
        assert torch.equal(found, wanted)
    oracles = [flashtile.reference.attention(*tensors, **options) for tensors in (dirty, clean)]
    assert torch.equal(oracles[0].out, oracles[1].out)


@pytest.mark.parametrize("where", ["q", "k", "v"])
@pytest.mark.parametrize("features", [(), ("causal",), ("window",), ("softcap", "sinks")])
@pytest.mark.parametrize("amount", ["one", "row", "all"])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_nan_is_never_hidden(where: str, features: tuple[str, ...], amount: str, length: int) -> None:
    """Rows that see a NaN are NaN in out (and, from q and k, in the lse); other rows are untouched."""
    call = make("nan", Shape(1, length, length, 2, 2, 8, 8), features, torch.float32)
    tensors = [call.leaves[name].clone() for name in "qkv"]
    clean = oracle.expected(call)
    target = tensors["qkv".index(where)]
    row = length // 3
    {"one": target[0, row, 0, :1], "row": target[0, row, 0], "all": target[0, :, 0]}[amount].fill_(torch.nan)
    poisoned = replace(call, leaves={**call.leaves, **dict(zip("qkv", tensors, strict=True))})
    wanted = oracle.expected(poisoned)
    found = flashtile.attention(*tensors, return_lse=True, **poisoned.arguments())
    assert isinstance(found, State)
    assert torch.equal(found.out.isnan(), wanted["out"].isnan())
    assert torch.equal(found.lse.isnan(), wanted["lse"].isnan())
    untouched = ~wanted["out"].isnan()
    torch.testing.assert_close(found.out[untouched], clean["out"][untouched].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "features", [("causal",), ("causal", "bias_heads", "alibi", "sinks"), ("dropout", "score_mod")]
)
def test_packed_sequences_do_not_touch_each_other(features: tuple[str, ...]) -> None:
    """Changing every token of one sequence leaves the results of the others equal bit for bit."""
    shape = packed((20, 33, 5), (31, 33, 12), 4, 2, 8)
    call = make("apart", shape, features, torch.float32)
    changed = {name: tensor.clone() for name, tensor in call.leaves.items()}
    for name, (begin, end) in {"q": (20, 53), "k": (31, 64), "v": (31, 64)}.items():
        changed[name][begin:end] = torch.randn_like(changed[name][begin:end]) * 3
    first, second = (oracle.ours(replace(call, leaves=leaves)) for leaves in (call.leaves, changed))
    rows = torch.cat((torch.arange(20), torch.arange(53, 58)))
    keys = torch.cat((torch.arange(31), torch.arange(64, 76)))
    for name, index in {"out": rows, "dq": rows, "dk": keys, "dv": keys}.items():
        assert_equal_bits([first[name][index]], [second[name][index]])
    assert_equal_bits([first["lse"][:, rows]], [second["lse"][:, rows]])


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_three_ways_to_separate_documents(integers: torch.dtype) -> None:
    """Packed sequences, document ids, and a loop over the sequences agree."""
    lengths = (17, 1, 40, 6)
    call = make("documents", Shape(1, 64, 64, 4, 2, 16, 16), (), torch.float32)
    q, k, v = (call.leaves[name] for name in "qkv")
    cu_seqlens = offsets(lengths).to(integers)
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).to(integers)
    by_ids = flashtile.attention(q, k, v, causal=True, mask=flashtile.masks.document(ids))
    packed_out = flashtile.attention_varlen(q[0], k[0], v[0], cu_seqlens, cu_seqlens, causal=True)
    pieces = zip(*(tensor.split(lengths, dim=1) for tensor in (q, k, v)), strict=True)
    looped = torch.cat([_out(*piece, causal=True) for piece in pieces], dim=1)
    for other in (packed_out, looped[0]):
        torch.testing.assert_close(by_ids[0], other, rtol=1e-5, atol=1e-5)


def _out(*tensors: Tensor, **options: Any) -> Tensor:
    out = flashtile.attention(*tensors, **options)
    assert isinstance(out, Tensor)
    return out


def test_rows_that_see_nothing() -> None:
    """Output 0, lse -inf, gradients 0 for q and the bias row; k and v feel nothing from it."""
    call = make("blind", Shape(1, 30, 12, 2, 2, 8, 8), ("causal", "bias", "score_mod"), torch.float32)
    results = oracle.ours(call)
    blind = 30 - 12
    assert bool((results["lse"][:, :, :blind] == -torch.inf).all())
    for name, rows in {"out": results["out"], "dq": results["dq"], "dbias": results["dbias"].transpose(1, 2)}.items():
        assert int(rows[:, :blind].count_nonzero()) == 0, name
    oracle.compare(results, call)


@pytest.mark.parametrize("tiles", [(16, 8, 24), (64, 64, 64), (7, 5, 15), (128, 128, 512)])
def test_tiles_never_change_results_beyond_rounding(
    tiles: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashtile import plan
    from flashtile.tuning import cpu

    monkeypatch.setattr(cpu, "TILES", ((2**62, *tiles),))
    plan.choose.cache_clear()
    features = ("causal", "document", "bias_heads", "alibi", "softcap", "sinks", "dropout", "score_mod", "gqa")
    try:
        oracle.check(make("tiles", Shape(2, 150, 170, 4, 4, 16, 16), features, torch.float32))
    finally:
        plan.choose.cache_clear()
