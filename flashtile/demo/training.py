"""The same GPT, trained twice from one seed on the same batches: once by the textbook formula, once by flashtile."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flashtile.bench.memory import allocated_peak
from flashtile.bench.timing import clock
from flashtile.demo.model import GPT, Attend, Size, by_flashtile, by_formula

TOLERANCE = {"float32": 0.02, "bfloat16": 0.1}
"""How far the two losses, in nats a byte, may lie apart at any step. Both runs compute the same function and differ by
rounding alone, which training amplifies from step to step; a wrong mask or gradient parts them by far more."""

PROBE = 3
"""The step whose memory is traced. Like the steps before it (warm-up) it does not count in the time."""


@dataclass(frozen=True)
class Training:
    """How the two runs are trained; a step sees `batch` pieces of text. After `seconds` both stop."""

    device: str = "cpu"
    dtype: str = "float32"
    size: Size = field(default_factory=Size)
    steps: int = 220
    batch: int = 4
    rate: float = 4e-3
    seed: int = 0
    seconds: float = 65.0


@dataclass
class Run:
    """One of the two trainings."""

    name: str
    model: GPT
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    step_memory: int = 0

    @property
    def ms(self) -> float:
        """Median milliseconds of a step."""
        return 1e3 * statistics.median(self.seconds)


def corpus() -> Tensor:
    """Half a megabyte of English prose that every Python carries: the texts of its `help()`, as bytes."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def start(name: str, attend: Attend, training: Training) -> Run:
    """A run before its first step; equal seeds give equal weights."""
    torch.manual_seed(training.seed)
    model = GPT(training.size, attend).to(training.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(1, training.steps // 10)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * (0.55 + 0.45 * math.cos(math.pi * step / training.steps))

    return Run(name, model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor))


def train(
    training: Training,
    attends: dict[str, Attend] | None = None,
    progress: Callable[[int, list[Run]], None] | None = None,
) -> list[Run]:
    """Trains the runs in turns, a step each, so that a slow spell falls on both; they share each batch."""
    attends = attends or {"textbook": by_formula, "flashtile": by_flashtile}
    runs = [start(name, attend, training) for name, attend in attends.items()]
    text = corpus().to(training.device)
    generator = torch.Generator().manual_seed(training.seed)
    begin = time.monotonic()
    for step in range(training.steps):
        pieces = _batch(text, training, generator)
        for run in runs:
            _timed_step(run, pieces, training, step)
        if progress is not None:
            progress(step, runs)
        if time.monotonic() - begin > training.seconds and step > PROBE:
            break
    return runs


def _batch(text: Tensor, training: Training, generator: torch.Generator) -> Tensor:
    """(batch, seqlen + 1) pieces from anywhere in the text."""
    length = training.size.seqlen + 1
    starts = torch.randint(len(text) - length, (training.batch, 1), generator=generator)
    return text[(starts + torch.arange(length)).to(text.device)].long()


def _timed_step(run: Run, pieces: Tensor, training: Training, step: int) -> None:
    def act() -> None:
        run.losses.append(_step(run, pieces, training))

    if step == PROBE:
        # Gradients count as memory of the step that makes them, so those of the step before must be gone.
        run.optimizer.zero_grad(set_to_none=True)
        run.step_memory = allocated_peak(act, training.device)
        return
    begin = clock(training.device)
    act()
    end = clock(training.device)
    if step > PROBE or training.steps <= PROBE + 1:
        run.seconds.append(end - begin)


def _step(run: Run, pieces: Tensor, training: Training) -> float:
    """Forward, backward, update; returns the loss in nats a byte."""
    with _autocast(training):
        logits = run.model(pieces[:, :-1])
    loss = functional.cross_entropy(logits.float().flatten(0, 1), pieces[:, 1:].flatten())
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.schedule.step()
    return loss.item()


def _autocast(training: Training) -> contextlib.AbstractContextManager[Any]:
    """The matrix products run in the training's dtype; weights stay float32."""
    if training.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(training.device).type, dtype=getattr(torch, training.dtype))


def differences(runs: list[Run]) -> list[float]:
    """How far the two losses lie apart at each step; NaN where either is NaN."""
    return [abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True)]


def agree(runs: list[Run], tolerance: float) -> bool:
    """Whether the curves lie on each other; NaN does not."""
    return all(difference <= tolerance for difference in differences(runs))


def sample(run: Run, training: Training, prompt: str, length: int) -> str:
    """What the trained model writes."""
    torch.manual_seed(training.seed)
    start_of_text = torch.tensor([list(prompt.encode())], device=training.device)
    with _autocast(training):
        written = run.model.write(start_of_text, length)
    return bytes(written[0].tolist()).decode(errors="replace")
