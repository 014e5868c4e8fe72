"""The report on the terminal."""

import json
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from flashtile.compiling import report
from flashtile.compiling.build import Row
from flashtile.compiling.matrix import Entry


def run(entries: Sequence[Entry], as_json: bool) -> int:
    """Compiles and prints; 1 where a limit is broken."""
    errors = Console(stderr=True)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=errors) as progress:
        task = progress.add_task("compiling", total=None)
        rows = list(report.compiled(entries, lambda text: progress.update(task, description=text)))
    if as_json:
        json.dump(report.record(rows), sys.stdout, indent=1)
        print()
    else:
        # A table in a file is not cut to the width of a terminal that is not there.
        console = Console()
        (console if console.is_terminal else Console(width=140)).print(_table(rows))
    for line in report.broken(rows):
        errors.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    return 1 if report.broken(rows) else 0


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(report.COLUMNS):
        table.add_column(column, justify="left" if place < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*report.cells(row), style="red" if row.broken else None)
    return table
