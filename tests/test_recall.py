"""Calls that were made before: what they are known by, and that nothing but addresses may differ."""

from typing import Any

import pytest
import torch
from torch import Tensor

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


@pytest.mark.parametrize("options", [{"dropout_p": 0.5}, {"seed": 1}])
def test_what_arguments_do_not_show_is_never_kept(options: dict[str, Any]) -> None:
    flashtile.attention(*_qkv(), **options)
    assert _calls() == 0


def test_autocast_is_never_kept() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert flashtile.attention(*_qkv()).dtype is torch.bfloat16
    assert _calls() == 0


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


def test_old_calls_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "_KEPT", 4)
    for length in range(1, 12):
        flashtile.attention(*_qkv(length))
    assert _calls() == 4
