"""Attention over several GPUs against the reference, in one short run that prints one table:

    torchrun --nproc-per-node 2 -m tests.gpu.ranks

--device cpu runs the same over Gloo, on small lengths.
"""

import argparse
import os
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist

from flashtile import distributed
from tests import oracle
from tests.conformance import watched
from tests.distributed.jobs import mesh_of, results
from tests.problems import KITCHEN_SINK, Call, dense, make, packed

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SINK = (*KITCHEN_SINK, "gqa")


def _cases(length: int, headdim: int, every: bool) -> list[tuple[str, Any, tuple[str, ...], torch.dtype, str]]:
    """(name, shape, features, dtype, scheme)."""
    square = dense(1, length, length, 4, 4, headdim)
    oblong = dense(2, length // 2, length, 4, 4, headdim // 2)
    packing = packed(
        (length // 2 - 9, 0, length // 4 + 9, length // 4), (length // 2 - 9, 0, length // 4 + 9, length // 4)
    )
    found: list[Any] = [
        (f"causal {scheme}", square, ("causal",), dtype, scheme)
        for scheme, dtype in (("ring", BF16), ("gather", BF16), ("ulysses", BF16), ("ring", F32))
    ]
    found += [
        ("causal gqa", square, ("causal", "gqa"), F16, "ring"),
        ("band", oblong, ("window",), BF16, "ring"),
        ("sinks", square, ("causal", "sinks"), BF16, "ring"),
        ("bias", oblong, ("bias",), BF16, "ring"),
        ("alibi score_mod", oblong, ("alibi", "score_mod"), BF16, "ring"),
        ("document", oblong, ("document",), BF16, "ring"),
        ("mask_mod", oblong, ("mask_mod",), BF16, "ring"),
        ("dropout", oblong, ("dropout",), BF16, "ring"),
        ("score_mod ulysses", oblong, ("score_mod",), BF16, "ulysses"),
        ("all in one", square, SINK, F32, "ring"),
        ("packed causal", packing, ("causal",), BF16, "ring"),
        ("packed causal ulysses", packing, ("causal",), BF16, "ulysses"),
    ]
    if every:
        more = ("window_left", "softcap", "chunk", "padding", "prefix_lm", "block", "dense_mask", "block_mask")
        more += ("alibi_batch", "bias_keys", "document_unsorted", "far_apart")
        found += [(name, oblong, (name,), BF16, scheme) for name in more for scheme in ("ring", "ulysses")]
        found.append(("packed alibi", packing, ("causal", "alibi"), BF16, "ring"))
    return found


def _one(call: Call, scheme: str) -> tuple[float, str]:
    """(largest error over what is allowed, kernels of the two passes)."""
    with watched() as ran:
        found = results(call, scheme)
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
    q, k, v = (torch.randn(1, 512, 4, 64, device=device, dtype=BF16) for _ in range(3))
    expected = distributed.ring_attention(q, k, v, causal=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [distributed.ring_attention(q, k, v, causal=True) for _ in range(3)]
        equal = all(bool(torch.equal(each, expected)) for each in found)
    assert equal, "another stream, other results"


def _compiled(device: str) -> None:
    """The compiler sees one operator."""
    q, k, v = (torch.randn(1, 512, 4, 64, device=device, dtype=BF16, requires_grad=True) for _ in range(3))
    step = torch.compile(lambda q, k, v: distributed.ring_attention(q * 1.0, k, v, causal=True).sum(), fullgraph=True)
    expected = torch.autograd.grad(distributed.ring_attention(q * 1.0, k, v, causal=True).sum(), (q, k, v))
    for one, other in zip(torch.autograd.grad(step(q, k, v), (q, k, v)), expected, strict=True):
        oracle.assert_close(one, other)


def _mixed(device: str) -> None:
    """The mesh (ranks, 1) is the ring."""
    q, k, v = (torch.randn(1, 512, 4, 64, device=device, dtype=BF16) for _ in range(3))
    mesh = mesh_of((dist.get_world_size(), 1), device)
    expected = distributed.ring_attention(q, k, v, causal=True)
    oracle.assert_close(distributed.mixed_attention(q, k, v, mesh, causal=True), expected)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--all", action="store_true", help="every mask and modifier: minutes of compiling on a GPU")
    given = parser.parse_args()
    gpu = given.device == "cuda"
    device = "cpu"
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = f"cuda:{torch.cuda.current_device()}"
        dist.init_process_group("nccl", device_id=torch.device(device))
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    begun, bad = time.monotonic(), 0
    lines = []
    for name, shape, features, dtype, scheme in _cases(*((1024, 128) if gpu else (48, 16)), given.all):
        start = time.monotonic()
        try:
            ratio, kernels = _one(make(name, shape, features, dtype, device), scheme)
            verdict = "ok"
        except Exception:
            ratio, kernels, verdict = float("nan"), "", traceback.format_exc().strip().splitlines()[-1][:90]
            bad += 1
        lines.append(
            f"{name:24} {str(dtype)[6:]:9} {ratio:5.2f} {time.monotonic() - start:5.1f} s {verdict:4} {kernels}"
        )
    for check in (_other_stream, _compiled, _mixed) if gpu else (_compiled, _mixed):
        try:
            check(device.split(":")[0] if not gpu else device)
            verdict = "ok"
        except Exception:
            verdict = traceback.format_exc().strip().splitlines()[-1][:120]
            bad += 1
        lines.append(f"{check.__name__:24} {verdict}")
    if dist.get_rank() == 0:
        print("\n".join([*lines, f"{bad} failed, {time.monotonic() - begun:.0f} s"]), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
