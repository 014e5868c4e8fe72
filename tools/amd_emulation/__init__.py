"""Runs Triton's code objects for AMD GPUs on the CPU, by the instruction emulator of tinygrad; see README.md."""

from tools.amd_emulation.code_object import CodeObject
from tools.amd_emulation.emulator import missing
from tools.amd_emulation.errors import EmuError, Unsupported
from tools.amd_emulation.launch import launch
from tools.amd_emulation.report import Report

__all__ = ["CodeObject", "EmuError", "Report", "Unsupported", "launch", "missing"]
