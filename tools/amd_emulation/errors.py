"""What ends an emulation."""


class EmuError(RuntimeError):
    """The kernel did what a GPU forbids or leaves undefined, or was called with arguments that do not fit."""


class Unsupported(EmuError):
    """The kernel uses something that is not emulated, or that nobody has checked; raised only when it is reached."""
