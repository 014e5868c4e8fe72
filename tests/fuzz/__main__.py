"""`python -m tests.fuzz`. The loop is a module of its own, which the processes that it spawns can import."""

import sys

from tests.fuzz.loop import main

if __name__ == "__main__":
    sys.exit(main())
