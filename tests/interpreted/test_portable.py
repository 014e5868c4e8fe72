"""The portable kernels against the reference, interpreted, with tiles so small that every problem has many."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import flashtile
from flashtile import plan, reference
from flashtile.backends import portable as backend
from flashtile.kernels import bias
from flashtile.tuning import portable
from tests import conformance, oracle, shifted
from tests.fuzz.problems import Problem
from tests.problems import CASES, Case, Shape, dense, make

# An interpreted step costs the same whatever its tile holds: these are as large as leaves two or three along each side.
TILES = portable.PortableConfig(
    portable.Tiles(64, 32, 4, 1), portable.Tiles(64, 32, 4, 1), portable.Tiles(32, 64, 4, 1)
)
SHIPPED = portable.TABLES
# What the kernels do not take, with the reason that a user is told.
REFUSED = {"headdim_576_v_512": "it takes up to 512"}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(portable, "TABLES", {"hopper": dict.fromkeys(portable.KINDS, ((10**6, TILES),))})
    plan.choose.cache_clear()
    yield
    monkeypatch.undo()
    plan.choose.cache_clear()


def _dtypes(case: Case) -> list[torch.dtype]:
    """The interpreter multiplies no bfloat16."""
    return [dtype for dtype in case.dtypes if dtype in (torch.float32, torch.float16)]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(case, dtype, id=f"{case.name}-{dtype}") for case in CASES for dtype in _dtypes(case)],
)
def test_matches_reference(case: Case, dtype: torch.dtype) -> None:
    if case.name in REFUSED:
        with pytest.raises(NotImplementedError, match=REFUSED[case.name]):
            conformance.check_case(case, dtype, "portable")
        return
    conformance.check_case(case, dtype, "portable")


@pytest.mark.parametrize("name", ["gqa", "dropout", "score_mod", "varlen"])
def test_dk_and_dv_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = TILES._replace(value=portable.Tiles(64, 32, 4, 1))
    monkeypatch.setattr(portable, "TABLES", {"hopper": dict.fromkeys(portable.KINDS, ((10**6, apart),))})
    plan.choose.cache_clear()
    conformance.check_case(next(case for case in CASES if case.name == name), torch.float32, "portable")


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("name", ["bias", "headdim_80"])
def test_columns_in_parts(name: str, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are, at most one to 16 columns. direct: loaded in parts, too."""
    cut = portable.PortableConfig(*(tiles._replace(parts=4, direct=direct) for tiles in TILES[:3]))
    monkeypatch.setattr(portable, "TABLES", {"hopper": dict.fromkeys(portable.KINDS, ((10**6, cut),))})
    plan.choose.cache_clear()
    conformance.check_case(next(case for case in CASES if case.name == name), torch.float32, "portable")


