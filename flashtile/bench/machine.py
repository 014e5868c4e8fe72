"""What a measurement was taken on: device, clocks, versions, commit, free memory."""

import os
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import flashtile


def cpu_name() -> str:
    """The processor's model name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^(?:model name|Processor|cpu)\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def device_name(device: str) -> str:
    """The name of the device that runs tensors of `device`."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(torch.device(device))
    return cpu_name()


def slug(device: str) -> str:
    """A folder name for the device: `cpu-intel-xeon-processor-2-threads`, `nvidia-h100-80gb-hbm3`."""
    name = re.sub(r"\((r|tm)\)", " ", device_name(device).lower())
    if torch.device(device).type == "cpu":
        name = f"cpu {name} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def triton_version() -> str | None:
    """Triton's version without importing it; None where it is not installed."""
    for name in ("triton", "pytorch-triton-rocm", "pytorch-triton", "triton-windows"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def versions() -> dict[str, str | None]:
    return {
        "flashtile": flashtile.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": triton_version(),
    }


def c_compiler() -> str | None:
    """The C compiler that Triton would use to build its launchers, by Triton's own order of search."""
    wanted = [name for name in (os.environ.get("CC"), "clang", "gcc", "cc") if name]
    return next((path for path in map(shutil.which, wanted) if path), None)


_ASKED = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def clocks(device: str) -> dict[str, float] | None:
    """Of an NVIDIA GPU, as its driver's tool tells them: MHz of its processors and memory, now and at most, and the
    limit of its power in watts. None where nobody tells."""
    if torch.device(device).type != "cuda" or torch.version.cuda is None:
        return None
    card = getattr(torch.cuda.get_device_properties(torch.device(device)), "uuid", None)
    asked = ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*asked, *([] if card is None else ["-i", f"GPU-{card}"])], capture_output=True, text=True, timeout=20
        )
        told = [float(number) for number in done.stdout.strip().splitlines()[0].split(",")]
    except (OSError, subprocess.TimeoutExpired, IndexError, ValueError):
        return None
    return dict(zip(_ASKED, told, strict=True)) if len(told) == len(_ASKED) else None


def commit() -> dict[str, Any]:
    """The git commit of the running package and whether its files differ from it; None where it is not a checkout."""
    package = Path(flashtile.__file__).parent
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": None, "dirty": None}
    changes = _git(package, "status", "--porcelain", "--", ".")
    return {"commit": _git(package, "rev-parse", "HEAD"), "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe(device: str) -> dict[str, Any]:
    """Everything about the machine that a record keeps."""
    return {
        "device": device,
        "name": device_name(device),
        "slug": slug(device),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "clocks": clocks(device),
        "platform": platform.platform(),
        "versions": versions(),
        "source": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def free_memory(device: str) -> int:
    """Bytes that a measurement may count on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(torch.device(device))[0]
    limits = [_meminfo(), _cgroup()]
    return min(limit for limit in limits if limit is not None)


def _meminfo() -> int:
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        if found:
            return int(found.group(1)) * 1024
    except OSError:
        pass
    # No count of what is free: half of what is installed is a cautious guess.
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 4 * 2**30


def _cgroup() -> int | None:
    """What a container's limit leaves, if there is one."""
    root = Path("/sys/fs/cgroup")
    try:
        limit, used = (root / "memory.max").read_text().strip(), int((root / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)$", (root / "memory.stat").read_text(), re.MULTILINE)
        # Cached files count as used but make room when asked to.
        used -= int(cached.group(1)) if cached else 0
        return None if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return None


def lost() -> bool:
    """Whether the GPU takes no more work from this process, as after a kernel that was stopped."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
