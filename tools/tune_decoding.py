"""Times tiles and parts of calls over a KV cache on this GPU, for the rows of `flashtile.tuning.decoding`.

    python tools/tune_decoding.py --write decoding.json
    python tools/tune_decoding.py --show decoding.json

Every candidate is a CUDA graph of one call with these tiles and so many parts, right (as near to float64 as the
candidate that ships is allowed to be) before it is timed. Beside them a cell's peers: SDPA in heads-first layout, and
the same call without `combine_kernel`, which says what joining parts costs. Kernels are compiled first, by as many
processes as there are cores.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flashtile import decoding
from flashtile.backends.portable import cached, launch
from flashtile.bench import machine
from flashtile.decoding import CacheArguments
from flashtile.kernels.joining import combine_kernel
from flashtile.problem import describe_cached
from flashtile.tuning.decoding import DecodeConfig
from flashtile.tuning.portable import Tiles

PAGE = 64
ALLOWED = 2e-2
"""Of the largest output: a wrong tile is off by far more."""


class Cell(NamedTuple):
    """One shape. kind: what the cache holds, "latent" (576/512) or "bfloat16", "float8_e4m3fn", "int8"; `first`: heads
    before rows in memory."""

    kind: str
    batch: int
    seqlen: int
    heads: int
    heads_kv: int
    paged: bool = False
    first: bool = False

    @property
    def latent(self) -> bool:
        return self.kind.startswith("latent")

    @property
    def stored(self) -> torch.dtype:
        return torch.bfloat16 if self.kind == "latent" else getattr(torch, self.kind.removeprefix("latent_"))

    @property
    def bytes_read(self) -> int:
        columns = 576 if self.latent else 2 * 128
        return self.batch * self.seqlen * self.heads_kv * columns * self.stored.itemsize


class Candidate(NamedTuple):
    tiles: Tiles
    splits: int


HALF = [
    Tiles(16, *rest)
    for rest in (
        *((64, 4, stages) for stages in (2, 3, 4, 5)),
        *((32, 4, stages) for stages in (3, 5, 7)),
        *((128, 4, stages) for stages in (2, 3)),
        *((64, 8, stages) for stages in (3, 4)),
        *((128, 8, stages) for stages in (2, 3)),
        *((32, 2, stages) for stages in (4, 6)),
        (64, 2, 4),
    )
]
BYTES = [
    Tiles(16, *rest)
    for rest in (
        *((64, 4, stages) for stages in (3, 4, 6)),
        *((128, 4, stages) for stages in (2, 3, 4)),
        *((128, 8, stages) for stages in (3, 4)),
        *((64, 8, stages) for stages in (4,)),
        *((32, 4, stages) for stages in (6,)),
        *((64, 2, stages) for stages in (4,)),
    )
]
LATENT = [
    *(Tiles(16, rows, warps, stages) for rows, warps, stages in ((32, 4, 3), (32, 4, 2), (32, 8, 3), (64, 8, 2))),
    *(Tiles(64, rows, 8, stages) for rows, stages in ((32, 2), (32, 3), (64, 2), (16, 4))),
    *(Tiles(32, rows, 8, stages) for rows, stages in ((32, 2), (32, 3), (64, 2))),
]
CELLS = ((64, 8192), (16, 8192), (4, 65536), (1, 131072), (1, 8192))


def plan(quick: bool) -> Iterator[tuple[Cell, list[Tiles]]]:
    """What is timed. The later cells take the tiles that earlier ones have left standing."""
    some = [HALF[index] for index in (0, 1, 2, 4, 7, 9)]
    for batch, seqlen in CELLS:
        yield Cell("bfloat16", batch, seqlen, 32, 8), HALF[1:3] if quick else HALF
        yield Cell("bfloat16", batch, seqlen, 32, 8, first=True), some[1:2] if quick else some[:3]
        yield Cell("bfloat16", batch, seqlen, 32, 8, paged=True), some[1:2] if quick else some
        yield Cell("bfloat16", batch, seqlen, 64, 8), some[1:2] if quick else some[:3]
        yield Cell("float8_e4m3fn", batch, seqlen, 32, 8), BYTES[:1] if quick else BYTES
        yield Cell("float8_e4m3fn", batch, seqlen, 32, 8, paged=True), BYTES[:1] if quick else BYTES[:6]
    yield Cell("int8", 64, 8192, 32, 8), BYTES[:1] if quick else BYTES[:4]
    for batch, seqlen in ((64, 8192), (16, 8192), (1, 131072)):
        for heads in (16, 128):
            fitting = [tiles for tiles in LATENT if heads > 16 or tiles.tile_q != 32]
            yield Cell("latent", batch, seqlen, heads, 1), fitting[:1] if quick else fitting
    yield Cell("latent", 64, 8192, 16, 1, paged=True), LATENT[:1] if quick else LATENT[:4]


def parts(cell: Cell, tiles: Tiles, processors: int) -> list[int]:
    """From one part to some for every multiprocessor."""
    programs = cell.batch * cell.heads_kv * -(-cell.heads // cell.heads_kv // tiles.tile_q)
    most = min(256, cell.seqlen // tiles.tile_kv)
    chosen = {1, 2, 3, 4} if programs >= processors else set()
    for each in (0.97, 1.94, 2.91, 3.9, 7.8) if programs < processors else (7.8,):
        chosen.add(int(each * processors / programs))
    for tiles_of_part in (2, 3, 4, 6) if cell.seqlen * cell.batch == 8192 else ():
        chosen.add(-(-(cell.seqlen // tiles.tile_kv) // tiles_of_part))
    return sorted(splits for splits in chosen if 1 <= splits <= most)


def drawn(cell: Cell, device: str) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """(q, k_cache, v_cache, other arguments)."""
    torch.manual_seed(cell.seqlen)
    columns = 576 if cell.latent else 128
    q = torch.randn(cell.batch, 1, cell.heads, columns, device=device, dtype=torch.bfloat16)
    shape = (cell.batch, cell.seqlen, cell.heads_kv, columns)
    more: dict[str, Any] = {}
    if cell.paged:
        pages = cell.batch * cell.seqlen // PAGE
        shape = (pages, PAGE, cell.heads_kv, columns)
        more["block_table"] = torch.randperm(pages, device=device).view(cell.batch, -1).int()
    if cell.first:
        shape = (shape[0], shape[2], shape[1], shape[3])

    def cache() -> Tensor:
        made = torch.randn(shape, device=device, dtype=torch.bfloat16)
        made = (made * 30).to(torch.int8) if cell.stored is torch.int8 else made.to(cell.stored)
        return made.transpose(1, 2) if cell.first else made

    k = cache()
    v = k[..., :512] if cell.latent else cache()
    if cell.stored is not torch.bfloat16:
        more["k_scale"] = more["v_scale"] = torch.full(
            (cell.heads_kv,), 1 / 30 if cell.stored is torch.int8 else 1.0, device=device
        )
    lengths = torch.full((cell.batch,), cell.seqlen, dtype=torch.int32, device=device)
    return q, k, v, {"cache_seqlens": lengths, **more}


class Call:
    """One cell's call with tiles of choice."""

    def __init__(self, cell: Cell, device: str = "cuda") -> None:
        self.cell = cell
        q, k, v, options = drawn(cell, device)
        self.made = decoding.build(q, k, v, CacheArguments(**options))
        made = self.made
        self.problem = describe_cached(made.inputs, made.cache, made.options, made.interleaved, made.splits)

    def run(self, candidate: Candidate, at: launch.Machine | None = None) -> Tensor:
        at = launch.Machine() if at is None else at
        launch.forget_fitting()
        out, _ = cached.decode(self.made.inputs, self.made.cache, self.problem, DecodeConfig(*candidate), at)
        return out

    def heads_first(self) -> Callable[[], Tensor]:
        """SDPA by cuDNN, over a copy in its own best layout."""
        q, k, v = (tensor.transpose(1, 2).contiguous() for tensor in self.made.inputs[:3])

        def call() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, k, v, enable_gqa=True)

        return call


