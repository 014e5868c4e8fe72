"""`flashtile tune`: searches tiles for the portable backend on this GPU."""

import argparse
from pathlib import Path
from typing import Any

from flashtile.cli.common import UsageError, add_command, need_device, need_extras


def add_tune(commands: Any) -> None:
    """The command and its options."""
    text = "search tiles for the portable backend on this GPU; candidates that compute wrong numbers are never timed"
    command = add_command(commands, "tune", _tune, text)
    command.add_argument("--headdim", nargs="+", type=int, default=[64, 128, 256], metavar="N")
    command.add_argument("--kind", nargs="+", choices=("half", "masked", "modified", "single"))
    command.add_argument("--device", default="cuda")
    command.add_argument("--tokens", type=int, default=8192, metavar="N", help="default %(default)s")
    command.add_argument("--seconds", type=float, metavar="S", help="for each row; default: until all was tried")
    command.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="default %(default)s")


def _tune(given: argparse.Namespace) -> int:
    need_extras()
    need_device(given.device)
    from flashtile.backends import portable

    missing = portable.unavailable()
    if missing is not None:
        raise UsageError(missing)
    from flashtile.bench import show, tune

    chosen = [(headdim, kind) for headdim in given.headdim for kind in given.kind or list(tune.KINDS)]
    searches = [
        tune.Search(headdim, kind, given.device, given.tokens, seconds=given.seconds) for headdim, kind in chosen
    ]
    return show.tune(searches, given.results)
