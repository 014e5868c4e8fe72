"""Score modifiers: plain FlexAttention functions, the built-in options and the reference give one answer.

Gradients are checked for the score (through q and k) and for every tensor that a function captures.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile import State, reference
from tests.oracle import assert_close, assert_equal_bits
from tests.problems import Tensors

DOUBLE = torch.float64
BATCH, QUERIES, KEYS, HEADS, HEADS_KV = 2, 37, 53, 4, 2
SHIFT = KEYS - QUERIES
ScoreMod = Callable[..., Any]


@dataclass(frozen=True)
class Mod:
    """A score_mod over captured tensors.

    leaves: name -> size of a differentiable capture. fixed: captures without gradient.
    """

    name: str
    build: Callable[[Tensors], ScoreMod]
    leaves: dict[str, tuple[int, ...]]
    fixed: Callable[[], Tensors] = dict

    def __str__(self) -> str:
        return self.name


def _alibi(t: Tensors) -> ScoreMod:
    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score - t["slopes"][h] * (q_idx + SHIFT - kv_idx).abs()

    return score_mod


def _softcap(t: Tensors) -> ScoreMod:
    return lambda score, b, h, q_idx, kv_idx: 2.5 * torch.tanh(score / 2.5)


def _bias(t: Tensors) -> ScoreMod:
    return lambda score, b, h, q_idx, kv_idx: score + t["bias"][b, h, q_idx, kv_idx]


def _identity(t: Tensors) -> ScoreMod:
    return lambda score, b, h, q_idx, kv_idx: score


def _causal(t: Tensors) -> ScoreMod:
    return lambda score, b, h, q_idx, kv_idx: torch.where(q_idx + SHIFT >= kv_idx, score, -float("inf"))


def _relative_position(t: Tensors) -> ScoreMod:
    """T5 (Raffel et al. 2020): one learned number per head and bucket of the distance, logarithmic beyond 8."""

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = (q_idx - kv_idx).abs()
        far = 8 + (torch.log(distance.clamp(min=1) / 8) / math.log(8) * 8).to(torch.int64)
        bucket = torch.where(distance < 8, distance, far.clamp(8, 15))
        return score + t["table"][h, bucket]

    return score_mod


def _graphormer(t: Tensors) -> ScoreMod:
    """Ying et al. 2021: a learned number per shortest-path distance, and one per degree of the key's node."""

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + t["spatial"][t["distance"][b, q_idx, kv_idx], h] + t["centrality"][t["degree"][b, kv_idx]]

    return score_mod


def _sandwich(t: Tensors) -> ScoreMod:
    """Chi et al. 2023: the dot product of sinusoidal embeddings, a sum of cosines of the distance."""

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        distance = q_idx - kv_idx
        return score + t["gain"][h] * (torch.cos(distance * 0.1) + torch.cos(distance * 0.01) + torch.sin(q_idx * 0.3))

    return score_mod


def _swin(t: Tensors) -> ScoreMod:
    """Liu et al. 2021: positions on a grid 8 wide, a table per head over both offsets."""

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        row, column = q_idx // 8 - kv_idx // 8 + 7, q_idx % 8 - kv_idx % 8 + 7
        return score + t["table"][row, column, h]

    return score_mod


def _temperature(t: Tensors) -> ScoreMod:
    """A learned number, and one per head: the derivative flows to scalars too."""
    return lambda score, b, h, q_idx, kv_idx: score * t["temperature"] * torch.exp(t["log_gain"][h])


def _gate(t: Tensors) -> ScoreMod:
    """Not linear in the score: its derivative needs the score again."""

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * torch.sigmoid(score + t["shift"][h]) + torch.relu(t["decay"][b, q_idx] - score)

    return score_mod


def _forgetting(t: Tensors) -> ScoreMod:
    """Lin et al. 2025 (forgetting attention): differences of a running sum of gates."""
    return lambda score, b, h, q_idx, kv_idx: score + t["gates"][b, h, q_idx] - t["gates"][b, h, kv_idx]


def _checkerboard(t: Tensors) -> ScoreMod:
    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return torch.where((q_idx + kv_idx) % 2 == 0, score * 0.5, score - t["penalty"][h])

    return score_mod


