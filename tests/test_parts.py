"""Attention part by part in one process: every feature, and what parts cost."""

import pytest
import torch

from flashtile import cut, parts
from flashtile.parts import Part
from flashtile.problem import Inputs, Options
from flashtile.sums import Sums
from tests import oracle, partwise
from tests.conformance import watched
from tests.problems import FEATURES, dense, make, packed

SHAPE = dense(2, 48, 96, 4, 2, 8)
PLAIN = [name for name in FEATURES if FEATURES[name].reshape(SHAPE) == SHAPE and name != "deterministic"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*PLAIN, "bias_shared"])
def test_matches_the_reference(name: str, dtype: torch.dtype) -> None:
    call = make(name, SHAPE, (name,), dtype)
    oracle.compare(partwise.results(call, 3), call)


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("features", [("causal",), ("window", "bias", "alibi_batch", "score_mod", "mask_mod")])
def test_packed_matches_the_reference(features: tuple[str, ...], same: bool) -> None:
    lengths = (17, 0, 9, 22)
    call = make("packed parts", packed(lengths, lengths if same else (40, 8, 0, 24), 4, 2, 8), features, torch.float32)
    oracle.compare(partwise.results(call, 2), call)


def test_causal_parts_run_the_fast_kernels() -> None:
    """Chunks of a causal problem are causal, full or nothing: PyTorch's own operator takes them."""
    call = make("causal", dense(1, 48, 48, 2, 2, 8), ("causal",), torch.float32, lse_grad=False)
    with watched() as ran:
        partwise.results(call, 3)
    assert {chosen.kernel for chosen in ran} == {"aten_flash"}
    assert len(ran) == 2 * 3 * 3  # one call a pair of ranks and pass


def _whole(mask: str, tensors: tuple[torch.Tensor, ...] = ()) -> parts.Whole:
    q = torch.randn(1, 8, 2, 4)
    return parts.whole_of(Inputs(q, q, q, mask=tensors), Options(mask=mask), 2)


def test_masks_of_parts_are_kept_while_their_tensors_live() -> None:
    ids = torch.zeros(16, dtype=torch.int64)
    whole, part = _whole('["document"]', (ids, ids)), Part(0, 8, 8, 8, 16, 16)
    first = parts.mask_of(whole, part)
    assert parts.mask_of(whole, part) is first
    ids += 1
    assert parts.mask_of(whole, part) is not first


def test_tables_of_the_whole_are_checked() -> None:
    seen = torch.ones(16, 15, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask: got shape \(16, 15\).*= \(1, 2, 16, 16\)"):
        parts.checked(_whole('["dense"]', (seen,)), 2)


def test_dropout_on_packed_parts_is_refused() -> None:
    q, offsets = torch.randn(8, 2, 4), torch.tensor([0, 16], dtype=torch.int32)
    inputs = Inputs(q, q, q, offsets, offsets, seed=torch.tensor(1))
    with pytest.raises(
        NotImplementedError, match=r"dropout_p: got one beside cu_seqlens_q on a ring.*ulysses_attention"
    ):
        parts.whole_of(inputs, Options(dropout_p=0.1), 2)


def test_sums_keep_a_single_gradient_as_it_is() -> None:
    like = torch.zeros(1, 4, 2, 3, dtype=torch.bfloat16)
    one = torch.ones(1, 4, 2, 3, dtype=torch.bfloat16)
    total = Sums(like)
    total.add(slice(0, 4), one)
    assert total.result() is one
    total = Sums(like)
    total.add(slice(0, 4), one)
    total.add(slice(1, 2), one[:, :1])
    assert total.result()[0, :, 0, 0].tolist() == [1, 2, 1, 1]
    assert not Sums(like).result().any()


def test_windows_only() -> None:
    assert cut.windows_only('["and",["causal","bottom_right"],["window",3,0,"top_left"]]')
    assert not cut.windows_only('["and",["causal","bottom_right"],["prefix",3]]')


def test_fingerprints_differ_where_masks_do() -> None:
    """By contents alone: not by who made the tensor, its strides or its type; not by numbers with a fraction."""
    q = torch.zeros(1, 8, 1, 4)
    ids = torch.arange(8) // 3

    def of(*mask: torch.Tensor, **more: torch.Tensor) -> int:
        return parts.fingerprint(Inputs(q, q, q, mask=mask, **more))

    same = [ids.clone(), torch.stack((ids, ids), 1)[:, 1], ids.to(torch.int32)]
    others = [ids.flip(0), ids + 1, ids.roll(1), ids[:7], torch.cat((ids[:7], ids[:1]))]
    assert all(of(each) == of(ids) for each in same)
    assert not any(of(each) == of(ids) for each in others)
    assert of(ids, ids.flip(0)) != of(ids.flip(0), ids)
    assert of(torch.rand(4)) == of() == of(ids.to("meta")) == 0
    assert of(cu_seqlens_q=ids) != of(cu_seqlens_q=ids + 1)
