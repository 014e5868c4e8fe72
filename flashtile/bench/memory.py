"""Peak memory of a call, measured two ways that check each other.

`allocated` adds up every allocation and release that PyTorch's allocator reports while the call runs: exact, the same
on every run, available everywhere; on a GPU it is the allocator's own peak. `resident` is what the operating system
saw: the peak of the process's resident set over its size just before, which also catches buffers of libraries that do
not ask PyTorch's allocator. It needs Linux, and a fresh process, since a process keeps pages that were freed before.
"""

import gc
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def allocated_peak(call: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes by which PyTorch's allocations rise at most, while `call` runs, over those alive at its start."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _ = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        _ = call()
    total = peak = 0
    for event in _memory_events(trace):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    return peak


def _memory_events(trace: profile) -> list[dict[str, Any]]:
    """The allocator's reports, in order of time; releases have negative sizes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        trace.export_chrome_trace(str(path))
        events = json.loads(path.read_text(errors="replace"))["traceEvents"]
    found = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    return sorted(found, key=lambda event: (event["ts"], event["args"].get("Ev Idx", 0)))


def resident_peak(call: Callable[[], Any]) -> int | None:
    """Bytes by which this process's resident set rises at most while `call` runs; None where Linux does not tell."""
    gc.collect()
    try:
        # Writing 5 sets the peak (VmHWM) back to the present size.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        _ = call()
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def gib(size: float) -> str:
    """A size in the unit that fits: `12.3 GiB`, `4.0 MiB`, `512 KiB`."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:.0f} {name}"
    return f"{size / 1024:.0f} KiB"
