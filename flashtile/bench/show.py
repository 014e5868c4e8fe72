"""What the user of `flashtile bench` sees: what is being measured, a table a suite, where the record lies."""

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from flashtile.bench import report, suite, tables
from flashtile.bench import tune as tuning
from flashtile.bench.records import Record
from flashtile.bench.suite import Settings


def run(names: list[str], settings: Settings, folder: Path, console: Console | None = None) -> int:
    """Runs the suites; returns the exit code: 1 if a peer's results were wrong or a measurement failed."""
    console = console or Console()
    healthy = True
    for name in names:
        with console.status(name) as status:
            record, path = suite.run(name, settings, folder, lambda text: status.update(text))
        for table in tables.of(record, spread=console.width >= 120):
            console.print(rich_table(table))
        console.print(f"{name}: {record['seconds']:.0f} s, wrote {path}\n", soft_wrap=True)
        healthy = _complaints(record, console) and healthy
    return 0 if healthy else 1


def _complaints(record: Record, console: Console) -> bool:
    """Says which peers gave no figure because something is wrong; returns whether there were none."""
    bad = [entry for entry in record["rows"] if entry["status"] in ("wrong", "failed")]
    said = dict.fromkeys(f"{e['peer']}, {e['case']['feature']} {e['case']['seqlen']}: {e['reason']}" for e in bad)
    for line in said:
        console.print(f"[bold red]no figure:[/] {line}", soft_wrap=True)
    return not bad


def rich_table(table: tables.Table) -> RichTable:
    """The same table for the terminal."""
    drawn = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, column in enumerate(table.columns):
        drawn.add_column(column, justify="left" if i == 0 else "right")
    for row in table.rows:
        drawn.add_row(*row)
    drawn.caption = "\n".join(table.notes)
    drawn.caption_justify = "left"
    return drawn


def tune(searches: list[tuning.Search], folder: Path, console: Console | None = None) -> int:
    """Runs the searches and prints the rows that they found; returns 1 if one found none."""
    console = console or Console()
    healthy = True
    for search in searches:
        with console.status("tune") as status:
            found = search.run(lambda text: status.update(text))
        for role, tried in found.items():
            timed = [f"{tuple(one.tiles)} {one.ms:.3f} ms" for one in tried[:3] if one.ms is not None]
            console.print(
                f"{search.headdim} {search.kind} {role}: {', '.join(timed) or tried[0].reason}", soft_wrap=True
            )
        config = tuning.best(found)
        healthy = healthy and config is not None
        console.print(f"wrote {tuning.write(search, found, folder)}", soft_wrap=True)
        console.print(
            "no candidate was right" if config is None else tuning.row(search.headdim, config), soft_wrap=True
        )
    return 0 if healthy else 1


def write_report(results: Path, docs: Path, console: Console | None = None) -> int:
    """Writes the page and the plots, and says where."""
    for path in report.write(results, docs):
        (console or Console()).print(f"wrote {path}", soft_wrap=True)
    return 0
