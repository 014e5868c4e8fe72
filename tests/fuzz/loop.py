"""The loop: batches of drawn calls until the time is over, what failed, and a record of it all."""

import argparse
import dataclasses
import faulthandler
import json
import os
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz.crew import Crew, Say, leave

ROOT = Path(__file__).resolve().parents[2]
STUCK = 900
"""Seconds after which one call is taken to hang; beside other work an interpreted one may take minutes."""
BATCH = 40
DEVICES = ("cpu", "interpreter", "cuda", "emulated")
INTERRUPTED = 130
"""The exit status of programs that were."""


@dataclasses.dataclass
class Tally:
    """What happened at one door. `failures`: one example of each kind, by what was said."""

    cases: int = 0
    refused: int = 0
    failed: int = 0
    failures: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def join(self, other: "Tally") -> None:
        self.cases += other.cases
        self.refused += other.refused
        self.failed += other.failed
        self.failures = {**other.failures, **self.failures}


def main() -> int:
    given = _arguments()
    if given.device == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"
    workers = given.workers or (max(1, (os.cpu_count() or 2) // 2) if given.device == "cuda" else 1)
    begin = time.monotonic()
    crew = Crew(_work, [(given, worker, workers) for worker in range(workers)]) if workers > 1 else None
    heard: dict[int, dict[str, Tally]] = {} if crew is None else crew.heard
    versions = _versions()
    status = 0
    try:
        if crew is None:
            _work(given, 0, 1, partial(heard.__setitem__, 0))
        else:
            crew.listen(given.seconds)
    except KeyboardInterrupt:
        print("interrupted: what was done until then follows")
        status = INTERRUPTED
    # Before any process is ended, which may take its time.
    tallies: dict[str, Tally] = {}
    for part in heard.values():
        for door, tally in part.items():
            tallies.setdefault(door, Tally()).join(tally)
    processes = {"died": 0 if crew is None else crew.died, "late": 0 if crew is None else crew.late}
    status = _report(given, tallies, time.monotonic() - begin, processes, versions) or status
    if crew is not None and crew.dismiss():
        leave(status)
    return status


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="when to stop; default 60")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch; the next one has the next seed")
    parser.add_argument("--door", action="append", help="one of the doors alone; may be given again")
    parser.add_argument("--workers", type=int, default=0, help="processes; default: half the cores for a GPU, else 1")
    parser.add_argument("--shrink", action="store_true", help="one batch, and the smallest call that fails in it")
    parser.add_argument("--record", type=Path, help="a JSON file for the counts and failures")
    return parser.parse_args()


def _work(given: argparse.Namespace, worker: int, workers: int, say: Say) -> None:
    """The batches of one process; after each it says what happened so far."""
    import torch

    from tests.fuzz.doors import DOORS, EMULATED, INTERPRETED
    from tests.fuzz.where import Where

    if given.device == "interpreter":
        from tests.interpreted import quick

        quick.install()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    where = Where(given.device)
    names = given.door or {"interpreter": INTERPRETED, "emulated": EMULATED}.get(given.device, tuple(DOORS))
    tallies = {name: Tally() for name in names}
    say(tallies)
    end, seed = time.monotonic() + given.seconds, given.seed + worker
    while time.monotonic() < end:
        for name in names:
            try:
                _batch(name, seed, where, end, tallies[name], given.shrink)
            except _Lost:
                return
            finally:
                say(tallies)
        if given.shrink:
            break
        seed += workers


class _Lost(BaseException):
    """The GPU takes no work of this process any more: a kernel was stopped. All that followed would fail too."""


def _batch(name: str, seed: int, where: Any, end: float, tally: Tally, shrink: bool) -> None:
    """Some calls at one door; those that fail are noted, and the next one follows."""
    import hypothesis
    from hypothesis import HealthCheck, Phase, settings

    from tests.fuzz.doors import DOORS

    door = DOORS[name]
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    options: dict[str, Any] = {"max_examples": BATCH, "phases": phases, "deadline": None, "database": None}

    @hypothesis.seed(seed)
    @settings(**options, suppress_health_check=list(HealthCheck))
    @hypothesis.given(door.draws(where))
    def run(drawn: Any) -> None:
        if time.monotonic() > end and not shrink:
            return
        faulthandler.dump_traceback_later(STUCK, exit=True, file=sys.__stderr__)
        tally.cases += 1
        try:
            tally.refused += not door.check(drawn, where)
        except Exception as error:
            if shrink:
                raise
            _note(tally, error, drawn, seed)
            if where.lost():
                raise _Lost from error
        finally:
            faulthandler.cancel_dump_traceback_later()

    run()


def _note(tally: Tally, error: Exception, drawn: Any, seed: int) -> None:
    """One example of each kind of failure: those whose words differ in numbers alone are one kind."""
    tally.failed += 1
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    # As it is named in the repository or where packages lie: nobody else has this machine's folders.
    place = last.filename.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")
    kind = f"{Path(last.filename).name} {re.sub(r'[-+]?[0-9][0-9.e+-]*', '#', said)[:200]}"
    if kind not in tally.failures:
        tally.failures[kind] = {
            "said": said,
            "seed": seed,
            "drawn": repr(drawn),
            "at": f"{place}:{last.lineno}",
        }
        print(f"FAILED (seed {seed}) {said}\n    {drawn!r}\n    {place}:{last.lineno}", flush=True)


def _versions() -> dict[str, str]:
    import torch

    import flashtile

    return {"flashtile": flashtile.__version__, "torch": torch.__version__, "python": sys.version.split()[0]}


def _report(
    given: argparse.Namespace,
    tallies: dict[str, Tally],
    seconds: float,
    processes: dict[str, int],
    versions: dict[str, str],
) -> int:
    """Prints and writes down what happened. processes: see `Crew`, those that died and those that were late."""
    for name, tally in tallies.items():
        print(f"{name:10} {tally.cases:7} calls, {tally.refused:6} refused, {tally.failed:4} failed")
    total = Counter({field: sum(getattr(tally, field) for tally in tallies.values()) for field in ("cases", "failed")})
    print(f"{given.device}: {total['cases']} calls in {seconds:.0f} s, {total['failed']} failed")
    if any(processes.values()):
        print(
            "{died} processes ended before their work did, {late} were at work when time was over".format(**processes)
        )
    if given.record is not None:
        record = {
            "device": given.device,
            "seconds": round(seconds),
            "seed": given.seed,
            "processes": processes,
            "versions": versions,
            "doors": {name: dataclasses.asdict(tally) for name, tally in tallies.items()},
        }
        given.record.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if total["failed"] or processes["died"] or not total["cases"] else 0
