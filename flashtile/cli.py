"""The command `flashtile`: doctor, explain, demo, bench, tune, compile. Torch is imported when one runs, not before."""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16", "float64")

GIB = 2**30


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


class UsageError(Exception):
    """The call cannot be carried out as given; the message says what to do."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="flashtile", description="Exact attention at the hardware's limit.")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    _add_doctor(commands)
    _add_explain(commands)
    _add_demo(commands)
    _add_bench(commands)
    _add_tune(commands)
    _add_compile(commands)
    return top


def _add(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _add_doctor(commands: Any) -> None:
    command = _add(commands, "doctor", _doctor, "what this machine offers, and which backends can run on it")
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_explain(commands: Any) -> None:
    command = _add(
        commands, "explain", _explain, "which backend, kernel and tiles a call would use, and why none faster"
    )
    for name, value in (("batch", 1), ("seqlen-q", 1024), ("heads", 8), ("headdim", 64)):
        command.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"default {value}")
    for name, other in (("seqlen-kv", "seqlen-q"), ("heads-kv", "heads"), ("headdim-v", "headdim")):
        command.add_argument(f"--{name}", type=int, metavar="N", help=f"default: {other}")
    command.add_argument("--dtype", choices=DTYPES, default="float32")
    command.add_argument("--device", default="cpu")
    command.add_argument("--causal", action="store_true")
    command.add_argument("--window", nargs=2, type=_limit, metavar=("LEFT", "RIGHT"), help="keys, or none for no limit")
    command.add_argument("--documents", type=int, metavar="N", help="N packed documents of equal length")
    command.add_argument("--softcap", type=float)
    command.add_argument("--alibi", action="store_true", help="ALiBi slopes")
    command.add_argument("--bias", action="store_true", help="a bias (1, heads, seqlen_q, seqlen_kv)")
    command.add_argument("--sinks", action="store_true", help="a sink logit a head")
    command.add_argument("--dropout-p", type=float, default=0.0)
    command.add_argument("--alignment", choices=("bottom_right", "top_left"), default="bottom_right")
    command.add_argument("--deterministic", action="store_true")
    command.add_argument("--backend", help="insist on this one")


def _add_demo(commands: Any) -> None:
    text = (
        "train a small GPT twice, by the textbook formula and by flashtile, then measure time and memory against seqlen"
    )
    command = _add(commands, "demo", _demo, text)
    command.add_argument(
        "--out", type=Path, default=Path("flashtile-demo"), help="folder of the plots; default %(default)s"
    )
    command.add_argument("--device", help="default: cuda if there is one, else cpu")
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on cuda, float32 on the CPU"
    )
    command.add_argument("--steps", type=int, metavar="N", help="training steps of each run")
    command.add_argument("--quick", action="store_true", help="everything in seconds, to see that it works")


def _add_bench(commands: Any) -> None:
    text = "measure time, memory and error beside other implementations; `bench report` turns the records into docs"
    command = _add(commands, "bench", _bench, text)
    command.add_argument(
        "suites",
        nargs="*",
        metavar="suite",
        help="dense, masks, memory, error, on a GPU also grid, functions, packed, sparsity (default: all), or report",
    )
    command.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="default %(default)s")
    command.add_argument("--docs", type=Path, default=Path("docs"), help="where report writes; default %(default)s")
    command.add_argument("--device", default="cpu")
    command.add_argument("--dtype", nargs="+", choices=DTYPES[:3], default=["float32"])
    command.add_argument("--seqlen", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    for name, value in (("batch", 1), ("heads", 8), ("headdim", 64)):
        command.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"default {value}")
    command.add_argument("--heads-kv", type=int, metavar="N", help="default: heads")
    command.add_argument("--peers", nargs="+", metavar="peer", help="default: those that each suite names")
    command.add_argument("--seconds", type=float, default=10.0, help="time for each peer and case; default %(default)s")
    command.add_argument("--quick", action="store_true", help="everything in seconds, to see that it works")


def _add_tune(commands: Any) -> None:
    text = "search tiles for the portable backend on this GPU; candidates that compute wrong numbers are never timed"
    command = _add(commands, "tune", _tune, text)
    command.add_argument("--headdim", nargs="+", type=int, default=[64, 128, 256], metavar="N")
    command.add_argument("--kind", nargs="+", choices=("half", "masked", "modified", "single"))
    command.add_argument("--device", default="cuda")
    command.add_argument("--tokens", type=int, default=8192, metavar="N", help="default %(default)s")
    command.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="default %(default)s")


def _add_compile(commands: Any) -> None:
    text = "compile the portable backend's kernels for GPUs that need not be there; exit code 1 where a limit is broken"
    command = _add(commands, "compile", _compile, text)
    command.add_argument("--arch", nargs="+", default=["sm_90a"], metavar="ARCH", help="sm_80, gfx942, ... or all")
    command.add_argument("--headdim", nargs="+", type=int, default=[64, 128, 256], metavar="N")
    command.add_argument("--dtype", nargs="+", choices=DTYPES[:3], default=["bfloat16"])
    command.add_argument("--variant", nargs="+", metavar="NAME", help="plain, causal, bias, ...; default: all")
    command.add_argument("--report", choices=("table", "json"), default="table")


def _limit(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


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
        "extras": {name: importlib.util.find_spec(name) is not None for name in ("rich", "matplotlib")},
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


def _explain(given: argparse.Namespace) -> int:
    import torch

    import flashtile

    if given.documents is not None and given.documents < 1:
        raise UsageError(f"--documents: got {given.documents}, need at least 1")
    keys, heads_kv = given.seqlen_kv or given.seqlen_q, given.heads_kv or given.heads
    make = {"dtype": getattr(torch, given.dtype), "device": given.device}
    try:
        # The tensors are only described, never read: their memory is not touched.
        q = torch.empty(given.batch, given.seqlen_q, given.heads, given.headdim, **make)
        k = torch.empty(given.batch, keys, heads_kv, given.headdim, **make)
        v = torch.empty(given.batch, keys, heads_kv, given.headdim_v or given.headdim, **make)
        flashtile.explain(q, k, v, **_explain_options(given, q, k))
    except (TypeError, ValueError, NotImplementedError, RuntimeError, AssertionError) as error:
        # AssertionError: what torch raises where it was built without the device that was asked for.
        raise UsageError(str(error).splitlines()[0]) from error
    return 0


def _explain_options(given: argparse.Namespace, q: Any, k: Any) -> dict[str, Any]:
    """The options as keyword arguments of `flashtile.explain`."""
    import torch

    from flashtile import masks

    heads, documents = given.heads, None
    if given.documents:
        documents = masks.document(
            *(torch.arange(n, device=q.device) * given.documents // n for n in (len(q[0]), len(k[0])))
        )
    return {
        "causal": given.causal,
        "window": tuple(given.window) if given.window else None,
        "mask": documents,
        "softcap": given.softcap,
        "alibi_slopes": torch.ones(heads, device=q.device) if given.alibi else None,
        "bias": q.new_empty(1, heads, q.shape[1], k.shape[1]) if given.bias else None,
        "sinks": torch.zeros(heads, device=q.device) if given.sinks else None,
        "dropout_p": given.dropout_p,
        "alignment": given.alignment,
        "deterministic": given.deterministic or None,
        "backend": given.backend,
    }


INSTALL = "pip install 'flashtile[cli]'"


def _need_extras() -> None:
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: {INSTALL}"
        )


def _need_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"--device: got {device!r}, which torch cannot use here: {str(error).splitlines()[0]}"
        ) from error


def _demo(given: argparse.Namespace) -> int:
    _need_extras()
    from dataclasses import replace

    from flashtile.demo import show

    device = given.device or show.best_device()
    _need_device(device)
    dtype = given.dtype or ("float32" if device == "cpu" else "bfloat16")
    demo = show.Demo.on(device, dtype, given.out)
    demo = demo.quick() if given.quick else demo
    if given.steps is not None:
        if given.steps < 1:
            raise UsageError(f"--steps: got {given.steps}, need at least 1")
        demo = replace(demo, training=replace(demo.training, steps=given.steps))
    return show.run(demo)


def _bench(given: argparse.Namespace) -> int:
    _need_extras()
    from flashtile.bench import peers, show
    from flashtile.bench.suite import SUITES, usual

    if given.suites == ["report"]:
        try:
            return show.write_report(given.results, given.docs)
        except ValueError as error:
            raise UsageError(str(error)) from error
    for what, names, known in (("suite", given.suites, SUITES), ("--peers", given.peers or [], peers.PEERS)):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UsageError(f"{what}: got {unknown[0]!r}, need one of {', '.join(known)}")
    if given.heads % (given.heads_kv or given.heads):
        raise UsageError(f"--heads-kv: got {given.heads_kv}, need a divisor of {given.heads} heads")
    _need_device(given.device)
    settings = _bench_settings(given)
    return show.run(given.suites or usual(settings.device), settings, given.results)


def _tune(given: argparse.Namespace) -> int:
    _need_extras()
    _need_device(given.device)
    from flashtile.backends import portable

    missing = portable.unavailable()
    if missing is not None:
        raise UsageError(missing)
    from flashtile.bench import show, tune

    chosen = [(headdim, kind) for headdim in given.headdim for kind in given.kind or list(tune.KINDS)]
    searches = [tune.Search(headdim, kind, given.device, given.tokens) for headdim, kind in chosen]
    return show.tune(searches, given.results)


def _compile(given: argparse.Namespace) -> int:
    _need_extras()
    if importlib.util.find_spec("triton") is None:
        raise UsageError("triton is not installed; try pip install triton")
    from flashtile.compiling import matrix, show
    from flashtile.compiling.targets import TARGETS

    names = {"sm_90": "sm_90a"}
    targets = list(TARGETS) if given.arch == ["all"] else [names.get(arch, arch) for arch in given.arch]
    variants = given.variant or list(matrix.VARIANTS)
    for what, chosen, known in (("--arch", targets, TARGETS), ("--variant", variants, matrix.VARIANTS)):
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise UsageError(f"{what}: got {unknown[0]!r}, need one of {', '.join(known)}")
    entries = list(matrix.entries(targets, given.headdim, given.dtype, variants))
    return show.run(entries, as_json=given.report == "json")


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
