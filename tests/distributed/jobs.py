"""What the processes of a test do: a golden problem, its q, k and v dealt out, by every scheme."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from flashtile import distributed
from tests.problems import Call, Shape, Tensors, make


@dataclass(frozen=True)
class Sharded:
    """A golden problem by one scheme. `mesh`: the sizes of (ring, heads), for "mixed"."""

    name: str
    shape: Shape
    features: tuple[str, ...]
    scheme: str
    layout: str = "zigzag"
    dtype: torch.dtype = torch.float32
    mesh: tuple[int, int] | None = None
    lse_grad: bool = True

    def __str__(self) -> str:
        return f"{self.name} {self.scheme} {self.layout} {self.mesh or ''}"

    def call(self, device: str = "cpu") -> Call:
        return make(self.name, self.shape, self.features, self.dtype, device, self.lse_grad)

    def __call__(self, rank: int, ranks: int) -> Tensors | None:
        """The whole results, from rank 0."""
        mesh = None if self.mesh is None else mesh_of(self.mesh)
        found = results(self.call(), self.scheme, self.layout, mesh)
        return found if rank == 0 else None


_meshes: dict[tuple[int, int], DeviceMesh] = {}


def mesh_of(sizes: tuple[int, int], device: str = "cpu") -> DeviceMesh:
    """Groups are made once: every one costs sockets."""
    if sizes not in _meshes:
        _meshes[sizes] = init_device_mesh(device, sizes, mesh_dim_names=("ring", "heads"))
    return _meshes[sizes]


def results(call: Call, scheme: str, layout: str = "zigzag", mesh: Any = None, **more: Any) -> Tensors:
    """out, lse and gradients of the whole call, put together from what the ranks find: as `oracle.ours` gives them."""
    dim = 0 if call.shape.packed else 1
    shared = {"mesh": mesh, "layout": layout}
    whole = {name: leaf.detach().clone().requires_grad_() for name, leaf in call.leaves.items()}
    leaves = {
        name: distributed.shard(leaf.detach(), dim=dim, **shared).requires_grad_() if name in ("q", "k", "v") else leaf
        for name, leaf in whole.items()
    }
    arguments = {**call.arguments({**whole, **leaves}), **call.packing(), **more}
    qkv = (leaves["q"], leaves["k"], leaves["v"])
    state = distributed.attention(*qkv, mesh, scheme=scheme, layout=layout, **{**arguments, "return_lse": True})
    outputs = [(state.out, call.grads["out"], dim)]
    if "lse" in call.grads:
        outputs.append((state.lse, call.grads["lse"], 1 if call.shape.packed else 2))
    grads = [distributed.shard(grad, dim=place, **shared).to(value.dtype) for value, grad, place in outputs]
    found = torch.autograd.grad([value for value, *_ in outputs], list(leaves.values()), grads, allow_unused=True)
    gathered = {
        "out": distributed.unshard(state.out, dim=dim, **shared),
        "lse": distributed.unshard(state.lse, dim=1 if call.shape.packed else 2, **shared),
    }
    for (name, leaf), grad in zip(leaves.items(), found, strict=True):
        grad = torch.zeros_like(leaf) if grad is None else grad
        gathered[f"d{name}"] = distributed.unshard(grad, dim=dim, **shared) if name in ("q", "k", "v") else _sum(grad)
    return gathered


def _sum(share: Tensor) -> Tensor:
    """Gradients of what all ranks hold are shares."""
    total = share.detach().clone().contiguous()
    dist.all_reduce(total)
    return total
