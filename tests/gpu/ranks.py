"""Attention over several GPUs against the reference, in one short run that prints one table:

    torchrun --nproc-per-node 2 -m tests.gpu.ranks

Nearly all of its time goes into compiling kernels, so they are compiled first, by many processes at once: each
rehearses a case as every rank would run it, in a group whose messages go nowhere, and leaves its kernels in Triton's
cache.

--device cpu runs the same over Gloo, on small lengths.
"""

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from flashtile import distributed, masks
from flashtile.check.sharding import RanksDisagree
from flashtile.distributed import ring
from tests import oracle
from tests.conformance import watched
from tests.distributed.jobs import PAIRS, mesh_of, results, shares
from tests.problems import KITCHEN_SINK, Call, Shape, dense, make, packed

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SINK = (*KITCHEN_SINK, "gqa")


class Case(NamedTuple):
    """A golden problem by one scheme. backend: None for the fastest, which compiles kernels."""

    name: str
    shape: Shape
    features: tuple[str, ...]
    dtype: torch.dtype = BF16
    scheme: str = "ring"
    backend: str | None = None

    def call(self, device: str) -> Call:
        return make(self.name, self.shape, self.features, self.dtype, device)


def cases(length: int, headdim: int) -> list[Case]:
    """Kernels of each sort; then, by the backend that compiles none, every mask with something that changes scores."""
    square = dense(1, length, length, 4, 4, headdim)
    kernels = [
        *(Case(f"causal {scheme}", square, ("causal",), scheme=scheme) for scheme in ("ring", "gather", "ulysses")),
        Case("causal mqa sinks", square, ("causal", "mqa", "sinks"), F16),
        Case("causal float32", square, ("causal",), F32),
        Case("window", square, ("window_left",)),
        Case("document", square, ("document",)),
        Case("mask_mod", square, ("mask_mod",)),
        Case("score_mod", square, ("score_mod",)),
        Case("bias", square, ("bias",)),
        Case("dropout", square, ("dropout",)),
        Case("packed causal", _packed(length), ("causal",)),
        Case("packed causal ulysses", _packed(length), ("causal",), scheme="ulysses"),
    ]
    small, even = dense(2, 48, 96, 4, 4, 16), dense(2, 96, 96, 4, 4, 16)
    plain = [
        Case("all in one", even, SINK, F32),
        *(Case("-".join(pair), small, pair) for pair in PAIRS),
        *(Case("-".join(pair), small, pair, scheme="ulysses") for pair in PAIRS[::3]),
        *(Case("-".join(pair), small, pair, scheme="gather") for pair in PAIRS[1::3]),
        Case("packed mods", _packed(96), ("causal", "bias", "alibi_batch", "score_mod")),
        Case("packed dropout", _packed(96), ("causal", "dropout"), scheme="ulysses"),
    ]
    return [*kernels, *(case._replace(backend="pytorch") for case in plain)]


