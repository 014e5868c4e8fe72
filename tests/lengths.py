"""Rows of the Hopper backend's tables for one length, whatever the length of a call."""

import pytest

from flashtile.tuning import hopper as tables


def of_long_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward passes of narrow heads add dQ up, as for sequences of any length."""
    long = {kind: tuple(row for row in rows if row.longest is None) for kind, rows in tables.BACKWARD.items()}
    monkeypatch.setattr(tables, "BACKWARD", long)
