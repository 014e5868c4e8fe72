"""What the machine gets wrong, not the user: the folder in which Triton keeps compiled kernels."""

import errno
from typing import NoReturn


def kernel_cache(error: Exception, folder: str) -> NoReturn:
    """Triton could not keep a kernel in its folder, or not read one that lies there."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "freeing some space" if full else "making it writable"
        raise RuntimeError(
            f"kernel cache: got {folder}, which Triton cannot use ({said}), need a folder that it can write to; try "
            f"{way_out}, or TRITON_CACHE_DIR=another folder"
        ) from error
    raise RuntimeError(
        f"kernel cache: got a damaged entry in {folder} ({said}), need those that Triton wrote; try emptying the "
        "folder, or TRITON_CACHE_DIR=another folder"
    ) from error