def _inverse_distance(t: Tensors) -> ScoreMod:
    return lambda score, b, h, q_idx, kv_idx: score / (1 + (q_idx - kv_idx).abs() * t["rate"][h].square())


def _two_in_turn(t: Tensors) -> ScoreMod:
    first, second = _softcap(t), _relative_position(t)
    return lambda score, b, h, q_idx, kv_idx: second(first(score, b, h, q_idx, kv_idx), b, h, q_idx, kv_idx)


def _integers(high: int, *sizes: int) -> Tensor:
    return torch.randint(high, sizes, generator=torch.Generator().manual_seed(high))


MODS = [
    Mod("identity", _identity, {}),
    Mod("alibi", _alibi, {"slopes": (HEADS,)}),
    Mod("softcap", _softcap, {}),
    Mod("bias", _bias, {"bias": (BATCH, HEADS, QUERIES, KEYS)}),
    Mod("causal", _causal, {}),
    Mod("relative_position", _relative_position, {"table": (HEADS, 16)}),
    Mod(
        "graphormer",
        _graphormer,
        {"spatial": (6, HEADS), "centrality": (5,)},
        lambda: {"distance": _integers(6, BATCH, QUERIES, KEYS), "degree": _integers(5, BATCH, KEYS)},
    ),
    Mod("sandwich", _sandwich, {"gain": (HEADS,)}),
    Mod("swin", _swin, {"table": (15, 15, HEADS)}),
    Mod("temperature", _temperature, {"temperature": (), "log_gain": (HEADS,)}),
    Mod("gate", _gate, {"shift": (HEADS,), "decay": (BATCH, QUERIES)}),
    Mod("forgetting", _forgetting, {"gates": (BATCH, HEADS, KEYS)}),
    Mod("checkerboard", _checkerboard, {"penalty": (HEADS,)}),
    Mod("inverse_distance", _inverse_distance, {"rate": (HEADS,)}),
    Mod("two_in_turn", _two_in_turn, {"table": (HEADS, 16)}),
]


def _inputs(mod: Mod, dtype: torch.dtype = DOUBLE) -> tuple[Tensors, Tensors]:
    """(differentiable tensors, fixed ones)."""
    generator = torch.Generator().manual_seed(len(mod.name))
    sizes = {
        "q": (BATCH, QUERIES, HEADS, 16),
        "k": (BATCH, KEYS, HEADS_KV, 16),
        "v": (BATCH, KEYS, HEADS_KV, 16),
        **mod.leaves,
    }
    leaves = {name: torch.randn(size, generator=generator, dtype=DOUBLE) for name, size in sizes.items()}
    return {name: leaf.to(dtype).requires_grad_() for name, leaf in leaves.items()}, mod.fixed()


def _gradients(state: State, leaves: Tensors) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    grads = [torch.randn(tensor.shape, generator=generator, dtype=DOUBLE).to(tensor.dtype) for tensor in state]
    return list(torch.autograd.grad([*state], list(leaves.values()), grads))


def _attend(leaves: Tensors, **options: Any) -> State:
    return flashtile.attention(leaves["q"], leaves["k"], leaves["v"], return_lse=True, **options)  # type: ignore[return-value]