def _packed(length: int) -> Shape:
    lengths = (length // 2 - 9, 0, length // 4 + 9, length // 4)
    return packed(lengths, lengths)


def rehearse(chosen: Sequence[Case], ranks: int, device: str) -> None:
    """Runs them as each of the ranks would, with whatever lies in memory for what the others send."""
    for case in chosen:
        call = case.call(device)
        for rank in range(ranks):
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
            try:
                shares(call, case.scheme, backend=case.backend)
            finally:
                dist.destroy_process_group()


def _rehearsals(every: Sequence[Case]) -> list[subprocess.Popen[bytes]]:
    """Processes that rehearse this rank's share of the cases that compile kernels, one each if there are cores."""
    local, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    mine = [number for number, case in enumerate(every) if case.backend is None][local::ranks]
    workers = max(1, min(len(mine), (os.cpu_count() or 1) // ranks))
    command = [sys.executable, "-m", "tests.gpu.ranks", "--rehearse"]
    return [subprocess.Popen([*command, *map(str, mine[place::workers])]) for place in range(workers)]


def _one(case: Case, device: str) -> tuple[float, str]:
    """(largest error over what is allowed, kernels of the two passes)."""
    call = case.call(device)
    with watched() as ran:
        found = results(call, case.scheme, case.backend)
    ours = {chosen.backend for chosen in ran}
    assert device == "cpu" or ours <= ({"hopper", "portable"} if case.backend is None else {case.backend}), ours
    kernels = {
        which: sorted({f"{p.backend}/{p.kernel}" for p in ran if p.problem.backward == which})
        for which in (False, True)
    }
    text = f"{'+'.join(kernels[False])} | {'+'.join(kernels[True])}"
    if dist.get_rank():
        return 0.0, text
    return max(ratio.value for ratio in oracle.compare(found, call)), text


def _other_stream(device: str) -> None:
    """Work on a side stream, results read there, equal to the default stream's bit for bit."""
    q, k, v = (torch.randn(1, 512, 4, 128, device=device, dtype=BF16) for _ in range(3))
    expected = distributed.ring_attention(q, k, v, causal=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [distributed.ring_attention(q, k, v, causal=True) for _ in range(3)]
        equal = all(bool(torch.equal(each, expected)) for each in found)
    assert equal, "another stream, other results"


def _by_heads(device: str) -> None:
    """Some heads at a time, as long sequences go round, is what all heads at once is."""
    q, k, v = (torch.randn(1, 512, 4, 128, device=device, dtype=BF16, requires_grad=True) for _ in range(3))
    found = []
    for pairs in (2**30, 1):
        with mock.patch.multiple(ring, FORWARD_PAIRS=pairs, BACKWARD_PAIRS=pairs):
            out = distributed.ring_attention(q, k, v, causal=True)
            found.append([out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))])
    for one, other in zip(*found, strict=True):
        oracle.assert_close(one, other)


def _compiled(device: str) -> None:
    """The compiler sees one operator."""
    q, k, v = (torch.randn(1, 512, 4, 128, device=device, dtype=BF16, requires_grad=True) for _ in range(3))
    step = torch.compile(
        lambda q, k, v: distributed.ring_attention(q * 1.0, k, v, causal=True).sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    expected = torch.autograd.grad(distributed.ring_attention(q * 1.0, k, v, causal=True).sum(), (q, k, v))
    for one, other in zip(torch.autograd.grad(step(q, k, v), (q, k, v)), expected, strict=True):
        oracle.assert_close(one, other)


def _mixed(device: str) -> None:
    """The mesh (ranks, 1) is the ring."""
    q, k, v = (torch.randn(1, 512, 4, 128, device=device, dtype=BF16) for _ in range(3))
    mesh = mesh_of((dist.get_world_size(), 1), device)
    expected = distributed.ring_attention(q, k, v, causal=True)
    oracle.assert_close(distributed.mixed_attention(q, k, v, mesh, causal=True), expected)


def _disagree(device: str) -> None:
    """Ranks whose calls differ say so at once, also of kinds that all have made before; then they go on."""
    q, k, v = (torch.randn(1, 512, 4, 128, device=device, dtype=BF16) for _ in range(3))
    documents = torch.arange(512 * dist.get_world_size(), device=device) // 100
    distributed.ring_attention(q, k, v, causal=True, mask=masks.document(documents))
    expected = distributed.ring_attention(q, k, v, causal=True)
    documents[700] += dist.get_rank() == 1
    wrong = [{"causal": dist.get_rank() == 0}, {"causal": True, "mask": masks.document(documents)}]
    begun, noticed = time.monotonic(), 0
    for options in wrong:
        distributed.ring_attention(q, k, v)
        try:
            distributed.ring_attention(q, k, v, **options)
        except RanksDisagree:
            noticed += 1
    assert noticed == len(wrong)
    assert time.monotonic() - begun < 10
    assert torch.equal(distributed.ring_attention(q, k, v, causal=True), expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rehearse", nargs="+", type=int, help="the numbers of cases whose kernels are compiled only")
    given = parser.parse_args()
    gpu = given.device == "cuda"
    every = cases(*((1024, 128) if gpu else (96, 16)))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu"
    if gpu:
        torch.cuda.set_device(torch.device(device))
    if given.rehearse:
        rehearse([every[number] for number in given.rehearse], int(os.environ.get("WORLD_SIZE", 2)), device)
        return
    begun = time.monotonic()
    lines = []
    if gpu:
        failed = sum(worker.wait() != 0 for worker in _rehearsals(every))
        lines.append(f"kernels compiled after {time.monotonic() - begun:.0f} s, {failed} rehearsals failed")
        dist.init_process_group("nccl", device_id=torch.device(device))
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    bad = _run(every, device, lines)
    if dist.get_rank() == 0:
        print("\n".join([*lines, f"{bad} failed, {time.monotonic() - begun:.0f} s"]), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    raise SystemExit(1 if bad else 0)


def _run(every: Sequence[Case], device: str, lines: list[str]) -> int:
    """How many failed; a line each."""
    bad = 0
    for case in every:
        start = time.monotonic()
        try:
            ratio, kernels = _one(case, device)
            verdict = "ok"
        except Exception:
            ratio, kernels, verdict = float("nan"), "", traceback.format_exc().strip().splitlines()[-1][:90]
            bad += 1
        took = f"{ratio:5.2f} {time.monotonic() - start:5.1f} s"
        lines.append(f"{case.name:33} {case.scheme:7} {str(case.dtype)[6:]:9} {took} {verdict:4} {kernels}")
    kind = device.split(":")[0]
    checks = (_by_heads, _compiled, _mixed, _disagree)
    for check in (_other_stream, *checks) if kind == "cuda" else checks:
        try:
            check(kind)
            verdict = "ok"
        except Exception:
            verdict = traceback.format_exc().strip().splitlines()[-1][:120]
            bad += 1
        lines.append(f"{check.__name__:32} {verdict}")
    return bad


if __name__ == "__main__":
    main()
