"""Dropout: the generator against plain integers and published vectors, and the bits that attention really drops."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import flashtile
from flashtile import dropout, dropout_mask
from tests.oracle import assert_close, assert_equal_bits
from tests.problems import offsets

WORD = 2**32 - 1
SEED = 0x0123_4567_89AB_CDEF

# From the known-answer file of Random123 (Salmon et al., SC 2011): philox4x32, 7 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def _philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-7 in Python's integers, which have no width to overflow."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def _ours(counter: list[int], key: list[int]) -> list[int]:
    seed = key[0] + (key[1] << 32)
    signed = seed - 2**64 if seed >= 2**63 else seed
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    return [int(lane) for lane in dropout.philox((c0, c1, c2, c3), torch.tensor(signed))]


def _kept(seed: int, p: float, sizes: tuple[int, int, int, int]) -> Tensor:
    """The dropout mask from the documentation's sentence, one integer at a time."""
    table = torch.zeros(sizes, dtype=torch.bool)
    key = [seed & WORD, (seed >> 32) & WORD]
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(size) for size in sizes)).tolist():
        table[b, h, i, j] = _philox([j // 4, i, h, b], key)[j % 4] >= round(p * 2**32)
    return table


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str) -> None:
    assert _philox(_words(counter), _words(key)) == _words(result)
    assert _ours(_words(counter), _words(key)) == _words(result)


@given(st.lists(st.integers(0, WORD), min_size=6, max_size=6))
def test_generator_matches_integers(words: list[int]) -> None:
    assert _ours(words[:4], words[4:]) == _philox(words[:4], words[4:])


@pytest.mark.parametrize("seed", [0, 1, SEED, 2**63 - 1, -1, -(2**63)])
def test_mask_matches_documentation(seed: int) -> None:
    sizes = (2, 3, 5, 11)
    assert torch.equal(dropout_mask(seed, 0.4, *sizes), _kept(seed, 0.4, sizes))


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**63 - 1))
def test_any_range_of_keys_gives_the_same_bits(start: int, length: int, seed: int) -> None:
    index = [torch.arange(size) for size in (2, 3, 4)]
    views = index[0].view(-1, 1, 1, 1), index[1].view(-1, 1, 1), index[2].view(-1, 1)
    part = dropout.keep(torch.tensor(seed), 0.5, *views, keys=range(start, start + length))
    assert torch.equal(part, dropout_mask(seed, 0.5, 2, 3, 4, 80)[..., start : start + length])


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_keep_rate(p: float) -> None:
    """Overall and along every axis: the rate of each slice lies within 3 sigma, allowing for how many are looked at."""
    kept = dropout_mask(SEED, p, 2, 4, 256, 256).double()
    sigma = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(float(kept.mean()) - (1 - p)) < 3 * sigma
    for dim in range(4):
        rates = kept.movedim(dim, 0).flatten(1).mean(dim=1)
        slice_sigma = (p * (1 - p) / (kept.numel() / kept.shape[dim])) ** 0.5
        assert float((rates - (1 - p)).abs().max()) < (4.5 if kept.shape[dim] > 4 else 3.5) * slice_sigma


def test_neighbours_are_uncorrelated() -> None:
    """Correlation of the mask with itself one step on, along each axis and from one seed to the next."""
    kept = dropout_mask(SEED, 0.5, 4, 8, 128, 128).double() * 2 - 1
    after = dropout_mask(SEED + 1, 0.5, 4, 8, 128, 128).double() * 2 - 1
    pairs = [(kept.narrow(d, 0, n - 1), kept.narrow(d, 1, n - 1)) for d, n in enumerate(kept.shape)] + [(kept, after)]
    for one, other in pairs:
        assert abs(float((one * other).mean())) < 3.5 / one.numel() ** 0.5


def test_nothing_dropped_at_zero() -> None:
    assert bool(dropout_mask(SEED, 0.0, 1, 1, 9, 9).all())


