"""These tests compile kernels, ahead of time: that needs Triton, and not as an interpreter."""

import importlib.util
import os

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_*.py"] if interpreted or importlib.util.find_spec("triton") is None else []
