"""`context_parallel` around a model, with FSDP2, checkpointing and torch.compile, and on DTensors: losses and gradients
are those of one process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

import flashtile
from flashtile import distributed, fp8, sharding
from flashtile.distributed import context_parallel, shard
from tests.distributed import processes

TOKENS, WORDS = 32, 19
RANKS = 2


class Block(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.sinks = nn.Parameter(torch.zeros(4))
        self.checkpointed = checkpointed

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unflatten(-1, (3, 4, 4)).unbind(2)
        return flashtile.attention(q, k, v, causal=True, sinks=self.sinks).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        mixed = checkpoint(self.attend, x, use_reentrant=False) if self.checkpointed else self.attend(x)
        return x + self.out(mixed)


class Model(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, 16), nn.Embedding(TOKENS, 16)
        self.blocks = nn.ModuleList(Block(checkpointed) for _ in range(2))
        self.head = nn.Linear(16, WORDS)

    def forward(self, words: Tensor, places: Tensor) -> Tensor:
        x = self.words(words) + self.places(places)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _model(checkpointed: bool = False) -> Model:
    torch.manual_seed(3)
    return Model(checkpointed)


def _text() -> tuple[Tensor, Tensor, Tensor]:
    """(words, places, the words that follow)."""
    text = torch.randint(WORDS, (2, TOKENS + 1), generator=torch.Generator().manual_seed(7))
    return text[:, :-1], torch.arange(TOKENS).expand(2, -1), text[:, 1:]


def _loss(model: Callable[..., Tensor], words: Tensor, places: Tensor, following: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(words, places).flatten(0, 1), following.flatten())


def _expected() -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of one process."""
    model = _model()
    loss = _loss(model, *_text())
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[misc]


