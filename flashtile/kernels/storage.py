"""The folder in which Triton keeps compiled kernels: what goes wrong with it is told in words."""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from triton import knobs

from flashtile import check
from flashtile.kernels.capture import relaxed

_DAMAGED = "device kernel image is invalid"
"""What NVIDIA's driver says of a kernel that is cut off, where it does not crash."""
_ours = threading.local()


@contextmanager
def kept() -> Iterator[None]:
    """Kernels are compiled, or loaded from the folder, inside: while a CUDA graph is captured too.

    Raises:
        RuntimeError: the folder cannot be written to, is full, or holds something else than what Triton wrote.
    """
    _ours.depth = getattr(_ours, "depth", 0) + 1
    if knobs.runtime.kernel_load_start_hook is not None:
        knobs.runtime.kernel_load_start_hook.add(_look_at)
    try:
        with relaxed():
            yield
    # Damaged entries are no JSON, or another one than Triton's, or name files that are gone.
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not _of_the_folder(error):
            raise
        check.kernel_cache(error, knobs.cache.dir)
    except RuntimeError as error:
        if _DAMAGED not in str(error):
            raise
        check.kernel_cache(error, knobs.cache.dir)
    finally:
        _ours.depth -= 1


def _look_at(module: Any, function: Any, name: str, files: Mapping[str, str], key: str) -> None:
    """Before a driver loads a kernel of ours: some releases of NVIDIA's end the process over one that is cut off."""
    if not getattr(_ours, "depth", 0):
        return
    for path in files.values():
        if path.endswith((".cubin", ".hsaco")) and os.path.exists(path) and not _whole(path):
            raise RuntimeError(f"{_DAMAGED}: {path} is cut off")


def _whole(path: str) -> bool:
    """Whether a file of the Executable and Linkable Format, 64 bits, holds its two tables, which end it."""
    with open(path, "rb") as file:
        head = file.read(64)
    numbers = [[int.from_bytes(head[begin:end], "little") for begin, end in table] for table in _TABLES]
    return len(head) == 64 and all(begin + entry * count <= os.path.getsize(path) for begin, entry, count in numbers)


_TABLES = (((32, 40), (54, 56), (56, 58)), ((40, 48), (58, 60), (60, 62)))
"""Of segments and of sections: where the header says where they begin, how large an entry is and how many there are."""


def _of_the_folder(error: Exception) -> bool:
    """Whether Triton raised it while it read or wrote its folder: the last of its functions that ran tells."""
    last = ("", "")
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        place = code.co_filename.replace(os.sep, "/")
        if "/triton/" in place:
            last = (place[place.rindex("/triton/") :], code.co_name)
        trace = trace.tb_next
    return last[0] == "/triton/runtime/cache.py" or last in _READERS


_READERS = (("/triton/compiler/compiler.py", "__init__"), ("/triton/compiler/compiler.py", "__missing__"))
"""What makes a kernel of an entry, beside the folder's own module."""