@pytest.mark.parametrize("features", [("causal",), ("mask_mod",), ("bias", "dropout")], ids="-".join)
@pytest.mark.parametrize("family", ["ampere", "cdna", "rdna"])
def test_rows_of_512_columns(family: str, features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Shipped rows whose warps share the columns, in four, eight and sixteen parts."""
    monkeypatch.setattr(portable, "TABLES", {"hopper": SHIPPED[family]})
    plan.choose.cache_clear()
    call = make("wide", dense(1, 20, 35, 2, 1, 512), features, torch.float16)
    with conformance.watched() as ran:
        oracle.check(call, "portable")
    assert [(chosen.backend, chosen.kernel) for chosen in ran] == [("portable", "sweep")] * 2
    assert all(tiles.parts > 1 for chosen in ran for tiles in (chosen.config.query, chosen.config.key))


def test_a_backward_pass_that_exceeds_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass fits, and leaves to PyTorch what it needs; dropout is the same in both."""
    monkeypatch.setattr(backend, "_SMALL", ("",))
    plan.choose.cache_clear()
    with conformance.watched() as ran:
        oracle.check(make("wide", dense(1, 20, 35, 2, 1, 512), ("causal", "dropout"), torch.float32))
    assert [chosen.backend for chosen in ran] == ["portable", "pytorch"]


@pytest.mark.parametrize("name", ["varlen", "headdim_80"])
def test_rows_loaded_aside(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys forward, values for dQ; the last rows of a tile may be another sequence's, the last columns nobody's."""
    aside = portable.PortableConfig(*(tiles._replace(aside=True) for tiles in TILES[:3]))
    monkeypatch.setattr(portable, "TABLES", {"hopper": dict.fromkeys(portable.KINDS, ((10**6, aside),))})
    plan.choose.cache_clear()
    conformance.check_case(next(case for case in CASES if case.name == name), torch.float32, "portable")


@pytest.mark.parametrize("shift", [-120.0, 120.0])
def test_awkward_lengths_with_shifted_logits(shift: float) -> None:
    """Weights exp(s - lse) of keys that do not exist must not overflow, whatever the size of the scores."""
    shapes = [dense(1, length, length + 3, 2, 1, 16) for length in (1, 2, 15, 16, 17, 31, 33, 64, 65)]
    shifted.check(shapes, torch.float32, shift, backend="portable")


@pytest.mark.parametrize("options", [{"scale": -0.5, "causal": True}, {"scale": 0.0}, {"softcap": 1e4}], ids=str)
def test_unusual_numbers(options: dict[str, Any]) -> None:
    """A negative scale turns the largest dot product into the smallest score; a large cap hides none of it."""
    shape = dense(1, 33, 50, 2, 1, 16)
    oracle.check(Problem(shape, torch.float16, options=tuple(options.items())).call("cpu"), "portable")


@pytest.mark.parametrize("full", [(True, True, False, True), (True, True, True, False)])
@pytest.mark.parametrize("shape", [dense(1, 20, 39, 1, 1, 16), dense(2, 39, 20, 2, 1, 16)], ids=str)
def test_a_bias_of_rows_for_each_head(full: tuple[bool, ...], shape: Shape) -> None:
    """Its gradient has a row for each head and entry, which no sum over heads joins."""
    oracle.check(Problem(shape, torch.float32, bias=full).call("cpu"), "portable")


@pytest.mark.parametrize("causal", [False, True])
def test_a_bias_that_entries_share_in_parts(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five entries, three of them summed up by some programs and two by others."""
    monkeypatch.setattr(bias, "LEAST", 2)
    assert [bias.parts_of(5, programs) for programs in (1, 512, 513, 2000)] == [2, 2, 1, 1]
    options = (("causal", causal),)
    problem = Problem(dense(5, 20, 39, 2, 1, 16), torch.float32, bias=(False, True, True, True), options=options)
    oracle.check(problem.call("cpu"), "portable")


def test_a_bias_that_some_entries_share_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six entries for each of the bias, three of them summed up by some programs and three by others."""
    monkeypatch.setattr(bias, "LEAST", 1)
    monkeypatch.setattr(bias, "PROGRAMS", 48)
    assert [bias.parts_of(6, programs, alike=True) for programs in (1, 10, 12, 24, 48)] == [6, 3, 3, 2, 1]
    options = {"bias": torch.randn(2, 1, 2, 20, 39, requires_grad=True)}
    q, k, v = (torch.randn(12, length, 2, 16, requires_grad=True) for length in (20, 39, 39))
    leaves = [q, k, v, options["bias"]]
    found = flashtile.attention(q, k, v, **options, backend="portable")
    wanted = reference.attention(q, k, v, **options).out
    weights = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), leaves),
        torch.autograd.grad((wanted * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bias", "bias_shared"])
def test_a_bias_of_no_batch_entries(name: str) -> None:
    oracle.check(make("no_batch_bias", dense(0, 5, 35, 2, 1, 16), (name, "softcap"), torch.float32), "portable")


def test_nan_beyond_the_end_stays_there() -> None:
    """Keys that no query sees may hold anything, under a mask function too."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, length, 2, 16, generator=generator) for length in (30, 50, 50))
    for options in ({"mask": flashtile.masks.prefix(37)}, {"mask": lambda b, h, q_idx, kv_idx: kv_idx < 37}):
        results = []
        for value in (0.0, torch.nan):
            k[:, 37:], v[:, 37:] = value, value
            leaves = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
            out = flashtile.attention(*leaves, **options, backend="portable")
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for clean, dirty in zip(*results, strict=True):
            assert torch.equal(clean, dirty)


def test_gradients_of_captured_tensors_are_refused_when_they_must_repeat() -> None:
    table = torch.randn(8, requires_grad=True)
    q = torch.randn(1, 16, 1, 16)
    with pytest.raises(NotImplementedError, match="any order"):
        flashtile.attention(
            q,
            q,
            q,
            score_mod=lambda score, b, h, q_idx, kv_idx: score + table[kv_idx % 8],
            deterministic=True,
            backend="portable",
        ).sum().backward()


def test_functions_of_very_far_positions_are_refused() -> None:
    q = torch.empty(1, 1, 1, 16).expand(1, 2**24 + 1, 1, 16)
    chosen = flashtile.explain(q, q, q, score_mod=lambda score, b, h, q_idx, kv_idx: score + q_idx)
    assert "exact up to 16777216" in str(chosen)


@pytest.mark.parametrize(("scale", "backend"), [(-(2.0**20), "portable"), (2.0**70, "pytorch")])
def test_steep_scales(scale: float, backend: str) -> None:
    """Rounding alone would overflow the exponentials of the steepest, which PyTorch's backend takes."""
    q, k, v = (torch.randn(1, 20, 2, 16, generator=torch.Generator().manual_seed(place)) for place in range(3))
    chosen = flashtile.explain(q, k, v, scale=scale)
    assert chosen.backend == backend
    if backend == "pytorch":
        assert "scores that are scaled by more than 1048576" in dict(chosen.rejected)["portable/sweep"]
    out = flashtile.attention(q, k, v, scale=scale)
    torch.testing.assert_close(out.double(), flashtile.reference.attention(q, k, v, scale=scale).out, atol=1e-6, rtol=0)
