"""`flashtile demo`: a small GPT trained twice, then time and memory against seqlen."""

import argparse
from pathlib import Path
from typing import Any

from flashtile.cli.common import (
    USUAL_DEVICE,
    USUAL_DTYPE,
    UsageError,
    add_command,
    need_device,
    need_extras,
    usual_device,
    usual_dtype,
)


def add_demo(commands: Any) -> None:
    """The command and its options."""
    text = (
        "train a small GPT twice, by the textbook formula and by flashtile, then measure time and memory against seqlen"
    )
    command = add_command(commands, "demo", _demo, text)
    command.add_argument(
        "--out", type=Path, default=Path("flashtile-demo"), help="folder of the plots; default %(default)s"
    )
    command.add_argument("--device", help=USUAL_DEVICE)
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help=USUAL_DTYPE)
    command.add_argument("--steps", type=int, metavar="N", help="training steps of each run")
    command.add_argument("--quick", action="store_true", help="everything in seconds, to see that it works")


def _demo(given: argparse.Namespace) -> int:
    need_extras()
    from dataclasses import replace

    from flashtile.demo import show

    device = given.device or usual_device()
    need_device(device)
    demo = show.Demo.on(device, given.dtype or usual_dtype(device), given.out)
    demo = demo.quick() if given.quick else demo
    if given.steps is not None:
        if given.steps < 1:
            raise UsageError(f"--steps: got {given.steps}, need at least 1")
        demo = replace(demo, training=replace(demo.training, steps=given.steps))
    return show.run(demo)
