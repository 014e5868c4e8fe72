"""The tables of tiles: which row a call gets."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from flashtile import fp8, masks
from flashtile.backends import hopper
from flashtile.problem import Problem, describe
from flashtile.request import Arguments, build
from flashtile.tuning.hopper import (
    BACKWARD,
    COARSER,
    FORWARD,
    HopperConfig,
    Row,
    backward_configs,
    forward_configs,
)


def _problem(headdim: int = 64, queries: int = 64, eight: bool = False, **options: Any) -> Problem:
    q = torch.zeros(1, queries, 2, headdim, dtype=torch.bfloat16)
    given = fp8.quantize(q, q, q) if eight else (q, q, q)
    return describe(*build(*given, Arguments(**options)))


def _tiles(kind: str, headdim: int = 64) -> tuple[HopperConfig, ...]:
    return tuple(forward_configs(headdim, kind).values())


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "full"),
        ({"causal": True}, "causal"),
        ({"window": (None, 5)}, "causal"),
        ({"mask": lambda b, h, q_idx, kv_idx: kv_idx <= q_idx - 3}, "causal"),
        ({"window": (64, 0)}, "window"),
        ({"window": (64, None)}, "window"),
        ({"causal": True, "mask": masks.window(9, 4)}, "window"),
        ({"softcap": 20.0}, "scored_full"),
        ({"causal": True, "softcap": 20.0}, "scored"),
        ({"causal": True, "score_mod": lambda score, b, h, q_idx, kv_idx: score * 2}, "called"),
        ({"bias": torch.zeros(1, 1, 64, 64)}, "scored"),
        ({"bias": torch.zeros(64), "score_mod": lambda score, b, h, q_idx, kv_idx: score * 2}, "scored"),
        ({"window": (64, 0), "softcap": 20.0}, "cut"),
        ({"causal": True, "mask": masks.chunk(8)}, "listed"),
        ({"causal": True, "mask": masks.chunk(8), "softcap": 20.0}, "cut"),
        ({"causal": True, "dropout_p": 0.1, "seed": 1}, "dropout"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "none",
)
def test_hopper_kinds(options: dict[str, Any], kind: str) -> None:
    assert hopper.configs(_problem(**options)) == _tiles(kind)


def test_hopper_kinds_of_8_bits() -> None:
    for options, kind in (({}, "full"), ({"causal": True}, "causal"), ({"window": (64, 0)}, "window")):
        assert hopper.configs(_problem(eight=True, **options)) == _tiles(f"eight_{kind}")


def test_hopper_rows_by_length() -> None:
    """A causal mask has a loop of its own for what it cuts where that was faster."""
    shortest, short, long = _tiles("causal")
    assert shortest == _tiles("window")[0]
    assert (short.rows, short.early, short.apart) == (long.rows, long.early, long.apart) == (True, True, True)
    for queries, tiles in ((512, shortest), (513, short), (2048, short), (2049, long)):
        assert hopper.configure(_problem(queries=queries, causal=True)) == tiles


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, "full"),
        ({"sinks": torch.zeros(2)}, "full"),
        ({"causal": True}, "causal"),
        ({"window": (64, 0)}, "plain"),
        ({"mask": masks.chunk(8)}, "plain"),
        ({"causal": True, "alibi_slopes": torch.zeros(2)}, "alibi"),
        ({"mask": masks.chunk(8), "alibi_slopes": torch.zeros(2)}, "modified"),
        ({"causal": True, "dropout_p": 0.1, "seed": 1}, "modified"),
        ({"softcap": 20.0}, "modified_full"),
        ({"causal": True, "softcap": 20.0}, "modified"),
        ({"softcap": 20.0, "dropout_p": 0.1, "seed": 1}, "modified"),
        ({"score_mod": lambda score, b, h, q_idx, kv_idx: score + 0.1 * kv_idx}, "added"),
        ({"score_mod": lambda score, b, h, q_idx, kv_idx: score * q_idx}, "modified"),
        ({"causal": True, "score_mod": lambda score, b, h, q_idx, kv_idx: score * q_idx}, "modified"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "none",
)
def test_hopper_backward_kinds(options: dict[str, Any], kind: str) -> None:
    problem = replace(_problem(**options), backward=True)
    assert hopper.configs(problem) == tuple(backward_configs(64, kind).values())


@pytest.mark.parametrize(
    ("options", "forward", "backward"),
    [
        ({}, "full", "full"),
        ({"causal": True}, "packed_causal", "packed_causal"),
        ({"window": (64, 0)}, "window", "plain"),
        ({"mask": masks.chunk(8)}, "listed", "plain"),
        ({"causal": True, "alibi_slopes": torch.zeros(2)}, "scored", "modified"),
        ({"softcap": 20.0}, "scored_full", "modified"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "none",
)
def test_hopper_kinds_of_any_length(options: dict[str, Any], forward: str, backward: str) -> None:
    """Packed sequences have the tiles that hold for any length, and so have rows whose bits are to be those."""
    problem = _problem(**options)
    for unknown in (replace(problem, varlen=True), replace(problem, batch_invariant=True)):
        assert hopper.configs(unknown) == _tiles(forward)[:1]
        assert hopper.configure(replace(unknown, backward=True)) == backward_configs(64, backward)[None]


@pytest.mark.parametrize(("headdim", "longest"), [(64, 512), (128, 768)])
def test_short_sequences_have_dq_apart(headdim: int, longest: int) -> None:
    """Not packed ones, whose lengths nobody asks for, nor where rows are to have equal bits in any company."""
    for queries, apart in ((longest, True), (longest + 1, False)):
        problem = replace(_problem(headdim, queries, causal=True), backward=True)
        assert (hopper.configure(problem).queries is not None) == apart
        packed = replace(problem, varlen=True)
        assert hopper.configure(replace(problem, batch_invariant=True)) == hopper.configure(packed)
        assert hopper.configure(packed).queries is None
        assert hopper.configure(replace(problem, deterministic=True)).queries is not None


@pytest.mark.parametrize(("kind", "coarser"), COARSER.items())
def test_coarser_rows_stand_in(kind: str, coarser: str) -> None:
    """Where a kind's own rows are for narrower heads."""
    table: dict[str, tuple[Row, ...]] = FORWARD if coarser in FORWARD else BACKWARD
    configs: Any = forward_configs if coarser in FORWARD else backward_configs
    for headdim in (64, 128, 256):
        own = any(headdim <= row.headdim for row in table.get(kind, ()))
        assert own or configs(headdim, kind) == configs(headdim, coarser)


def test_rows_for_fewer_columns_of_values() -> None:
    """Heads of 192 columns have rows of their own where values have 128 at most; kinds without one take the next."""
    for kind, rows in FORWARD.items():
        own = [row for row in rows if row.values is not None]
        assert forward_configs(192, kind) == forward_configs(256, kind)
        assert (forward_configs(192, kind, 128) == {None: own[0].config}) if own else True
        assert forward_configs(96, kind, 128) == forward_configs(96, kind)
        assert forward_configs(192, kind, 136) == forward_configs(256, kind)
    narrow, wide = backward_configs(192, "full", False, 128)[None], backward_configs(192, "full")[None]
    assert (narrow.stages, narrow.queries) == (3, backward_configs(192, "modified", True, 128)[None].queries)
    assert wide == backward_configs(256, "full")[None] != narrow
