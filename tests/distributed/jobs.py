"""What the processes of a test do: a golden problem, its q, k and v dealt out, by every scheme."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flashtile import distributed
from flashtile.distributed import balance, ring
from tests.problems import Call, Shape, Tensors, make

PAIRS = (
    *(("causal", "document"), ("window", "softcap"), ("chunk", "prefix_lm"), ("block", "bias"), ("mask_mod", "alibi")),
    *(("dense_mask", "sinks"), ("document_unsorted", "causal_top_left"), ("band", "score_mod"), ("prefix_none",)),
    *(("far_apart", "padding"), ("block_mask", "bias_heads"), ("prefix", "dropout"), ("window_top_left", "scale")),
    ("window_left", "bias_keys", "alibi_batch"),
)
"""Every mask, with something that changes scores."""


@dataclass(frozen=True)
class Sharded:
    """A golden problem by one scheme. `mesh`: the sizes of (ring, heads), for "mixed". `by_heads`: rings take one
    key/value head at a time, as they do with long sequences."""

    name: str
    shape: Shape
    features: tuple[str, ...]
    scheme: str
    layout: str = "zigzag"
    dtype: torch.dtype = torch.float32
    mesh: tuple[int, int] | None = None
    lse_grad: bool = True
    by_heads: bool = False

    def __str__(self) -> str:
        return f"{self.name} {self.scheme} {self.layout} {self.mesh or ''}"

    def call(self, device: str = "cpu") -> Call:
        return make(self.name, self.shape, self.features, self.dtype, device, self.lse_grad)

    def __call__(self, rank: int, ranks: int) -> Tensors:
        """What this rank finds."""
        mesh = None if self.mesh is None else mesh_of(self.mesh)
        pairs = 1 if self.by_heads else 2**30
        with mock.patch.multiple(ring, FORWARD_PAIRS=pairs, BACKWARD_PAIRS=pairs):
            return shares(self.call(), self.scheme, self.layout, mesh)

    def together(self, found: Sequence[Tensors]) -> Tensors:
        """The whole results from those of all ranks."""
        dims = _dims(self.shape.packed)
        joined = {}
        for name in found[0]:
            tensors = [each[name] for each in found]
            if name not in dims:
                joined[name] = torch.stack(tensors).sum(0)
                continue
            if self.mesh is not None:
                inner = self.mesh[1]
                rows = [tensors[place : place + inner] for place in range(0, len(tensors), inner)]
                tensors = [balance.joined(row, "contiguous", dims[name]) for row in rows]
            joined[name] = balance.joined(tensors, self.layout, dims[name])
        return joined


_meshes: dict[tuple[int, int], DeviceMesh] = {}


def mesh_of(sizes: tuple[int, int], device: str = "cpu") -> DeviceMesh:
    """Groups are made once: every one costs sockets."""
    if sizes not in _meshes:
        _meshes[sizes] = init_device_mesh(device, sizes, mesh_dim_names=("ring", "heads"))
    return _meshes[sizes]


def _dims(packed: bool) -> dict[str, int]:
    """Where the sequence is in each result that is dealt out; gradients of others are shares, to be summed."""
    tokens = 0 if packed else 1
    return {"out": tokens, "dq": tokens, "dk": tokens, "dv": tokens, "lse": 1 if packed else 2}


def shares(call: Call, scheme: str, layout: str = "zigzag", mesh: Any = None, backend: str | None = None) -> Tensors:
    """out, lse and gradients of this rank's share of the call."""
    dims = _dims(call.shape.packed)

    def own(tensor: Tensor, name: str) -> Tensor:
        return distributed.shard(tensor, mesh, dim=dims[name], layout=layout)

    whole = {name: leaf.detach().clone().requires_grad_() for name, leaf in call.leaves.items()}
    leaves = {
        name: own(leaf.detach(), f"d{name}").requires_grad_() if name in ("q", "k", "v") else leaf
        for name, leaf in whole.items()
    }
    arguments = {**call.arguments({**whole, **leaves}), **call.packing(), "return_lse": True, "backend": backend}
    qkv = (leaves["q"], leaves["k"], leaves["v"])
    state = distributed.attention(*qkv, mesh, scheme=scheme, layout=layout, **arguments)
    outputs = [(name, getattr(state, name)) for name in call.grads]
    grads = [own(call.grads[name], name).to(value.dtype) for name, value in outputs]
    values = [value for _, value in outputs]
    found = torch.autograd.grad(values, list(leaves.values()), grads, allow_unused=True)
    gradients = {
        f"d{name}": torch.zeros_like(leaf) if grad is None else grad.detach()
        for (name, leaf), grad in zip(leaves.items(), found, strict=True)
    }
    return {"out": state.out.detach(), "lse": state.lse.detach(), **gradients}


def results(call: Call, scheme: str, backend: str | None = None) -> Tensors:
    """The whole results, put together by the ranks themselves."""
    dims = _dims(call.shape.packed)
    found = shares(call, scheme, backend=backend)
    for name, tensor in found.items():
        if name in dims:
            found[name] = distributed.unshard(tensor, dim=dims[name])
        else:
            dist.all_reduce(tensor)
    return found
