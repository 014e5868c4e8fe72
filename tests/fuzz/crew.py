"""Processes that work beside each other for a time, and what they say meanwhile. None is waited for without end: on a
GPU one may hang, in a call of the driver or while it ends."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any

LATE = 120.0
"""Seconds that are given beyond the time: to import, and to end the last call."""
PATIENCE = 5.0
"""Seconds until one that was asked to end is asked less kindly."""

Say = Callable[[Any], None]


class Crew:
    """One process a job, `work(*job, say)`. heard: what each said last; died: those that ended before their work did;
    late: those that had more of it when time was over."""

    def __init__(self, work: Callable[..., None], jobs: Iterable[tuple[Any, ...]]) -> None:
        context = multiprocessing.get_context("spawn")
        self.heard: dict[int, Any] = {}
        self.died = 0
        self._open: dict[Connection, int] = {}
        self._processes: list[Any] = []
        for index, job in enumerate(jobs):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_begin, args=(work, job, theirs))
            process.start()
            # With one end left, theirs, silence can be told from death.
            theirs.close()
            self._open[ours] = index
            self._processes.append(process)

    @property
    def late(self) -> int:
        return len(self._open)

    def listen(self, seconds: float) -> None:
        """Until all have done their work, or the time is over."""
        end = time.monotonic() + seconds + LATE
        while self._open and (left := end - time.monotonic()) > 0:
            for pipe in wait(list(self._open), left):
                assert isinstance(pipe, Connection)
                self._hear(pipe)

    def _hear(self, pipe: Connection) -> None:
        try:
            working, said = pipe.recv()
        except EOFError:
            working, said = False, None
            self.died += 1
            print(f"FAILED process {self._open[pipe]} ended before its work did", flush=True)
        if working:
            self.heard[self._open[pipe]] = said
        else:
            del self._open[pipe]

    def dismiss(self) -> int:
        """Ends all, whatever they do; how many the system has not ended yet."""
        for ask in (lambda process: None, lambda process: process.terminate(), lambda process: process.kill()):
            working = [process for process in self._processes if process.is_alive()]
            for process in working:
                ask(process)
            end = time.monotonic() + PATIENCE
            for process in working:
                process.join(max(0.0, end - time.monotonic()))
        return sum(process.is_alive() for process in self._processes)


def leave(status: int) -> None:
    """Ends this process without waiting for those that it began, as Python would."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _begin(work: Callable[..., None], job: tuple[Any, ...], pipe: Connection) -> None:
    # Who interrupts means the process that listens: it ends the others when it has written down what they said.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    work(*job, lambda said: pipe.send((True, said)))
    pipe.send((False, None))
