"""`flashtile doctor`: what this machine offers, and which backends can run on it."""

import argparse
import importlib.util
import json
import os
from typing import Any

from flashtile.cli.common import EXTRAS, INSTALL, add_command

GIB = 2**30


def add_doctor(commands: Any) -> None:
    """The command and its options."""
    command = add_command(commands, "doctor", _doctor, "what this machine offers, and which backends can run on it")
    command.add_argument("--json", action="store_true", help="print JSON")


def _doctor(given: argparse.Namespace) -> int:
    found = examine()
    print(json.dumps(found, indent=1) if given.json else _diagnosis(found))
    return 0 if any(backend["usable"] for backend in found["backends"]) else 1


def examine() -> dict[str, Any]:
    """What this machine offers, ready for JSON."""
    import platform

    import torch

    from flashtile import backends, plan
    from flashtile.bench import machine

    usable: list[dict[str, Any]] = [
        {"name": name, "usable": why is None, "reason": why} for name, why in plan.available()
    ]
    for backend in usable:
        kernels = backends.load(backend["name"]).KERNELS if backend["usable"] else ()
        backend["kernels"] = [kernel.name for kernel in kernels]
    return {
        "versions": machine.versions(),
        "platform": platform.platform(),
        "cpu": {
            "name": machine.cpu_name(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "free_bytes": machine.free_memory("cpu"),
        },
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "gpu_runtime": {"cuda": torch.version.cuda, "hip": torch.version.hip},
        "c_compiler": machine.c_compiler(),
        "extras": {name: importlib.util.find_spec(name) is not None for name in EXTRAS},
        "backends": usable,
    }


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
    }


def _diagnosis(found: dict[str, Any]) -> str:
    """The same for people."""
    cpu, versions = found["cpu"], found["versions"]
    needed = "" if found["c_compiler"] else "; Triton builds its launchers with one: install gcc or clang, or set CC"
    lines = [
        ("versions", ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())),
        ("platform", found["platform"]),
        ("cpu", f"{cpu['name']}: {cpu['capability']}, {cpu['cores']} cores, torch uses {cpu['threads']} threads, "
                f"{cpu['free_bytes'] / GIB:.1f} GiB free"),
        *(("gpu", f"{gpu['name']}: capability {gpu['capability']}, {gpu['memory_bytes'] / GIB:.0f} GiB")
          for gpu in found["gpus"]),
        *([] if found["gpus"] else [("gpu", _no_gpu(found["gpu_runtime"]))]),
        ("compiler", (found["c_compiler"] or "none found") + needed),
        *(("extra", f"{name} is missing: {INSTALL}") for name, there in found["extras"].items() if not there),
        *(("backend", f"{b['name']}: " + (f"usable, kernels {', '.join(b['kernels'])}" if b["usable"] else b["reason"]))
          for b in found["backends"]),
    ]  # fmt: skip
    return "\n".join(f"{name:<9} {text}" for name, text in lines)


def _no_gpu(runtime: dict[str, str | None]) -> str:
    built = " and ".join(f"{name} {version}" for name, version in runtime.items() if version)
    return "none that torch sees" + (f" (it is built for {built})" if built else " (it is built for the CPU only)")