def without_combining(kernel: Any, programs: int, tiles: Tiles, arguments: Any, options: dict[str, Any]) -> Any:
    if kernel is combine_kernel:
        return None
    return strictly(kernel, programs, tiles, arguments, options)


def strictly(kernel: Any, programs: int, tiles: Tiles, arguments: Any, options: dict[str, Any]) -> Any:
    """No smaller tiles are tried where these do not fit."""
    try:
        return launch.on_device(kernel, programs, tiles, arguments, options)
    except launch.triton.OutOfResources as error:
        raise ValueError(str(error)) from error


STRICT, ALONE = launch.Machine(strictly), launch.Machine(without_combining)


def milliseconds(call: Callable[[], Any]) -> float:
    """Of one replay, the median of three bursts of about 5 ms."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def burst(replays: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / replays

    one = burst(3)
    found = statistics.median(burst(max(3, int(5 / one))) for _ in range(3))
    del kept
    return found


@dataclass
class Timed:
    cell: Cell
    name: str
    tiles: tuple[int, ...] | None = None
    splits: int = 0
    ms: float = 0.0
    gb_per_s: float = 0.0
    reason: str = ""


def timed(cell: Cell, candidates: list[Candidate], note: Callable[[str], None]) -> Iterator[Timed]:
    call = Call(cell)
    wanted = None
    if cell.kind == "bfloat16" and not cell.paged and not cell.first:
        yield _one(Timed(cell, "cudnn"), call.heads_first())
    for candidate in candidates:
        note(f"{cell.kind} {cell[1:]}: {candidate}")
        row = Timed(cell, "flashtile", tuple(candidate.tiles), candidate.splits)
        try:
            out = call.run(candidate, STRICT).float()
            wanted = out if wanted is None else wanted
            if not float((out - wanted).abs().max()) <= ALLOWED * float(wanted.abs().max()):
                row.reason = "wrong"
            else:
                _one(row, lambda candidate=candidate: call.run(candidate, STRICT))
        except Exception as error:  # compilers and drivers refuse tiles in many ways
            row.reason = f"{type(error).__name__}: {error}"[:120]
        yield row
        if candidate.splits > 1 and not row.reason and candidate.tiles in (HALF[1], BYTES[0], LATENT[0]):
            alone = replace(row, name="flashtile, parts not joined")
            yield _one(alone, lambda candidate=candidate: call.run(candidate, ALONE))


def _one(row: Timed, call: Callable[[], Any]) -> Timed:
    row.ms = milliseconds(call)
    row.gb_per_s = row.cell.bytes_read / row.ms / 1e6
    return row


def compile_one(work: tuple[Cell, Tiles]) -> str:
    """Into Triton's cache; a short call is compiled as a long one is."""
    cell, tiles = work
    try:
        for splits in (1, 2):
            Call(cell._replace(batch=2, seqlen=1024)).run(Candidate(tiles, splits), STRICT)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:120]
    return ""


