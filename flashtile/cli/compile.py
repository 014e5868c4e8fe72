"""`flashtile compile`: the portable backend's kernels, compiled for GPUs that need not be there."""

import argparse
import importlib.util
from typing import Any

from flashtile.cli.common import DTYPES, UsageError, add_command, need_extras


def add_compile(commands: Any) -> None:
    """The command and its options."""
    text = "compile the portable backend's kernels for GPUs that need not be there; exit code 1 where a limit is broken"
    command = add_command(commands, "compile", _compile, text)
    command.add_argument("--arch", nargs="+", default=["sm_90a"], metavar="ARCH", help="sm_80, gfx942, ... or all")
    command.add_argument("--headdim", nargs="+", type=int, default=[64, 128, 256], metavar="N")
    command.add_argument("--dtype", nargs="+", choices=DTYPES[:3], default=["bfloat16"])
    command.add_argument("--variant", nargs="+", metavar="NAME", help="plain, causal, bias, ...; default: all")
    command.add_argument("--report", choices=("table", "json"), default="table")


def _compile(given: argparse.Namespace) -> int:
    need_extras()
    if importlib.util.find_spec("triton") is None:
        raise UsageError("triton is not installed; try pip install triton")
    from flashtile.compiling import matrix, show
    from flashtile.compiling.targets import TARGETS

    names = {"sm_90": "sm_90a"}
    targets = list(TARGETS) if given.arch == ["all"] else [names.get(arch, arch) for arch in given.arch]
    variants = given.variant or list(matrix.NAMES)
    for what, chosen, known in (("--arch", targets, TARGETS), ("--variant", variants, matrix.NAMES)):
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise UsageError(f"{what}: got {unknown[0]!r}, need one of {', '.join(known)}")
    entries = list(matrix.entries(targets, given.headdim, given.dtype, variants))
    return show.run(entries, as_json=given.report == "json")
