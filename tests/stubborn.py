"""Work for a `Crew` that does not end as it should. A module of its own, which processes import at once."""

import os
import signal
import time

from tests.fuzz.crew import Say


def work(kind: str, say: Say) -> None:
    say(f"{kind} begins")
    if kind == "does not end":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say("does not end at all")
        time.sleep(600)
    if kind == "dies":
        os._exit(3)
    say(f"{kind} ends")
