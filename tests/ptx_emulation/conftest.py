"""These tests compile kernels, ahead of time and as far as PTX: that needs Triton, and not as an interpreter."""

import importlib.util
import os

from tests.as_ptx import as_ptx

__all__ = ["as_ptx"]

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_*.py"] if interpreted or importlib.util.find_spec("triton") is None else []
