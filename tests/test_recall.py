"""Calls that were made before: what they are known by, and that nothing but addresses may differ."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flashtile
from flashtile import masks, recall


@pytest.fixture(autouse=True)
def remembering(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's calls are kept as a GPU's are."""
    monkeypatch.setattr(recall, "worth_it", lambda q: True)
    monkeypatch.setattr(recall, "_known", {})


def _qkv(length: int = 8, dtype: torch.dtype = torch.float32, headdim: int = 8) -> list[Tensor]:
    return [torch.randn(1, length, 2, headdim, dtype=dtype) for _ in range(3)]


def _calls() -> int:
    return len(recall._known)


def test_a_second_call_is_known_and_sees_its_own_tensors() -> None:
    for _ in range(3):
        q, k, v = (tensor.requires_grad_() for tensor in _qkv())
        out = flashtile.attention(q, k, v, causal=True)
        expected = torch.nn.functional.scaled_dot_product_attention(
            *(tensor.transpose(1, 2) for tensor in (q, k, v)), is_causal=True
        )
        torch.testing.assert_close(out, expected.transpose(1, 2))
        (found,), (wanted,) = (torch.autograd.grad(t.sum(), [k], retain_graph=True) for t in (out, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert _calls() == 1


BASE: dict[str, Any] = {"causal": False}
OTHER: list[dict[str, Any]] = [
    {"causal": True},
    {"window": (2, 0)},
    {"window": (2, None)},
    {"mask": masks.prefix(2)},
    {"softcap": 3.0},
    {"scale": 0.5},
    {"alignment": "top_left"},
    {"out_dtype": torch.float32},
    {"return_lse": True},
    {"deterministic": True},
    {"backend": "pytorch"},
    {"bias": torch.randn(8, 8)},
    {"bias": torch.randn(8, 8).requires_grad_()},
    {"bias": torch.randn(1, 2, 8, 8)},
    {"alibi_slopes": torch.randn(2)},
    {"sinks": torch.randn(2)},
]


def test_whatever_an_option_says_makes_another_call() -> None:
    tensors = _qkv()
    for count, options in enumerate([BASE, *OTHER], 1):
        flashtile.attention(*tensors, **options)
        flashtile.attention(*tensors, **options)
        assert _calls() == count, options


def test_whatever_a_tensor_is_makes_another_call() -> None:
    wide = torch.randn(1, 8, 2, 16)
    kinds = [
        _qkv(),
        _qkv(9),
        _qkv(dtype=torch.float64),
        _qkv(headdim=4),
        [_qkv()[0].requires_grad_(), *_qkv()[1:]],
        [wide[..., :8], wide[..., 8:], *_qkv()[2:]],
    ]
    for count, tensors in enumerate(kinds, 1):
        flashtile.attention(*tensors)
        assert _calls() == count
    with torch.no_grad():
        flashtile.attention(*kinds[4])
    assert _calls() == len(kinds) + 1


MASKS: list[Any] = [
    torch.ones(8, 8, dtype=torch.bool),
    masks.document(torch.zeros(8, dtype=torch.int32)),
    lambda b, h, q_idx, kv_idx: q_idx >= kv_idx,
]


@pytest.mark.parametrize("mask", MASKS, ids=["dense", "document", "function"])
def test_masks_are_known_by_what_they_come_to(mask: Any) -> None:
    tensors = _qkv()
    found = [flashtile.attention(*tensors, mask=mask) for _ in range(3)]
    assert _calls() == 1
    assert torch.equal(found[0], found[2])


def test_functions_are_asked_every_time_what_they_capture() -> None:
    factor = 2.0
    table = torch.zeros(8)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score * factor + table[kv_idx]

    tensors = _qkv()

    def expected() -> Tensor:
        bias = table[None, :].expand(8, 8)
        query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
        out = torch.nn.functional.scaled_dot_product_attention(query * factor, key, value, attn_mask=bias)
        return out.transpose(1, 2)

    for _ in range(2):
        torch.testing.assert_close(flashtile.attention(*tensors, score_mod=score_mod), expected())
    assert _calls() == 1
    table = torch.randn(8)
    torch.testing.assert_close(flashtile.attention(*tensors, score_mod=score_mod), expected())
    assert _calls() == 1
    factor = 3.0
    torch.testing.assert_close(flashtile.attention(*tensors, score_mod=score_mod), expected())
    assert _calls() == 2


def test_dropout_draws_its_own_seed_in_every_call() -> None:
    tensors = _qkv(32)
    torch.manual_seed(0)
    drawn = [flashtile.attention(*tensors, dropout_p=0.5) for _ in range(3)]
    assert _calls() == 1
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    torch.manual_seed(0)
    # One number a call, whether the call was known or not.
    again = [flashtile.attention(*tensors, dropout_p=0.5) for _ in range(3)]
    assert all(map(torch.equal, drawn, again))


def test_seeds_are_read_in_every_call() -> None:
    tensors = _qkv(32)
    first, other = (flashtile.attention(*tensors, dropout_p=0.5, seed=seed) for seed in (1, 2))
    assert _calls() == 1
    assert not torch.equal(first, other)
    for seed, wanted in ((1, first), (2, other)):
        assert torch.equal(flashtile.attention(*tensors, dropout_p=0.5, seed=torch.tensor(seed)), wanted)
        assert torch.equal(flashtile.attention(*tensors, dropout_p=0.5, seed=seed), wanted)
    assert _calls() == 2
    for wrong in (2**64, True, 1.0):
        with pytest.raises((TypeError, ValueError), match="seed"):
            flashtile.attention(*tensors, dropout_p=0.5, seed=wrong)  # type: ignore[arg-type]


def test_autocast_is_known_by_what_it_makes_of_the_tensors() -> None:
    tensors = _qkv()
    whole = flashtile.attention(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = [flashtile.attention(*tensors) for _ in range(2)]
    assert _calls() == 2
    assert [out.dtype for out in found] == 2 * [torch.bfloat16]
    torch.testing.assert_close(found[1].float(), whole, atol=0.02, rtol=0.02)
    with torch.autocast("cpu", torch.float16):
        assert flashtile.attention(*tensors).dtype is torch.float16
    assert _calls() == 3


def test_block_masks_are_known_and_looked_at_in_every_call() -> None:
    tensors = _qkv(32)

    def blocks(mask_mod: Any, length: int = 32) -> Any:
        return create_block_mask(mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=16)

    def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx >= kv_idx

    def anywhere(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx >= 0

    made = blocks(causal)
    for _ in range(3):
        found = flashtile.attention(*tensors, block_mask=made)
        torch.testing.assert_close(found, flashtile.attention(*tensors, causal=True))
    assert _calls() == 2
    # Another one of the same kind, and the same one changed: known, and not taken for the first.
    torch.testing.assert_close(
        flashtile.attention(*tensors, block_mask=blocks(anywhere)), flashtile.attention(*tensors)
    )
    made.kv_num_blocks.zero_()
    made.full_kv_num_blocks.zero_()
    assert not flashtile.attention(*tensors, block_mask=made).any()
    with pytest.raises(ValueError, match="block_mask: got one made for lengths"):
        flashtile.attention(*tensors, block_mask=blocks(causal, 48))


def test_wrong_arguments_are_refused_every_time() -> None:
    tensors = _qkv()
    flashtile.attention(*tensors, causal=True)
    for _ in range(2):
        with pytest.raises(TypeError, match="causal"):
            flashtile.attention(*tensors, causal=1)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="headdim"):
            flashtile.attention(tensors[0], tensors[1][..., :4], tensors[2])
    assert _calls() == 1


def test_packed_calls_are_known_by_their_offsets_too() -> None:
    q, k, v = (tensor[0] for tensor in _qkv())
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32)
    whole = flashtile.attention_varlen(q, k, v, offsets, offsets)
    flashtile.attention_varlen(q, k, v, offsets.clone(), offsets)
    assert _calls() == 1
    flashtile.attention_varlen(q, k, v, offsets.long(), offsets.long())
    flashtile.attention_varlen(q, k, v, offsets, offsets, max_seqlen_q=5)
    used = torch.tensor([3, 4], dtype=torch.int32)
    part = flashtile.attention_varlen(q, k, v, offsets, offsets, seqused_k=used)
    assert _calls() == 4
    assert not torch.equal(whole, part)
    with pytest.raises((TypeError, ValueError), match="seqused_k"):
        flashtile.attention_varlen(q, k, v, offsets, offsets, seqused_k=used.to_sparse())


def test_old_calls_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "_KEPT", 4)
    for length in range(1, 12):
        flashtile.attention(*_qkv(length))
    assert _calls() == 4