def _uniform(batch: int, seqlen_q: int, seqlen_kv: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every weight is 1 / seqlen_kv, and each key's value is its own unit vector: out shows the weights."""
    q = torch.zeros(batch, seqlen_q, heads, 8, requires_grad=True)
    k = torch.randn(batch, seqlen_kv, heads, 8)
    v = torch.eye(seqlen_kv).view(1, seqlen_kv, 1, seqlen_kv).repeat(batch, 1, heads, 1).requires_grad_()
    return q, k, v


def _dropped(p: float = 0.35, **options: Any) -> tuple[Tensor, Tensor]:
    """(weights that attention used, (batch, heads, queries, keys); the gradient of v for a gradient of ones)."""
    q, k, v = _uniform(2, 37, 45, 3)
    out = flashtile.attention(q, k, v, dropout_p=p, seed=SEED, **options)
    (dv,) = torch.autograd.grad(out.sum(), [v])
    return out.detach().transpose(1, 2), dv


def test_attention_drops_what_the_mask_says() -> None:
    weights, dv = _dropped()
    kept = dropout_mask(SEED, 0.35, 2, 3, 37, 45)
    assert_close(weights, kept / (1 - 0.35) / 45)
    # The backward pass must have drawn the same bits: dv = weights^T ones.
    assert_close(dv, weights.sum(dim=2).transpose(1, 2)[..., None].expand_as(dv).contiguous(), roundings=64)


def test_all_gradients_use_the_same_bits() -> None:
    """Against the plain formula with the mask that `dropout_mask` returns, not with the reference's own drawing."""
    q, k, v = (torch.randn(2, 33, 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
    grad = torch.randn(2, 33, 2, 16, dtype=torch.float64)
    found = torch.autograd.grad(flashtile.attention(q, k, v, dropout_p=0.2, seed=7), [q, k, v], grad)
    weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / 4, dim=-1)
    out = torch.einsum("bhij,bjhd->bihd", weights * dropout_mask(7, 0.2, 2, 2, 33, 33) / 0.8, v)
    for one, other in zip(found, torch.autograd.grad(out, [q, k, v], grad), strict=True):
        assert_close(one, other, roundings=64)


def test_log_sum_exp_ignores_dropout() -> None:
    q, k, v = (torch.randn(1, 20, 2, 8) for _ in range(3))
    dropped = flashtile.attention(q, k, v, dropout_p=0.5, seed=3, return_lse=True)
    assert_close(dropped.lse, flashtile.attention(q, k, v, return_lse=True).lse)


def test_same_bits_for_any_tiling(small_tiles: None) -> None:
    weights, _ = _dropped()
    assert torch.equal(weights > 0, dropout_mask(SEED, 0.35, 2, 3, 37, 45))


def test_packed_sequences_drop_as_a_batch_does() -> None:
    q, k, v = _uniform(2, 37, 45, 3)
    flat = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    cu_seqlens = offsets((37, 37)), offsets((45, 45))
    out = flashtile.attention_varlen(*flat, *cu_seqlens, dropout_p=0.35, seed=SEED)
    weights = out.unflatten(0, (2, 37)).transpose(1, 2)
    assert torch.equal(weights > 0, dropout_mask(SEED, 0.35, 2, 3, 37, 45))


def test_a_masked_key_is_never_restored() -> None:
    weights, _ = _dropped(causal=True)
    allowed = torch.ones(37, 45, dtype=torch.bool).tril(45 - 37)
    assert torch.equal(weights > 0, dropout_mask(SEED, 0.35, 2, 3, 37, 45) & allowed)


def _attend(seed: int | Tensor | None) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, 24, 2, 8, generator=generator) for _ in range(3))
    result = flashtile.attention(q, k, v, dropout_p=0.5, seed=seed)
    assert isinstance(result, Tensor)
    return result


def test_seed_as_tensor() -> None:
    assert_equal_bits([_attend(11), _attend(11)], [_attend(torch.tensor(11)), _attend(torch.tensor([11]))])
    assert not torch.equal(_attend(11), _attend(12))
    assert not torch.equal(_attend(11), _attend(11 + 2**32))


def test_default_seed_follows_the_generator() -> None:
    torch.manual_seed(1)
    first, second = _attend(None), _attend(None)
    torch.manual_seed(1)
    assert_equal_bits([_attend(None)], [first])
    assert not torch.equal(first, second)


def test_without_dropout_the_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    q, k, v = (torch.zeros(1, 4, 1, 8) for _ in range(3))
    flashtile.attention(q, k, v, dropout_p=0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_expectation_is_the_undropped_result() -> None:
    """The mean over many seeds approaches attention without dropout, as 1 / (1 - p) promises."""
    q, k, v = (torch.randn(1, 8, 1, 8, dtype=torch.float64) for _ in range(3))
    plain = flashtile.attention(q, k, v)
    draws = torch.stack([flashtile.attention(q, k, v, dropout_p=0.3, seed=seed) for seed in range(400)])
    spread = draws.std(dim=0) / len(draws) ** 0.5
    assert float(((draws.mean(dim=0) - plain).abs() / spread).max()) < 4.5