@pytest.mark.parametrize("mod", MODS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_function_matches_reference(mod: Mod, causal: bool, small_tiles: None) -> None:
    """In float64, over many tiles: the output, the log-sum-exp and all gradients, to rounding."""
    leaves, fixed = _inputs(mod)
    score_mod = mod.build({**leaves, **fixed})
    found = _attend(leaves, score_mod=score_mod, causal=causal)
    wanted = reference.attention(leaves["q"], leaves["k"], leaves["v"], score_mod=score_mod, causal=causal)
    pairs = [*zip(found, wanted, strict=True)]
    pairs += zip(_gradients(found, leaves), _gradients(wanted, leaves), strict=True)
    for one, other in pairs:
        assert_close(one, other, roundings=256)


BUILT_IN: list[tuple[str, Callable[[Tensors], dict[str, Any]]]] = [
    ("alibi", lambda t: {"alibi_slopes": t["slopes"]}),
    ("softcap", lambda t: {"softcap": 2.5}),
    ("bias", lambda t: {"bias": t["bias"]}),
    ("causal", lambda t: {"causal": True}),
    ("identity", lambda t: {}),
]


@pytest.mark.parametrize(("name", "options"), BUILT_IN, ids=[name for name, _ in BUILT_IN])
def test_option_matches_function(name: str, options: Callable[[Tensors], dict[str, Any]], small_tiles: None) -> None:
    mod = next(mod for mod in MODS if mod.name == name)
    leaves, fixed = _inputs(mod)
    built_in = _attend(leaves, **options(leaves))
    function = _attend(leaves, score_mod=mod.build({**leaves, **fixed}))
    pairs = [*zip(built_in, function, strict=True)]
    pairs += zip(_gradients(built_in, leaves), _gradients(function, leaves), strict=True)
    for one, other in pairs:
        assert_close(one, other, roundings=256)


def test_order_of_modifiers(small_tiles: None) -> None:
    """softcap, then bias, then slopes, then the function: the order that the documentation states."""
    leaves, _ = _inputs(Mod("all", _identity, {"bias": (1, HEADS, QUERIES, KEYS), "slopes": (HEADS,)}))

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score.square() * 0.1

    def in_one(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        capped = 2.0 * torch.tanh(score / 2.0) + leaves["bias"][0, h, q_idx, kv_idx]
        return (capped - leaves["slopes"][h] * (q_idx + SHIFT - kv_idx).abs()).square() * 0.1

    options = {"softcap": 2.0, "bias": leaves["bias"], "alibi_slopes": leaves["slopes"], "score_mod": score_mod}
    found, wanted = _attend(leaves, **options), _attend(leaves, score_mod=in_one)
    for one, other in zip(_gradients(found, leaves), _gradients(wanted, leaves), strict=True):
        assert_close(one, other, roundings=1024)


@pytest.mark.parametrize("shape", [(), (KEYS,), (QUERIES, 1), (HEADS, 1, KEYS), (1, 1, 1, 1), (BATCH, 1, 1, KEYS)])
def test_bias_broadcasts(shape: tuple[int, ...]) -> None:
    """The gradient has the bias's own shape, whatever that broadcasts to."""
    mod = Mod("broadcast", _identity, {"bias": shape})
    leaves, _ = _inputs(mod)
    found = _attend(leaves, bias=leaves["bias"])
    wanted = reference.attention(leaves["q"], leaves["k"], leaves["v"], bias=leaves["bias"])
    for one, other in zip(_gradients(found, leaves), _gradients(wanted, leaves), strict=True):
        assert_close(one, other, roundings=256)


def _strided(bias: Tensor) -> list[Tensor]:
    """The same values in other memory."""
    padded = torch.zeros(*bias.shape[:-1], 2 * bias.shape[-1], dtype=bias.dtype)
    padded[..., ::2] = bias
    return [bias.transpose(-1, -2).contiguous().transpose(-1, -2), padded[..., ::2], bias.flip(0).flip(0)]


def test_bias_strides() -> None:
    leaves, _ = _inputs(Mod("strides", _identity, {"bias": (BATCH, HEADS, QUERIES, KEYS)}))
    plain = leaves["bias"].detach()
    wanted = _attend({**leaves, "bias": plain}, bias=plain)
    for view in _strided(plain):
        assert_equal_bits(_attend(leaves, bias=view), wanted)
    row = plain[:1, :1, :1]
    assert_equal_bits(
        _attend(leaves, bias=row.expand(BATCH, HEADS, QUERIES, KEYS)),
        _attend(leaves, bias=row.repeat(BATCH, HEADS, QUERIES, 1)),
    )


def test_gradient_of_an_expanded_bias_reaches_its_source() -> None:
    leaves, _ = _inputs(Mod("expanded", _identity, {"row": (1, 1, 1, KEYS)}))
    expanded = _gradients(_attend(leaves, bias=leaves["row"].expand(BATCH, HEADS, QUERIES, KEYS)), leaves)
    for one, other in zip(expanded, _gradients(_attend(leaves, bias=leaves["row"]), leaves), strict=True):
        assert_close(one, other, roundings=256)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_captures(dtype: torch.dtype) -> None:
    """Gradients come back in each capture's own dtype."""
    leaves, _ = _inputs(next(mod for mod in MODS if mod.name == "relative_position"), dtype)
    leaves["table"] = leaves["table"].detach().float().requires_grad_()
    for mixed in (leaves, {**leaves, "table": leaves["table"].detach().to(dtype).requires_grad_()}):
        grads = _gradients(_attend(mixed, score_mod=_relative_position(mixed)), mixed)
        assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in mixed.values()]
        exact = {name: leaf.detach().double().requires_grad_() for name, leaf in mixed.items()}
        wanted = _gradients(_attend(exact, score_mod=_relative_position(exact)), exact)
        for one, other in zip(grads, wanted, strict=True):
            assert_close(one, other, roundings=16 if one.dtype is dtype else 2 * 2**16)


def test_captures_without_gradient_stay_without() -> None:
    leaves, _ = _inputs(next(mod for mod in MODS if mod.name == "graphormer"))
    fixed = MODS[6].fixed()
    constant = leaves.pop("centrality").detach()
    score_mod = _graphormer({**leaves, **fixed, "centrality": constant})
    grads = _gradients(_attend(leaves, score_mod=score_mod), leaves)
    assert len(grads) == len(leaves)
    assert constant.grad is None


def test_a_capture_of_an_intermediate_result() -> None:
    """The captured tensor need not be a leaf: the gradient goes on to what it was computed from."""
    leaves, _ = _inputs(Mod("intermediate", _identity, {"raw": (HEADS,)}))

    def slopes(raw: Tensor) -> dict[str, Tensor]:
        return {"slopes": torch.nn.functional.softplus(raw)}

    found = _gradients(_attend(leaves, score_mod=_alibi(slopes(leaves["raw"]))), leaves)
    wanted = _gradients(_attend(leaves, alibi_slopes=slopes(leaves["raw"])["slopes"]), leaves)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, roundings=256)


