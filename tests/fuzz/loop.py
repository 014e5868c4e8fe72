"""The loop: batches of drawn calls until the time is over, what failed, and a record of it all."""

import argparse
import dataclasses
import faulthandler
import json
import multiprocessing
import os
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STUCK = 900
"""Seconds after which one call is taken to hang; beside other work an interpreted one may take minutes."""
BATCH = 40
DEVICES = ("cpu", "interpreter", "cuda")


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
    jobs = [(given, worker, workers) for worker in range(workers)]
    if workers == 1:
        found = [_work(*jobs[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            found = pool.starmap(_work, jobs)
    tallies: dict[str, Tally] = {}
    for part in found:
        for door, tally in part.items():
            tallies.setdefault(door, Tally()).join(tally)
    return _report(given, tallies, time.monotonic() - begin)


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


def _work(given: argparse.Namespace, worker: int, workers: int) -> dict[str, Tally]:
    """The batches of one process."""
    import torch

    from tests.fuzz.doors import DOORS, INTERPRETED
    from tests.fuzz.where import Where

    if given.device == "interpreter":
        from tests.interpreted import quick

        quick.install()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    where = Where(given.device)
    names = given.door or (INTERPRETED if given.device == "interpreter" else tuple(DOORS))
    tallies = {name: Tally() for name in names}
    end, seed = time.monotonic() + given.seconds, given.seed + worker
    while time.monotonic() < end:
        for name in names:
            try:
                _batch(name, seed, where, end, tallies[name], given.shrink)
            except _Lost:
                return tallies
        if given.shrink:
            break
        seed += workers
    return tallies


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


def _report(given: argparse.Namespace, tallies: dict[str, Tally], seconds: float) -> int:
    import torch

    import flashtile

    for name, tally in tallies.items():
        print(f"{name:10} {tally.cases:7} calls, {tally.refused:6} refused, {tally.failed:4} failed")
    total = Counter({field: sum(getattr(tally, field) for tally in tallies.values()) for field in ("cases", "failed")})
    print(f"{given.device}: {total['cases']} calls in {seconds:.0f} s, {total['failed']} failed")
    if given.record is not None:
        record = {
            "device": given.device,
            "seconds": round(seconds),
            "seed": given.seed,
            "versions": {
                "flashtile": flashtile.__version__,
                "torch": torch.__version__,
                "python": sys.version.split()[0],
            },
            "doors": {name: dataclasses.asdict(tally) for name, tally in tallies.items()},
        }
        given.record.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if total["failed"] or not total["cases"] else 0