def search(quick: bool, console: Console) -> list[Timed]:
    processors = torch.cuda.get_device_properties().multi_processor_count
    cells = [*plan(quick)]
    kernels = {(cell._replace(batch=2, seqlen=1024), tiles) for cell, some in cells for tiles in some}
    found: list[Timed] = []
    with Progress(console=console) as progress:
        task = progress.add_task("compiling", total=len(kernels))
        with ProcessPoolExecutor(12, get_context("spawn")) as pool:
            for _ in pool.map(compile_one, sorted(kernels, key=str)):
                progress.advance(task)
        task = progress.add_task("timing", total=len(cells))
        for cell, some in cells:
            candidates = [Candidate(tiles, splits) for tiles in some for splits in parts(cell, tiles, processors)]
            found += timed(cell, candidates, lambda text: progress.update(task, description=text))
            torch.cuda.empty_cache()
            progress.advance(task)
    return found


def show(rows: list[dict[str, Any]], best: int) -> None:
    """The best of each cell, and what the tiles that are shipped reach."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(str(row["cell"]), []).append(row)
    for name, some in cells.items():
        print(name)
        right = sorted((row for row in some if not row["reason"]), key=lambda row: row["ms"])
        ours = [row for row in right if row["name"] == "flashtile"]
        for row in [*(row for row in right if row["name"] == "cudnn"), *ours[:best]]:
            alone = [
                other["ms"]
                for other in right
                if "joined" in other["name"] and (other["tiles"], other["splits"]) == (row["tiles"], row["splits"])
            ]
            joined = f"  joining {1e3 * (row['ms'] - alone[0]):.1f} us" if alone else ""
            print(f"  {row['gb_per_s']:6.0f} GB/s {row['ms']:8.4f} ms {row['tiles']} x{row['splits']}{joined}")
        for row in some:
            if row["reason"]:
                print(f"  {row['tiles']} x{row['splits']}: {row['reason']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="where the figures go")
    parser.add_argument("--show", type=Path, help="print those of a file, time nothing")
    parser.add_argument("--best", type=int, default=6, help="rows of each cell; default %(default)s")
    parser.add_argument("--quick", action="store_true", help="a few candidates, to see that it runs")
    given = parser.parse_args()
    if given.show:
        show(json.loads(given.show.read_text())["rows"], given.best)
        return 0
    rows = [asdict(row) for row in search(given.quick, Console(stderr=True))]
    if given.write:
        record = {"machine": machine.describe("cuda"), "rows": rows}
        given.write.write_text(json.dumps(record) + "\n")
    show(rows, given.best)
    return 0


if __name__ == "__main__":
    sys.exit(main())
