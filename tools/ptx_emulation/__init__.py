"""Runs the PTX of Triton and Gluon kernels for NVIDIA GPUs up to Hopper in numpy, without a GPU; see README.md."""

from tools.ptx_emulation.emulation import SWEEP, emulate, emulate_kernel
from tools.ptx_emulation.errors import EmuError, Unsupported
from tools.ptx_emulation.formats import E4M3, E5M2, bf2f, f2bf, f2bf_rz, f2e4m3, f2e5m2
from tools.ptx_emulation.report import Report
from tools.ptx_emulation.tensor_maps import TensorMap

__all__ = [
    "E4M3",
    "E5M2",
    "SWEEP",
    "EmuError",
    "Report",
    "TensorMap",
    "Unsupported",
    "bf2f",
    "emulate",
    "emulate_kernel",
    "f2bf",
    "f2bf_rz",
    "f2e4m3",
    "f2e5m2",
]
