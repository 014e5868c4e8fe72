"""All entries, compiled side by side, as a table or JSON."""

import importlib.metadata
import itertools
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from flashtile.compiling import build
from flashtile.compiling.build import Row
from flashtile.compiling.matrix import Entry

COLUMNS = (
    *("target", "backend", "kernel", "dim", "variant", "tiles", "regs", "acc", "scalar", "spills", "waves"),
    *("shared KB", "products", "s"),
)
"""tiles: queries x keys x warps that multiply x stages, and options of the compiler; regs to scalar: registers, those
of them that accumulate, a wave's own; waves: on a SIMD unit at a time, or warps of a scheduler."""


def compiled(entries: Sequence[Entry], note: Callable[[str], None]) -> Iterator[Row]:
    """The rows of all entries; processes share the work, as Triton compiles on one core.

    Each target has its own processes: Triton 3.6 converts 8-bit floats for all GPUs as for the first one that it met.
    """
    context = multiprocessing.get_context("spawn")
    for _target, group in itertools.groupby(entries, lambda entry: entry.target):
        alike = list(group)
        with ProcessPoolExecutor(min(len(alike), os.cpu_count() or 1), mp_context=context) as pool:
            for entry, found in zip(alike, pool.map(build.rows, alike), strict=True):
                note(f"{entry.target} headdim {entry.headdim} {entry.variant}")
                yield from (Row(**row) for row in found)


def record(rows: Sequence[Row]) -> dict[str, Any]:
    """Ready for JSON."""
    versions = {name: importlib.metadata.version(name) for name in ("flashtile", "triton", "torch")}
    return {"versions": versions, "rows": [row.__dict__ for row in rows], "broken": broken(rows)}


def broken(rows: Sequence[Row]) -> list[str]:
    """One line for each limit that a row breaks."""
    return [f"{row}: {reason}" for row in rows for reason in row.broken]


def cells(row: Row) -> list[str]:
    """A row of the table, in the order of `COLUMNS`."""
    products = ", ".join(f"{count} {name}" for name, count in row.products.items())
    shared = f"{row.shared / 1024:.0f} of {row.shared_limit / 1024:.0f}"
    tiles = "x".join(map(str, row.tiles))
    named = [row.target, row.backend, row.kernel.removesuffix("_kernel"), str(row.headdim), row.variant, tiles]
    taken = map(str, (row.registers, row.accumulators, row.scalars, row.spills))
    return [*named, *taken, f"{row.occupancy:g}", shared, products, f"{row.seconds:.1f}"]