def _compare(loss: Tensor, gradients: dict[str, Tensor]) -> None:
    """The mean over ranks is what one process finds."""
    expected_loss, expected = _expected()
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    torch.testing.assert_close(loss / dist.get_world_size(), expected_loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def _averaged(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad.clone()
        dist.all_reduce(gradient)
        found[name.removeprefix("_orig_mod.")] = gradient / dist.get_world_size()
    return found


def by_hand(rank: int, ranks: int) -> None:
    """Shares as inputs, the context around both passes."""
    for scheme in ("ring", "gather", "ulysses"):
        model, inputs = _model(), [shard(tensor) for tensor in _text()]
        with context_parallel(None, scheme=scheme):
            loss = _loss(model, *inputs)
        loss.backward()
        _compare(loss, _averaged(model))


def buffers(rank: int, ranks: int) -> None:
    """In the manner of PyTorch's own: buffers become shares in place, and come back."""
    model, inputs = _model(), list(_text())
    wholes = [tensor.clone() for tensor in inputs]
    gone = {inputs[2]}
    with context_parallel(model, buffers=inputs, buffer_seq_dims=[1] * 3, no_restore_buffers=gone):
        own = torch.randn(1, 8, 2, 4)
        # Not the model's call: this rank's own.
        torch.testing.assert_close(
            flashtile.attention(own, own, own), flashtile.reference.attention(own, own, own).out.float()
        )
        assert inputs[0].shape == (2, TOKENS // ranks)
        loss = _loss(model, *inputs)
        loss.backward()
    _compare(loss, _averaged(model))
    assert torch.equal(inputs[0], wholes[0])
    assert torch.equal(inputs[1], wholes[1])
    assert inputs[2].shape == (2, TOKENS // ranks)


def checkpointed(rank: int, ranks: int) -> None:
    """What is computed again in the backward pass is sharded too."""
    for whose in (None, "model"):
        model, inputs = _model(checkpointed=True), [shard(tensor) for tensor in _text()]
        with context_parallel(model if whose else None):
            loss = _loss(model, *inputs)
            loss.backward()
        _compare(loss, _averaged(model))
    model = _model(checkpointed=True)
    with context_parallel(None):
        loss = _loss(model, *inputs)
    with pytest.raises(RuntimeError, match="different number of tensors"):
        loss.backward()


def fully_sharded(rank: int, ranks: int) -> None:
    """FSDP2 over the same ranks: parameters are dealt out, gradients averaged."""
    mesh = dist.init_device_mesh("cpu", (ranks,))
    model = _model(checkpointed=True)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    inputs = [shard(tensor, mesh) for tensor in _text()]
    with context_parallel(None, mesh):
        loss = _loss(model, *inputs)
        loss.backward()
    gradients = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    _compare(loss, gradients)


def compiled(rank: int, ranks: int) -> None:
    """The compiler sees operators, in one graph."""
    model, inputs = _model(), [shard(tensor) for tensor in _text()]
    for scheme in ("ring", "ulysses"):
        torch._dynamo.reset()
        with context_parallel(None, scheme=scheme):
            step: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
            loss = _loss(step, *inputs)
            loss.backward()
        _compare(loss, _averaged(model))
        model.zero_grad()


def distributed_tensors(rank: int, ranks: int) -> None:
    """DTensors sharded along the sequence in, DTensors out."""
    mesh = dist.init_device_mesh("cpu", (ranks,))
    torch.manual_seed(1)
    whole = [torch.randn(1, 16, 4, 8) for _ in range(3)]
    parts = [DTensor.from_local(shard(each, mesh, layout="contiguous"), mesh, [Shard(1)]) for each in whole]
    parts = [each.requires_grad_() for each in parts]
    state = distributed.ring_attention(*parts, layout="contiguous", causal=True, return_lse=True)
    assert isinstance(state.out, DTensor)
    expected = flashtile.attention(*whole, causal=True, return_lse=True)
    torch.testing.assert_close(state.out.full_tensor(), expected.out)
    torch.testing.assert_close(state.lse.full_tensor(), expected.lse)
    state.out.sum().backward()
    assert isinstance(parts[0].grad, DTensor)
    with pytest.raises(TypeError, match="q, k, v: got DTensors and plain tensors, need all of one kind"):
        distributed.ring_attention(parts[0], whole[1], whole[2])
    moved = parts[1].detach().redistribute(placements=[Shard(2)])
    with pytest.raises(ValueError, match=r"k: got a DTensor with placements .*need Shard\(1\)"):
        distributed.ring_attention(parts[0], moved, parts[2])


JOBS = (by_hand, buffers, checkpointed, fully_sharded, compiled, distributed_tensors)


def test_equals_one_process(tmp_path: Path) -> None:
    for values in processes.run(JOBS, RANKS, tmp_path):
        processes.succeeded(values)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_8_bit_tensors_are_refused() -> None:
    """Their scales belong to blocks of a whole sequence's rows."""
    quantized = fp8.quantize(*torch.randn(3, 1, 30, 2, 16))
    with context_parallel(None), pytest.raises(NotImplementedError, match=r"q: got flashtile\.fp8\.Scaled"):
        flashtile.attention(*quantized)


@pytest.mark.usefixtures("one_process")
def test_contexts_end_whatever_happens() -> None:
    with context_parallel(None):
        assert sharding.current is not None
    assert sharding.current is None
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError), context_parallel(model):
        model(torch.zeros(3))
    assert sharding.current is None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.usefixtures("one_process")
def test_refusals() -> None:
    with (
        pytest.raises(ValueError, match="context_parallel: got one inside of another"),
        context_parallel(None),
        context_parallel(None),
    ):
        pass
    with (
        pytest.raises(ValueError, match="buffer_seq_dims: got 0 numbers for 1 buffers"),
        context_parallel(None, buffers=[torch.zeros(4)]),
    ):
        pass
    with (
        pytest.raises(TypeError, match="buffers: got int at place 0"),
        context_parallel(None, buffers=[3], buffer_seq_dims=[0]),
    ):  # type: ignore[list-item]
        pass
