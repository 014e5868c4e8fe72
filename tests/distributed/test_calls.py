"""Attention over 1, 2, 3, 4 and 8 processes against the reference: every mask, every modifier, every scheme."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from tests import oracle
from tests.distributed import processes
from tests.distributed.jobs import PAIRS, Sharded
from tests.problems import FEATURES, KITCHEN_SINK, Call, Shape, dense, make, packed

WORLDS = (1, 2, 3, 4, 8)
SINK = (*KITCHEN_SINK, "gqa")


def _shape(ranks: int, square: bool = False) -> Shape:
    """Lengths that all layouts of these worlds divide, heads that the ranks divide."""
    heads = 6 if ranks == 3 else 8 if ranks == 8 else 4
    return dense(2, 96 if square else 48, 96, heads, heads, 8)


def _packed(ranks: int, same: bool) -> Shape:
    heads = 6 if ranks == 3 else 8 if ranks == 8 else 4
    lengths = (17, 0, 50, 29)
    return packed(lengths, lengths if same else (31, 8, 40, 17), heads, heads // 2, 8)


def _cases(ranks: int) -> list[Sharded]:
    """Every feature that changes no sizes by the ring, on lengths that differ, with more than two ranks some at a time;
    by every scheme with two ranks. All worlds take what has a path of its own by every scheme."""
    shape, square = _shape(ranks), _shape(ranks, True)
    plain = [name for name in FEATURES if FEATURES[name].reshape(shape) == shape and name != "deterministic"]
    schemes = ("ring",) if ranks == 1 else ("ring", "gather", "ulysses")
    features = PAIRS if ranks > 2 else [(name,) for name in plain]
    found = [
        Sharded("-".join(chosen), shape, chosen, scheme)
        for chosen in features
        for scheme in schemes[: 3 if ranks == 2 else 1]
    ]
    for scheme in schemes:
        found += [
            Sharded("square", square, ("causal",), scheme),
            Sharded("all_in_one", square, SINK, scheme),
            Sharded("packed_causal", _packed(ranks, True), ("causal",), scheme),
            Sharded("packed_mods", _packed(ranks, False), ("causal", "bias", "alibi_batch", "score_mod"), scheme),
        ]
        if ranks < 8 or scheme == "ring":
            found += [
                Sharded("square_gqa", square, ("causal", "mqa"), scheme, layout="contiguous"),
                Sharded("square_window", square, ("window_left", "headdim_v"), scheme, lse_grad=False),
                Sharded("bfloat16", square, ("causal", "gqa"), scheme, dtype=torch.bfloat16),
                Sharded("float64", shape, ("window", "alibi", "score_mod"), scheme, dtype=torch.float64),
                Sharded("packed_masks", _packed(ranks, False), ("window", "padding", "mask_mod", "sinks"), scheme),
            ]
    if 1 < ranks < 4:
        apart = (
            ("causal",),
            SINK,
            ("causal", "mqa"),
            ("document", "dropout", "bias_heads"),
            ("block_mask", "alibi_batch"),
        )
        found += [Sharded("-".join(chosen), square, chosen, "ring", by_heads=True) for chosen in apart]
        found.append(
            Sharded("packed_mods", _packed(ranks, False), ("causal", "bias", "score_mod"), "ring", by_heads=True)
        )
    if ranks == 3:
        found.append(Sharded("uneven_heads", replace(square, heads=6, heads_kv=2), ("causal",), "ulysses"))
    for mesh in {4: [(2, 2)], 8: [(2, 4), (4, 2)]}.get(ranks, []):
        found.append(Sharded("mixed_by_heads", square, SINK, "mixed", mesh=mesh, by_heads=True))
        mixed = ("all_in_one", SINK), ("block", ("block", "bias")), ("mask_mod", ("mask_mod", "alibi"))
        found += [Sharded(name, square, features, "mixed", mesh=mesh) for name, features in mixed]
        found.append(Sharded("packed_mixed", _packed(ranks, True), ("causal", "alibi"), "mixed", mesh=mesh))
    if ranks > 1:
        found.append(Sharded("packed_dropout", _packed(ranks, True), ("causal", "dropout"), "ulysses"))
    return found


@cache
def _truth(
    name: str, shape: Shape, features: tuple[str, ...], dtype: torch.dtype, lse_grad: bool
) -> tuple[Call, oracle.Truth]:
    call = make(name, shape, features, dtype, lse_grad=lse_grad)
    return call, oracle.truth_and_textbook(call)


@pytest.mark.parametrize("ranks", WORLDS)
def test_equals_the_reference(ranks: int, tmp_path: Path) -> None:
    cases = _cases(ranks)
    found = processes.run(cases, ranks, tmp_path)
    wrong = []
    for case, values in zip(cases, found, strict=True):
        try:
            results = case.together(processes.succeeded(values))
            call, truth = _truth(case.name, case.shape, case.features, case.dtype, case.lse_grad)
            oracle.compare(results, call, known=truth)
        except AssertionError as error:
            wrong.append(f"{case}: {error}")
    assert not wrong, f"{len(wrong)} of {len(cases)}\n" + "\n".join(wrong[:12])
