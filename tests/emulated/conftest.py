"""No GPU will run these kernels."""

from tests.as_ptx import as_ptx

__all__ = ["as_ptx"]
