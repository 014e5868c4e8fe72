"""Times latent attention over a KV cache on a Hopper, by CUDA graphs: its own kernel, in pages too, and portable.

Run it from the root of the repository: python tools/time_latent.py
"""

import functools
import itertools
from typing import Any

import torch

import flashtile

COLUMNS, VALUES, PAGE, REPLAYS = 576, 512, 64, 20
CELLS = ((64, 8192, 128), (16, 8192, 128), (1, 8192, 128), (64, 8192, 64))
"""(batch, rows of each sequence, heads)."""


def microseconds(call: Any) -> float:
    """The median of some replays."""
    call()
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    graph.replay()
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    return 1e3 * sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))[REPLAYS // 2]


def main() -> None:
    for batch, rows, heads in CELLS:
        k = torch.randn(batch, rows, 1, COLUMNS, device="cuda", dtype=torch.bfloat16)
        q = torch.randn(batch, 1, heads, COLUMNS, device="cuda", dtype=torch.bfloat16)
        lengths = torch.full((batch,), rows, device="cuda", dtype=torch.int32)
        pages, table = (
            k.view(-1, PAGE, 1, COLUMNS),
            torch.arange(batch * rows // PAGE, device="cuda", dtype=torch.int32),
        )
        paged = {"block_table": table.view(batch, -1)}
        kinds: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
            "hopper": (k, {"backend": "hopper"}),
            "hopper, pages": (pages, {"backend": "hopper", **paged}),
            "portable": (k, {"backend": "portable"}),
        }
        for name, (cache, options) in kinds.items():
            taken = microseconds(
                functools.partial(
                    flashtile.attention_kvcache, q, cache, cache[..., :VALUES], cache_seqlens=lengths, **options
                )
            )
            products = 2 * heads * (COLUMNS + VALUES) * rows * batch / taken / 1e6
            read = 2 * COLUMNS * rows * batch / taken / 1e3
            print(
                f"{batch} x {rows}, {heads} heads, {name}: {taken:.1f} us, {products:.0f} TFLOP/s, {read:.0f} GB/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
