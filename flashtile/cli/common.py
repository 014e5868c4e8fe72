"""What the commands share: how they are added, what they need to run, and how they refuse a call."""

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

DTYPES = ("float32", "bfloat16", "float16", "float64")

EXTRAS = ("rich", "matplotlib")
INSTALL = "pip install 'flashtile[cli]'"

USUAL_DEVICE = "default: cuda if there is one, else cpu"
USUAL_DTYPE = "default: bfloat16 on a GPU, float32 on the CPU"
"""Help of the options that `usual_device` and `usual_dtype` stand in for."""


class UsageError(Exception):
    """The call cannot be carried out as given; the message says what to do."""


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """A command that `run` carries out, for its options to be added to; `text` is its help."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def need_extras() -> None:
    """Refuses where what tables and plots are made with is not installed."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: {INSTALL}"
        )


def usual_device() -> str:
    """Where a command runs unless told: on the GPU that users of a machine with one mean."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def usual_dtype(device: str) -> str:
    """The dtype of a device unless told: what models are trained in there."""
    return "float32" if device.split(":")[0] == "cpu" else "bfloat16"


def need_device(device: str) -> None:
    """Refuses a device that torch cannot use here."""
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device: got {device!r}, which torch cannot use here: {str(error).splitlines()[0]}"
        ) from error
