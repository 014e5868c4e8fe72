"""For those who compile kernels themselves: what a launch gives a kernel, in its own order, and a backend that launches
them there."""

from typing import Any

from flashtile.backends import Kernel


def bind(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the kernel's arguments by name, in its order, and the options that are the compiler's)."""
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, arguments, strict=False)) | options
    return {name: given[name] for name in names}, {name: given[name] for name in options if name not in names}


def portable_on(machine: Any, family: str) -> Kernel:
    """The portable backend for dense and packed calls, with the tiles of a family of GPUs, launched on `machine`."""
    from flashtile.backends import portable
    from flashtile.backends.portable import launch
    from flashtile.kernels import support

    return Kernel(
        "sweep",
        support.refuses,
        lambda problem: portable.configure(problem, family),
        lambda *arguments: launch.forward(*arguments[:-1], machine=machine),
        lambda *arguments: launch.backward(*arguments[:-1], machine=machine),
    )
