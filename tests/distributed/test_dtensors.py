"""`attention` and `sdpa` on DTensors: four processes, batch and heads over a mesh, against one with everything."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import flashtile
from flashtile import masks
from tests import conformance
from tests.distributed import processes

RANKS = 4
BATCH, LENGTH, HEADS, HEADDIM = 4, 9, 4, 8
ALL, ROWS, HEAD, LINE = Replicate(), Shard(0), Shard(2), Shard(1)
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """mesh: its sizes. q, k: placements of q, and of k and v. local: (batch, heads, heads_kv) that each device sees.

    tables: placements of further arguments by their names; those not named are plain tensors. options: the rest.
    """

    name: str
    mesh: tuple[int, ...]
    q: tuple[Any, ...]
    k: tuple[Any, ...]
    local: tuple[int, int, int]
    heads_kv: int = 4
    batch: int = BATCH
    shapes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    tables: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    options: Callable[[], dict[str, Any]] = dict
    function: Callable[..., Any] = flashtile.attention

    def leaves(self) -> Tensors:
        torch.manual_seed(3)
        shapes = {
            "q": (self.batch, LENGTH, HEADS, HEADDIM),
            "k": (self.batch, LENGTH + 2, self.heads_kv, HEADDIM),
            "v": (self.batch, LENGTH + 2, self.heads_kv, HEADDIM),
            **dict(self.shapes),
        }
        return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}

    def run(self, leaves: Tensors) -> tuple[Any, Tensors]:
        """The output, and gradients by the names of leaves."""
        used = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
        q, k, v = (used.pop(name) for name in "qkv")
        out = self.function(q, k, v, **used, **self.options())
        loss = out.full_tensor() if isinstance(out, DTensor) else out
        (loss * torch.linspace(-1, 1, loss.numel(), dtype=torch.float64).view(loss.shape)).sum().backward()
        return out, {name: leaf.grad for name, leaf in {**used, "q": q, "k": k, "v": v}.items()}

    def share(self) -> tuple[Tensors, list[Any]]:
        """What a process finds, whole, and (batch, heads, heads_kv, backward) of the problems that it solved."""
        mesh = init_device_mesh("cpu", self.mesh)
        placements = {"q": self.q, "k": self.k, "v": self.k, **dict(self.tables)}
        leaves = {
            name: distribute_tensor(leaf, mesh, placements[name]) if name in placements else leaf
            for name, leaf in self.leaves().items()
        }
        with conformance.watched() as plans:
            out, gradients = self.run(leaves)
        assert isinstance(out, DTensor)
        for name, leaf in leaves.items():
            if isinstance(leaf, DTensor):
                assert gradients[name].placements == leaf.placements, name
        found = {"out": out, **gradients}
        whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}
        problems = [plan.problem for plan in plans]
        return whole, [(p.batch, p.heads, p.heads_kv, p.backward) for p in problems]


def _sdpa(q: Any, k: Any, v: Any, **options: Any) -> Any:
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return flashtile.sdpa(q, k, v, **options).transpose(1, 2)


def _ids() -> dict[str, Any]:
    ids = torch.arange(LENGTH) // 4
    return {"mask": masks.document(ids, torch.arange(LENGTH + 2) // 4) & masks.prefix(torch.tensor([11, 9, 5, 2]))}


def _score() -> dict[str, Any]:
    return {"score_mod": lambda score, b, h, q_idx, kv_idx: score + h * 0.1 - b * 0.01 * kv_idx}


FULL = (BATCH, HEADS, 4)
PAIRS = (LENGTH, LENGTH + 2)
CASES = [
    Case("batch", (4,), (ROWS,), (ROWS,), (1, 4, 4), options=lambda: {"causal": True}),
    Case("heads", (4,), (HEAD,), (HEAD,), (4, 1, 1)),
    Case("both", (2, 2), (ROWS, HEAD), (ROWS, HEAD), (2, 2, 1), heads_kv=2, options=lambda: {"window": (3, 0)}),
    Case("batch_twice", (2, 2), (ROWS, ROWS), (ROWS, ROWS), (1, 4, 4)),
    Case("one_sharded", (2, 2), (ROWS, HEAD), (ALL, ALL), (2, 2, 2)),
    Case("one_key_head", (2, 2), (ROWS, HEAD), (ROWS, ALL), (2, 2, 1), heads_kv=1),
    Case("groups_stay_whole", (4,), (HEAD,), (ALL,), (4, 4, 2), heads_kv=2),
    Case("sequence_is_gathered", (2, 2), (LINE, HEAD), (LINE, HEAD), (4, 2, 2)),
    Case("uneven_batch", (2, 2), (ROWS, HEAD), (ROWS, HEAD), (2, 2, 2), batch=3),
    Case("replicated", (4,), (ALL,), (ALL,), FULL),
    Case(
        "shared_bias", (2, 2), (ROWS, HEAD), (ROWS, HEAD), (2, 2, 2), shapes=(("bias", (HEADS, *PAIRS)),),
        tables=(("bias", (ALL, ALL)),),
    ),
    Case(
        "sharded_bias", (2, 2), (ROWS, HEAD), (ROWS, HEAD), (2, 2, 2), shapes=(("bias", (BATCH, 1, *PAIRS)),),
        tables=(("bias", (ROWS, ALL)),),
    ),
    Case(
        "bias_of_pairs", (2, 2), (ROWS, HEAD), (ROWS, HEAD), FULL, shapes=(("bias", (BATCH // 2, 1, HEADS, *PAIRS)),),
        tables=(("bias", (ROWS, ALL)),),
    ),
    Case(
        "plain_tables", (2, 2), (ROWS, HEAD), (ROWS, HEAD), (2, 2, 2),
        shapes=(("alibi_slopes", (HEADS,)), ("sinks", (HEADS,))),
    ),
    Case("masks", (2, 2), (ROWS, HEAD), (ROWS, HEAD), (2, 2, 2), options=_ids),
    Case("functions", (2, 2), (ROWS, HEAD), (ROWS, HEAD), FULL, options=_score),
    Case("dropout", (4,), (ROWS,), (ROWS,), FULL, options=lambda: {"dropout_p": 0.5, "seed": 7}),
    Case(
        "sdpa", (2, 2), (ROWS, HEAD), (ROWS, HEAD), (2, 2, 1), heads_kv=2, shapes=(("attn_mask", (1, HEADS, *PAIRS)),),
        tables=(("attn_mask", (ALL, Shard(1))),), options=lambda: {"enable_gqa": True}, function=_sdpa,
    ),
]  # fmt: skip


def refusals(rank: int, ranks: int) -> list[str]:
    mesh = init_device_mesh("cpu", (ranks,))
    q = distribute_tensor(torch.randn(4, 5, 4, 8), mesh, [ROWS])
    offsets = torch.tensor([0, 5])
    calls = [
        partial(flashtile.attention, q, q.to_local(), q),
        partial(flashtile.attention, q, q, q, dropout_p=0.1),
        partial(flashtile.attention_varlen, q[0], q[0], q[0], offsets, offsets),
    ]
    said = []
    for call in calls:
        with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
            call()
        said.append(str(caught.value))
    return said


def log_sum_exp(rank: int, ranks: int) -> tuple[tuple[Any, ...], Tensor, Tensor]:
    """Its placements, itself, and the gradient of q through it."""
    torch.manual_seed(3)
    q = torch.randn(2, 5, 4, 8, dtype=torch.float64)
    mesh = init_device_mesh("cpu", (2, 2))
    spread = distribute_tensor(q, mesh, [ROWS, HEAD]).requires_grad_()
    out, lse = flashtile.attention(spread, spread, spread, return_lse=True)
    (out.sum() + lse.square().sum()).backward()
    assert out.placements == (ROWS, HEAD)
    return lse.placements, lse.full_tensor(), spread.grad.full_tensor()


def partial_sums(rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """q as the sum of what the devices hold, which is what a row-wise linear layer leaves."""
    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(rank)
    part = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    q = DTensor.from_local(part, mesh, [Partial()])
    found = flashtile.attention(q, q, q).full_tensor()
    return found, q.full_tensor()


def compiled(rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(3)
    q = distribute_tensor(torch.randn(2, 5, 4, 8), mesh, [ROWS, HEAD]).requires_grad_()

    lengths = torch.tensor([5, 3])

    def layer(x: Any) -> Any:
        return flashtile.attention(x * 2, x, x, causal=True, mask=masks.prefix(lengths)) + 1

    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(q)
    found.sum().backward()
    return found.full_tensor(), q.grad.full_tensor()


@dataclass(frozen=True)
class Share:
    """The job of a case; functions in its options do not travel, its name does."""

    name: str

    def __call__(self, rank: int, ranks: int) -> tuple[Tensors, list[Any]]:
        return next(case for case in CASES if case.name == self.name).share()


JOBS = [*(Share(case.name) for case in CASES), refusals, log_sum_exp, partial_sums, compiled]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[Any]]:
    values = processes.run(JOBS, RANKS, tmp_path_factory.mktemp("dtensors"))
    return dict(zip(JOBS, values, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results_and_gradients(case: Case, done: dict[Any, list[Any]]) -> None:
    leaves = case.leaves()
    out, gradients = case.run(leaves)
    for found, plans in processes.succeeded(done[Share(case.name)]):
        assert set(found) == {"out", *leaves}
        for name, expected in {"out": out, **gradients}.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=1e-12)
        assert [backward for *_, backward in plans] == [False, True]
    if case.batch % 2 == 0:
        assert {tuple(sizes) for _, plans in done[Share(case.name)] for *sizes, _ in plans} == {case.local}


def test_refusals(done: dict[Any, list[Any]]) -> None:
    for mixed, dropout, packed in processes.succeeded(done[refusals]):
        assert mixed.startswith("q, k, v: got DTensors and plain tensors")
        assert dropout.startswith("seed: got None beside dropout on DTensors")
        assert packed.startswith("q: got a DTensor beside cu_seqlens_q")


def test_log_sum_exp(done: dict[Any, list[Any]]) -> None:
    torch.manual_seed(3)
    q = torch.randn(2, 5, 4, 8, dtype=torch.float64, requires_grad=True)
    out, lse = flashtile.attention(q, q, q, return_lse=True)
    (out.sum() + lse.square().sum()).backward()
    for placements, found, gradient in processes.succeeded(done[log_sum_exp]):
        assert placements == (ROWS, Shard(1))
        torch.testing.assert_close(found, lse.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, q.grad, rtol=1e-10, atol=1e-12)


def test_partial_sums(done: dict[Any, list[Any]]) -> None:
    for found, q in processes.succeeded(done[partial_sums]):
        torch.testing.assert_close(found, flashtile.attention(q, q, q), rtol=1e-12, atol=1e-12)


def test_compiled(done: dict[Any, list[Any]]) -> None:
    torch.manual_seed(3)
    q = torch.randn(2, 5, 4, 8, requires_grad=True)
    out = flashtile.attention(q * 2, q, q, causal=True, mask=masks.prefix(torch.tensor([5, 3]))) + 1
    out.sum().backward()
    for found, gradient in processes.succeeded(done[compiled]):
        torch.testing.assert_close(found, out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, q.grad, rtol=1e-4, atol=1e-5)
