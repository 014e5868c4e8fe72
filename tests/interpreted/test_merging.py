"""The kernel that merges two States, interpreted, against the one merge of the library."""

import pytest
import torch

import flashtile
from flashtile import sums
from flashtile.kernels import merging
from tests.oracle import assert_close


def _state(dtype: torch.dtype, unseen: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.randn(2, 21, 3, 24), torch.randn(2, 3, 21) * 40
    lse[:, :, 4] = -torch.inf
    if unseen:
        lse[:, :, 7] = -torch.inf
    out[:, [4, 7] if unseen else [4]] = 0
    return out.to(dtype), lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merges_like_the_library(dtype: torch.dtype) -> None:
    first, second = _state(dtype, True), _state(dtype, False)
    expected = flashtile.merge([(first[0].float(), first[1]), (second[0].float(), second[1])])
    whole, whole_lse = torch.randn(2, 40, 3, 24).to(dtype), torch.randn(2, 3, 40)
    held, held_lse = whole[:, 5:26], whole_lse[..., 5:26]
    held.copy_(first[0])
    held_lse.copy_(first[1])
    around = whole[:, 26:].clone(), whole_lse[..., :5].clone()
    merging.merge(held, held_lse, *second)
    assert_close(held, expected.out.to(dtype))
    assert_close(held_lse, expected.lse)
    assert torch.equal(whole[:, 26:], around[0])
    assert torch.equal(whole_lse[..., :5], around[1])


def test_nan_is_not_hidden() -> None:
    held, held_lse = _state(torch.float32, False)
    out, lse = _state(torch.float32, False)
    out[0, 2], lse[0, :, 2] = torch.nan, torch.nan
    merging.merge(held, held_lse, out, lse)
    assert held[0, 2].isnan().all()
    assert held_lse[0, :, 2].isnan().all()
    assert not held[1].isnan().any()


def test_the_formula_without_a_kernel_is_the_same() -> None:
    first, second = _state(torch.float32, True), _state(torch.float32, False)
    held, held_lse = first[0].clone(), first[1].clone()
    sums.merge(held, held_lse, *second)
    expected = flashtile.merge([first, second])
    assert_close(held, expected.out)
    assert_close(held_lse, expected.lse)
