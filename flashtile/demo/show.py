"""What the user of `flashtile demo` sees: progress, tables, plots, a piece of generated text and a verdict."""

import contextlib
import io
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import flashtile
from flashtile.bench import machine
from flashtile.bench.memory import gib
from flashtile.bench.plots import duration
from flashtile.bench.tables import title_of
from flashtile.demo import plots
from flashtile.demo.model import Size
from flashtile.demo.scaling import Point, Scaling, measure
from flashtile.demo.training import TOLERANCE, Run, Training, agree, corpus, differences, sample, train

SAMPLE = 240
"""Bytes of text that the model writes at the end."""


@dataclass(frozen=True)
class Demo:
    """One demonstration."""

    training: Training
    scaling: Scaling
    out: Path

    @classmethod
    def on(cls, device: str, dtype: str, out: Path) -> "Demo":
        """Sizes that suit the device: under three minutes in all."""
        training = Training(device, dtype)
        scaling = Scaling(device, dtype)
        if torch.device(device).type == "cuda":
            size = Size(seqlen=512, layers=6, heads=6, width=384)
            training = replace(training, size=size, steps=300, batch=16, rate=2e-3)
            scaling = replace(scaling, heads=8)
        return cls(training, scaling, out)

    def quick(self) -> "Demo":
        """The same in seconds, to see that all works."""
        size = Size(seqlen=64, layers=2, heads=2, width=64)
        training = replace(self.training, size=size, steps=min(self.training.steps, 20), batch=4)
        return replace(self, training=training, scaling=replace(self.scaling, seqlens=(128, 256, 512), seconds=1.0))


def run(demo: Demo, console: Console | None = None) -> int:
    """Shows everything; returns the exit code: 0 if the two loss curves lie on each other, 1 if not."""
    console = console or Console()
    demo.out.mkdir(parents=True, exist_ok=True)
    _open(demo, console)
    runs = _train(demo.training, console)
    tolerance = TOLERANCE[demo.training.dtype]
    console.print(_loss_table(runs))
    console.print(_cost_table(runs))
    points = _scale(demo.scaling, console)
    console.print(_scaling_table(points))
    done = len(runs[0].losses)
    if done < demo.training.steps:
        console.print(f"stopped after {done} of {demo.training.steps} steps: {demo.training.seconds:g} s were up")
    text = sample(runs[-1], demo.training, "The ", SAMPLE)
    console.print(Panel(Text(text), title=f"after {done} steps the model writes", box=box.ROUNDED))
    caption = f"{machine.device_name(demo.training.device)}, {demo.training.dtype}"
    written = [
        plots.losses(runs, tolerance, f"GPT on bytes of English, {caption}", demo.out / "loss.png"),
        plots.scaling(points, f"causal attention, {_heads(demo.scaling)}, {caption}", demo.out / "scaling.png"),
        _write(demo, runs, points),
    ]
    console.print("wrote " + ", ".join(str(path) for path in written), soft_wrap=True)
    return _verdict(runs, tolerance, console)


def _heads(scaling: Scaling) -> str:
    return f"batch 1, heads {scaling.heads}, headdim {scaling.headdim}"


def _open(demo: Demo, console: Console) -> None:
    """What runs where."""
    training, size = demo.training, demo.training.size
    shape = (training.batch, size.seqlen, size.heads, size.width // size.heads)
    q = torch.empty(shape, dtype=getattr(torch, training.dtype), device=training.device)
    with contextlib.redirect_stdout(io.StringIO()):
        plan = flashtile.explain(q, q, q, causal=True)
    console.print(
        f"[bold]flashtile {flashtile.__version__}[/] on {machine.device_name(training.device)}, "
        f"torch {torch.__version__}, {training.dtype}; causal attention runs on {plan.backend}/{plan.kernel}"
    )
    console.print(
        f"A GPT of {size.layers} layers, width {size.width}, {size.heads} heads learns {len(corpus()) / 1e3:.0f} kB of "
        f"English, the texts of Python's help(), in steps of {training.batch} × {size.seqlen} bytes: twice, from one "
        f"seed, on the same batches. Only the attention differs."
    )


def _train(training: Training, console: Console) -> list[Run]:
    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[losses]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=training.steps, losses="")

        def progress(step: int, runs: list[Run]) -> None:
            losses = "  ".join(f"{run.name} {run.losses[-1]:.4f}" for run in runs)
            bar.update(task, completed=step + 1, losses=losses)

        return train(training, progress=progress)


def _table(title: str, *columns: str) -> Table:
    """The first column flush left, figures flush right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _loss_table(runs: list[Run]) -> Table:
    table = _table("Loss, nats a byte", "step", *(title_of(run.name) for run in runs), "difference")
    steps = len(runs[0].losses)
    apart = differences(runs)
    for step in sorted({0, *(round(i * (steps - 1) / 6) for i in range(1, 6)), steps - 1}):
        table.add_row(str(step + 1), *(f"{run.losses[step]:.5f}" for run in runs), f"{apart[step]:.1e}")
    table.add_section()
    table.add_row("largest difference at any step", *("" for _ in runs), f"{max(apart):.1e}")
    return table


def _cost_table(runs: list[Run]) -> Table:
    table = _table("One training step (median)", "attention", "time", "peak memory beyond weights and optimizer")
    for run in runs:
        table.add_row(title_of(run.name), duration(run.ms), gib(run.step_memory))
    return table


def _scale(scaling: Scaling, console: Console) -> list[Point]:
    with console.status("time and memory against seqlen") as status:
        note = lambda text: status.update(f"time and memory at seqlen {text}")  # noqa: E731
        return list(measure(scaling, note))


def _scaling_table(points: list[Point]) -> Table:
    title = "Causal attention, forward and backward: time, extra memory"
    table = _table(title, "seqlen", "textbook", "flashtile", "faster", "memory")
    for seqlen in sorted({point.seqlen for point in points}):
        textbook, own = ({p.peer: p for p in points if p.seqlen == seqlen}[name] for name in ("textbook", "flashtile"))
        faster = f"{textbook.ms / own.ms:.2g}×" if textbook.ms and own.ms else ""
        less = f"1/{textbook.extra / own.extra:.0f}" if own.ms and own.extra else ""
        table.add_row(str(seqlen), _point_cell(textbook), _point_cell(own), faster, less)
    return table


def _point_cell(point: Point) -> str:
    """Time and memory, or why it was not run."""
    return point.reason if point.ms is None else f"{duration(point.ms)}, {gib(point.extra):>8}"


def _write(demo: Demo, runs: list[Run], points: list[Point]) -> Path:
    """All figures, for whoever wants to draw their own."""
    path = demo.out / "demo.json"
    record = {
        "machine": machine.describe(demo.training.device),
        "training": asdict(demo.training),
        "tolerance": TOLERANCE[demo.training.dtype],
        "runs": {
            run.name: {"losses": run.losses, "step_ms": run.ms, "step_memory_bytes": run.step_memory} for run in runs
        },
        "scaling": {**asdict(demo.scaling), "points": [asdict(point) for point in points]},
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _verdict(runs: list[Run], tolerance: float, console: Console) -> int:
    largest = max(differences(runs))
    if agree(runs, tolerance):
        console.print(
            f"[bold green]The curves lie on each other:[/] at most {largest:.1e} apart, tolerance {tolerance:g}."
        )
        return 0
    console.print(f"[bold red]The curves part:[/] up to {largest:.1e} apart, tolerance {tolerance:g}.")
    return 1
