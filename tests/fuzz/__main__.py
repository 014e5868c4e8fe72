"""`python -m tests.fuzz`. The loop is a module of its own, which the processes that it spawns can import."""

import signal
import sys
from typing import Any

from tests.fuzz.loop import main

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What interrupts, from a keyboard or from whoever limits the time."""


def _interrupt(number: int, frame: Any) -> None:
    """Once: what was done until then is written down, and no second one stops that."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    for each in SIGNALS:
        signal.signal(each, _interrupt)
    sys.exit(main())
