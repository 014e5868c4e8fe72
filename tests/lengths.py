"""Rows of the Hopper backend's tables for one length, whatever the length of a call."""

import pytest

from flashtile.tuning import hopper as tables


def of_long_sequences(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """The tables of these names, or that of the backward pass, where narrow heads then add dQ up, have the rows that
    serve sequences of any length."""
    for name in names or ("BACKWARD",):
        long = {kind: tuple(row for row in rows if row.longest is None) for kind, rows in getattr(tables, name).items()}
        monkeypatch.setattr(tables, name, long)
