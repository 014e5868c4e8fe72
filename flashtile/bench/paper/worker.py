"""Rows measured in a process of their own, which is started anew after one that crashed, hung or broke the device.

An illegal access leaves a CUDA process unable to do anything more, and a row that hangs would take the others' time.
One process serves many rows, for starting it takes as long as a row. `python -m flashtile.bench.paper.worker
'<setting as JSON>' <module>:<mapping of rows>` reads a name a line and answers with lines of JSON: {"note": text} as it
goes on, {"entry": what `experiment.run` returned} at the end of a row.
"""

import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import IO, Any

from flashtile.bench import machine
from flashtile.bench.paper import experiment
from flashtile.bench.paper.experiment import Note, Row, Setting

ROWS = "flashtile.bench.paper.rows:ROWS"


class Worker:
    """Measures rows by name; a context manager, whose end is the process's end.

    limit: seconds that a row may take, the start of the process included. rows: where the process finds them.
    """

    def __init__(self, setting: Setting, limit: float, rows: str = ROWS) -> None:
        self.setting, self.limit, self.rows = setting, limit, rows
        self._process: Any = None  # a Popen with pipes, or None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed with the worker

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()
        self._errors.close()

    def measure(self, row: Row, note: Note, seconds: float | None = None) -> dict[str, Any] | None:
        """What `experiment.run` returns; a process that ended or took longer than the limit is a row that failed.

        seconds: what is left for all rows; None is returned where that is less than the limit and was not enough.
        """
        limit = self.limit if seconds is None else min(self.limit, seconds)
        end = time.monotonic() + limit
        asked = self._running()
        asked.write(f"{row.name}\n")
        asked.flush()
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self._stop()
                return None if limit < self.limit else experiment.failed(row, f"took longer than {limit:.0f} s")
            if line is None:
                return experiment.failed(row, self._end())
            told = json.loads(line)
            if "entry" in told:
                entry: dict[str, Any] = told["entry"]
                if told["broken"]:
                    self._stop()
                return entry
            note(told["note"])

    def _running(self) -> IO[str]:
        """Where the process reads names."""
        if self._process is None or self._process.poll() is not None:
            self._lines = queue.Queue()
            command = [sys.executable, "-m", __name__, experiment.dumped(self.setting), self.rows]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, text=True)
            threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True).start()
        found: IO[str] = self._process.stdin
        return found

    def _end(self) -> str:
        """Why the process is gone."""
        code = self._process.wait()
        self._process = None
        self._errors.seek(0)
        last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
        return f"the measuring process ended with {code}: {last}"[:500]

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def rehearse(rows: Sequence[Row], setting: Setting, processes: int, seconds: float, source: str = ROWS) -> None:
    """Runs rows side by side, each in one of so many processes, and keeps nothing but the kernels that they build.

    Compilers keep those on disk, and a compiler has one core: what builds a kernel after the other takes minutes.
    seconds: the end of it, for all; source: where the processes find rows.
    """
    waiting: queue.SimpleQueue[Row] = queue.SimpleQueue()
    for row in rows:
        waiting.put(row)
    end = time.monotonic() + seconds

    def serve() -> None:
        with Worker(replace(setting, rehearsal=True, seconds=0.0), seconds, source) as worker:
            while (left := end - time.monotonic()) > 0:
                try:
                    row = waiting.get_nowait()
                except queue.Empty:
                    return
                worker.measure(row, lambda text: None, left)

    threads = [threading.Thread(target=serve) for _ in range(min(processes, len(rows)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _read(lines: Any, into: queue.Queue[str | None]) -> None:
    for line in lines:
        into.put(line)
    into.put(None)


def _serve(setting: Setting, rows: dict[str, Row]) -> None:
    # What libraries print goes where errors go; answers have the pipe to themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        row = rows[line.strip()]
        entry = experiment.run(row, setting, lambda text: print(json.dumps({"note": text}), file=answers))
        print(json.dumps({"entry": entry, "broken": setting.cuda and machine.lost()}), file=answers)


if __name__ == "__main__":
    _module, _, _name = sys.argv[2].partition(":")
    _serve(experiment.loaded(sys.argv[1]), getattr(importlib.import_module(_module), _name))
