"""Rows of the Hopper backend's tables for one length, whatever the length of a call."""

from collections.abc import Sequence

import pytest

from flashtile.tuning import hopper as tables


def of_long_sequences(monkeypatch: pytest.MonkeyPatch, names: Sequence[str] = ("BACKWARD",)) -> None:
    """These tables have no rows but those that serve any length; backward passes of narrow heads then add dQ up."""
    for name in names:
        long = {kind: tuple(row for row in rows if row.longest is None) for kind, rows in getattr(tables, name).items()}
        monkeypatch.setattr(tables, name, long)
