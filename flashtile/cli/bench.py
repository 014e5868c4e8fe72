"""`flashtile bench`: time, memory and error beside other implementations."""

import argparse
from pathlib import Path
from typing import Any

from flashtile.cli import scaling
from flashtile.cli.common import (
    DTYPES,
    USUAL_DEVICE,
    USUAL_DTYPE,
    UsageError,
    add_command,
    need_device,
    need_extras,
    usual_device,
    usual_dtype,
)


def add_bench(commands: Any) -> None:
    """The command and its options."""
    text = "measure time, memory and error beside other implementations; `bench report` turns the records into docs"
    command = add_command(commands, "bench", _bench, text)
    command.add_argument(
        "suites",
        nargs="*",
        metavar="suite",
        help="dense, masks, memory, error, on a GPU also grid, grid_error, portable, functions, packed, sparsity, "
        "decode (default: all); report; paper, published speed-ups measured again; or scaling, a cost model of context "
        "parallelism",
    )
    command.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="default %(default)s")
    command.add_argument("--docs", type=Path, default=Path("docs"), help="where report writes; default %(default)s")
    command.add_argument("--device", help=USUAL_DEVICE)
    command.add_argument("--dtype", nargs="+", choices=DTYPES[:3], help=USUAL_DTYPE)
    command.add_argument("--seqlen", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    for name, value in (("batch", 1), ("heads", 8), ("headdim", 64)):
        command.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"default {value}")
    command.add_argument("--heads-kv", type=int, metavar="N", help="default: heads")
    command.add_argument("--peers", nargs="+", metavar="peer", help="default: those that each suite names")
    command.add_argument("--seconds", type=float, default=10.0, help="time for each peer and case; default %(default)s")
    command.add_argument("--rows", nargs="+", metavar="row", help="of paper; default: all")
    command.add_argument("--budget", type=float, metavar="SECONDS", help="of paper, for all rows; default: no end")
    command.add_argument(
        "--processes", type=int, default=1, metavar="N", help="of paper: that build kernels side by side; default 1"
    )
    command.add_argument("--quick", action="store_true", help="everything in seconds, to see that it works")
    scaling.add_scaling(command)


def _bench(given: argparse.Namespace) -> int:
    need_extras()
    from flashtile.bench import decode, peers, show
    from flashtile.bench.suite import SUITES, usual

    if given.suites == ["report"]:
        try:
            return show.write_report(given.results, given.docs)
        except ValueError as error:
            raise UsageError(str(error)) from error
    if given.suites == ["scaling"]:
        return scaling.scaling(given)
    given.device = given.device or usual_device()
    given.dtype = given.dtype or [usual_dtype(given.device)]
    if given.suites == ["paper"]:
        return _paper(given)
    everyone = {**peers.PEERS, **decode.PEERS}
    for what, names, known in (("suite", given.suites, SUITES), ("--peers", given.peers or [], everyone)):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UsageError(f"{what}: got {unknown[0]!r}, need one of {', '.join(known)}")
    if given.heads % (given.heads_kv or given.heads):
        raise UsageError(f"--heads-kv: got {given.heads_kv}, need a divisor of {given.heads} heads")
    need_device(given.device)
    settings = _bench_settings(given)
    return show.run(given.suites or usual(settings.device), settings, given.results)


def _paper(given: argparse.Namespace) -> int:
    import torch

    from flashtile.bench.paper import page
    from flashtile.bench.paper.experiment import Setting
    from flashtile.bench.paper.rows import ROWS

    names = given.rows or list(ROWS)
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise UsageError(f"--rows: got {unknown[0]!r}, need some of {', '.join(ROWS)}")
    if given.device == "cpu" and not given.quick:
        raise UsageError("paper: got the CPU, need a GPU for models of these sizes; try --device cuda, or --quick")
    need_device(given.device)
    setting = Setting(given.device, getattr(torch, given.dtype[0]), given.quick, given.seconds)
    more = {"budget": given.budget, "apart": not given.quick, "processes": given.processes}
    return page.run(names, setting, given.results, given.docs, **more)


def _bench_settings(given: argparse.Namespace) -> Any:
    from flashtile.bench.suite import Settings
    from flashtile.bench.timing import Effort

    settings = Settings(
        device=given.device,
        dtypes=tuple(given.dtype),
        batch=given.batch,
        heads=given.heads,
        heads_kv=given.heads_kv or given.heads,
        headdim=given.headdim,
        seqlens=tuple(sorted(given.seqlen)),
        peers=tuple(given.peers) if given.peers else None,
        effort=Effort(seconds=given.seconds),
    )
    return settings.quick() if given.quick else settings
