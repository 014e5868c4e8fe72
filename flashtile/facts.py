"""What is known of this machine: which Triton is installed, what PyTorch is built for, which GPU a device is.

Nothing here takes a GPU for NVIDIA's: PyTorch calls AMD's devices "cuda" too. Triton is read of, never imported.
"""

import importlib.util
import re
import warnings
from functools import cache
from pathlib import Path

import torch

OLDEST_TRITON, NEWEST_TRITON = (3, 6), (3, 9)
"""Releases that the tests run with, and all between."""
SUPPORTED = f"{'.'.join(map(str, OLDEST_TRITON))} to {'.'.join(map(str, NEWEST_TRITON))}"


def triton_version() -> str | None:
    """Of the Triton that would be imported, whatever its distribution is called; "" if it does not say; None: none."""
    spec = importlib.util.find_spec("triton")
    if spec is None:
        return None
    if spec.origin is None:
        return ""
    found = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", Path(spec.origin).read_text(), re.MULTILINE)
    return found.group(1) if found else ""


def no_triton() -> str | None:
    """Why kernels in Triton cannot run; None: they can. A newer release than was tested is tried, with a warning."""
    return _judge(triton_version())


@cache
def _judge(version: str | None) -> str | None:
    if version is None:
        return f"triton is not installed; it needs {SUPPORTED}, try pip install triton"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        return f"this triton does not say which version it is; it needs {SUPPORTED}, try pip install -U triton"
    release = (int(numbers[1]), int(numbers[2]))
    if release < OLDEST_TRITON:
        return f"triton {version} is too old; it needs {SUPPORTED}, try pip install -U triton"
    if release > NEWEST_TRITON:
        warnings.warn(
            f"triton {version} is newer than flashtile was tested with, {SUPPORTED}; it is used all the same. If calls "
            "fail, install one of those.",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def no_gpu() -> str | None:
    """Why there is no GPU to run on; None: there is one."""
    if torch.cuda.is_available():
        return None
    runtimes = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    built = next((f"{name} {version}" for name, version in runtimes.items() if version), None)
    if built is None:
        return f"PyTorch {torch.__version__} is built for the CPU alone; on a GPU install its build for CUDA or ROCm"
    return f"there is no GPU that PyTorch sees (it is built for {built})"


def arch(device: torch.device) -> str:
    """The architecture of a GPU, as compilers call it: "sm_90", "gfx942"; "" for other devices."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    return _arch(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _arch(index: int) -> str:
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def architectures() -> list[str]:
    """Of every GPU here."""
    return [_arch(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
