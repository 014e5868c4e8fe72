"""`context_parallel`: a stretch of code in which `flashtile.attention` runs sharded."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from flashtile import sharding
from flashtile.check import sharding as check
from flashtile.distributed.balance import ranks_of, shard
from flashtile.distributed.calls import agreement_of, names_of, run
from flashtile.parts import Arguments, Packing


@contextmanager
def context_parallel(
    model: nn.Module | None,
    mesh: Any = None,
    *,
    scheme: str = "ring",
    layout: str = "zigzag",
    buffers: Sequence[Tensor] = (),
    buffer_seq_dims: Sequence[int] = (),
    no_restore_buffers: set[Tensor] | None = None,
) -> Iterator[None]:
    """In this context `flashtile.attention` and `attention_varlen` are calls over shares of a sequence.

    After `torch.distributed.tensor.experimental.context_parallel`: the tensors in `buffers` are replaced in place by
    this process's share of them, and restored at the end. A model between needs no change, but must take positions as
    an input, sharded like its tokens. Run the backward pass inside too where activations are checkpointed: computed
    again outside, a call would not be sharded, which `torch.utils.checkpoint` (use_reentrant=False) then refuses.

    Args:
        model: None: all calls in the context are sharded. A module: only those made while it or a module inside of it
            runs forward, and those of backward passes, where checkpoints are computed again.
        mesh, scheme, layout: as in `flashtile.distributed.attention`.
        buffers: tensors of whole sequences that all processes hold: token ids, positions, labels.
        buffer_seq_dims: the dimension of the sequence of each.
        no_restore_buffers: those of `buffers` that may stay sharded.

    Raises:
        TypeError, ValueError: an argument is not as described, or another such context is open.
    """
    if sharding.current is not None:
        check.inside_context()
    check.buffers(buffers, buffer_seq_dims)
    names = names_of(mesh, scheme, layout)

    running = [0 if model is not None else 1]

    def is_running() -> bool:
        return running[0] > 0 or _in_backward()

    def attend(q: Tensor, k: Tensor, v: Tensor, arguments: Arguments, packing: Packing | None = None) -> Any:
        return run(q, k, v, arguments, packing, names) if is_running() else None

    @lru_cache
    def positions(tokens: int) -> Tensor:
        return shard(torch.arange(tokens * ranks_of(mesh)), mesh, dim=0, layout=layout)

    kept = _shard_in_place(buffers, buffer_seq_dims, mesh, layout, no_restore_buffers or set())
    hooks = _counted(model, running) if model is not None else []
    sharding.current = sharding.Current(attend, is_running, positions, agreement_of(names).unanimous)
    try:
        yield
    finally:
        sharding.current = None
        for hook in hooks:
            hook.remove()
        for buffer, whole in kept:
            _become(buffer, whole)


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _counted(model: nn.Module, running: list[int]) -> list[Any]:
    """Hooks that count how many modules of the model are running, one inside of the other."""

    def enter(*_: Any) -> None:
        running[0] += 1

    def leave(*_: Any) -> None:
        running[0] -= 1

    hooks: list[Any] = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(enter))
        hooks.append(module.register_forward_hook(leave, always_call=True))
    return hooks


def _shard_in_place(
    buffers: Sequence[Tensor], dims: Sequence[int], mesh: Any, layout: str, gone: set[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Every buffer becomes its share; returns those to be restored, with what they held."""
    shares = [shard(buffer, mesh, dim=dim, layout=layout) for buffer, dim in zip(buffers, dims, strict=True)]
    kept = []
    for buffer, share in zip(buffers, shares, strict=True):
        if all(buffer is not each for each in gone):
            kept.append((buffer, buffer.detach()))
        _become(buffer, share)
    return kept


@torch.no_grad()
def _become(buffer: Tensor, value: Tensor) -> None:
    """In place, but into other memory: buffers may be views of one text, shifted by a token."""
    target: Any = buffer
    target.set_(value)
