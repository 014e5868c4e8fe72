"""Models of transformers inside of `context_parallel`: losses and gradients are those of one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flashtile.distributed import context_parallel
from tests.distributed import processes

pytest.importorskip("transformers", reason="transformers is not installed")
from tests.integrations.models import DECODER, VOCABULARY, WINDOWED, Model

TOKENS = 24


def _model(windowed: bool = False) -> Any:
    import flashtile.integrations.transformers  # noqa: F401

    kind = (
        ("MistralForCausalLM", "MistralConfig", WINDOWED) if windowed else ("LlamaForCausalLM", "LlamaConfig", DECODER)
    )
    return Model(*kind).build("tile_attention")


def _text() -> list[Tensor]:
    """[words, the words that follow, positions]."""
    text = torch.randint(2, VOCABULARY, (2, TOKENS + 1), generator=torch.Generator().manual_seed(3))
    return [text[:, :-1].clone(), text[:, 1:].clone(), torch.arange(TOKENS).repeat(2, 1)]


def _loss(model: Any, words: Tensor, following: Tensor, positions: Tensor, **more: Any) -> Tensor:
    logits = model(input_ids=words, position_ids=positions, use_cache=False, **more).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())


def _mean(tensor: Tensor) -> Tensor:
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def models(rank: int, ranks: int) -> None:
    for windowed in (False, True):
        for layout, scheme in (("zigzag", "ring"), ("contiguous", "ulysses")):
            model = _model(windowed)
            expected = _loss(model, *_text())
            expected.backward()
            gradients = [parameter.grad.clone() for parameter in model.parameters()]
            model.zero_grad()
            text = _text()
            with context_parallel(model, scheme=scheme, layout=layout, buffers=text, buffer_seq_dims=[1] * 3):
                loss = _loss(model, *text)
                loss.backward()
            torch.testing.assert_close(_mean(loss), expected.detach())
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                torch.testing.assert_close(_mean(parameter.grad), gradient, atol=1e-6, rtol=1e-4)


def packed_by_offsets(rank: int, ranks: int) -> None:
    """Sequences of 7 and 17 tokens, neither of which ends with a chunk."""
    offsets = torch.tensor([0, 7, TOKENS], dtype=torch.int32)
    packing = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 17, "max_length_k": 17}
    model, text = _model(), [each[:1].clone() for each in _text()]
    text[2][:, 7:] -= 7
    expected = _loss(model, *text, **packing)
    assert not torch.allclose(expected, _loss(model, *text[:2], torch.arange(TOKENS)[None])), "packing must matter"
    with context_parallel(model, buffers=text, buffer_seq_dims=[1] * 3):
        loss = _loss(model, *text, **packing)
    torch.testing.assert_close(_mean(loss), expected.detach())


def _sharded(text: list[Tensor], mask: Tensor | None = None) -> None:
    buffers = text if mask is None else [*text, mask]
    with context_parallel(None, buffers=buffers, buffer_seq_dims=[1] * len(buffers)):
        _loss(_model(), *text, attention_mask=mask)


def packed_by_positions(rank: int, ranks: int) -> None:
    """Two sequences whose ends are ends of chunks: no process sees one begin anew in the middle of a chunk."""
    text = _text()
    text[2] %= TOKENS // 2
    _sharded(text)


def forgotten_positions(rank: int, ranks: int) -> None:
    """Each process would count its own tokens from 0."""
    words, following, _ = _text()
    with context_parallel(None, buffers=[words, following], buffer_seq_dims=[1, 1]):
        _loss(_model(), words, following, None)  # type: ignore[arg-type]


def packed_in_one_share(rank: int, ranks: int) -> None:
    """Only the first process, which holds the last chunk, can tell; both raise, whatever was agreed on before."""
    text = _text()
    text[2][:, -2:] = torch.arange(2)
    _sharded(text)


def padded(rank: int, ranks: int) -> None:
    _sharded(_text(), torch.ones(2, TOKENS, dtype=torch.bool))


def test_over_two_processes(tmp_path: Path) -> None:
    jobs = [models, packed_by_offsets, packed_by_positions, packed_in_one_share, forgotten_positions, padded]
    equal, packed, *refused = processes.run(jobs, 2, tmp_path)
    processes.succeeded(equal)
    processes.succeeded(packed)
    for values, said in zip(
        refused, ("position_ids: got others",) * 3 + ("attention_mask: got a tensor",), strict=True
    ):
        assert all(said in line for line in processes.raised(values)), processes.raised(values)
