"""Differential fuzzing: whole calls drawn at random, through every door, against the reference in float64.

    python -m tests.fuzz --seconds 300                    the PyTorch backend, in this process
    python -m tests.fuzz --device interpreter             the portable kernels, interpreted
    python -m tests.fuzz --device cuda --seconds 480      every backend of a GPU, in many processes
    python -m tests.fuzz --door dense --seed 17 --shrink  one batch again, with the smallest call that fails

A call must either give what the reference gives, within the tolerance rule of `tests/oracle.py`, or be refused by a
message of `flashtile.check` (or of the planner, for a backend that was asked for by name). Anything else is a failure:
another exception, a wrong number, NaN, a case that does not end.
"""
