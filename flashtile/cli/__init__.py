"""The command `flashtile`: doctor, explain, demo, bench, tune, compile. Torch is imported when one runs, not before.

One file a command: its options, and what it does.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from flashtile.cli.bench import add_bench
from flashtile.cli.common import UsageError
from flashtile.cli.compile import add_compile
from flashtile.cli.demo import add_demo
from flashtile.cli.doctor import add_doctor
from flashtile.cli.explain import add_explain
from flashtile.cli.tune import add_tune


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 where something was found wrong, 2 for a wrong call."""
    # PyTorch's profiler, which measures memory, and its allocator else write lines into the progress bar.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    given = parser().parse_args(arguments)
    try:
        code: int = given.run(given)
    except UsageError as error:
        print(f"flashtile {given.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code


def parser() -> argparse.ArgumentParser:
    """The command line: one command a file, in the order of the help."""
    top = argparse.ArgumentParser(prog="flashtile", description="Exact attention at the hardware's limit.")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    add_doctor(commands)
    add_explain(commands)
    add_demo(commands)
    add_bench(commands)
    add_tune(commands)
    add_compile(commands)
    return top
