"""The folder in which Triton keeps compiled kernels: what goes wrong with it is told in words."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from triton import knobs

from flashtile import check
from flashtile.kernels.capture import relaxed

_DAMAGED = "device kernel image is invalid"
"""What NVIDIA's driver says of a kernel that is cut off."""


@contextmanager
def kept() -> Iterator[None]:
    """Kernels are compiled, or loaded from the folder, inside: while a CUDA graph is captured too.

    Raises:
        RuntimeError: the folder cannot be written to, is full, or holds something else than what Triton wrote.
    """
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
