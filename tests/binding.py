"""What a launch gives a kernel, in the kernel's own order, for those who compile it themselves."""

from typing import Any


def bind(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the kernel's arguments by name, in its order, and the options that are the compiler's)."""
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, arguments, strict=False)) | options
    return {name: given[name] for name in names}, {name: given[name] for name in options if name not in names}