def test_infinite_derivative_under_the_mask_stays_hidden(small_tiles: None) -> None:
    """A derivative may be NaN where the mask hides the score, here beyond the diagonal: no gradient shows it."""
    leaves, _ = _inputs(Mod("sqrt", _identity, {}))

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * torch.sqrt((q_idx + SHIFT - kv_idx).to(score.dtype))

    state = _attend(leaves, score_mod=score_mod, causal=True)
    assert all(bool(tensor.isfinite().all()) for tensor in (*state, *_gradients(state, leaves)))


def test_sinks_take_weight_but_give_no_value() -> None:
    """A sink is one more key with that score and the value zero."""
    leaves, _ = _inputs(Mod("sinks", _identity, {"sinks": (HEADS,)}))
    state = _attend(leaves, sinks=leaves["sinks"])
    plain = _attend(leaves)
    lse = torch.logaddexp(plain.lse, leaves["sinks"][:, None])
    share = torch.exp(plain.lse - lse).transpose(1, 2)[..., None]
    assert_close(state.lse, lse)
    assert_close(state.out, plain.out * share)
    without = _attend(leaves, sinks=torch.full((HEADS,), -torch.inf, dtype=DOUBLE))
    for one, other in zip(without, plain, strict=True):
        assert_close(one, other)


def test_softcap_zero_is_off() -> None:
    leaves, _ = _inputs(Mod("off", _identity, {}))
    assert_equal_bits(_attend(leaves, softcap=0.0), _attend(leaves, softcap=None))


def test_nan_derivatives_of_captures_under_the_mask_stay_hidden(small_tiles: None) -> None:
    """The gradient of a captured tensor sums over what the mask shows, though its derivative elsewhere is NaN."""
    table = torch.ones(4, dtype=torch.float32, requires_grad=True)
    leaves, _ = _inputs(Mod("sqrt", _identity, {}))

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + table[kv_idx % 4] * torch.sqrt((q_idx + SHIFT - kv_idx).to(score.dtype))

    state = _attend(leaves, score_mod=score_mod, causal=True)
    (grad,) = torch.autograd.grad(state.out.sum(), (table,))
    assert bool(grad.isfinite().all())
    assert bool(grad.abs().sum() > 0)
