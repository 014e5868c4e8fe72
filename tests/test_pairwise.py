"""Every pair of options in one call, and all of them together, against the reference."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from tests import oracle
from tests.problems import Shape, make

OPTIONS = (
    "causal",
    "window",
    "document",
    "mask_mod",
    "bias",
    "alibi",
    "softcap",
    "sinks",
    "score_mod",
    "dropout",
    "gqa",
    "headdim_v",
    "out_float32",
    "lse",
    "varlen",  # last: it cuts the shape that the others have settled
)
SHAPE = Shape(batch=2, seqlen_q=35, seqlen_kv=44, heads=4, heads_kv=4, headdim=16, headdim_v=16)
DTYPES = [torch.float32, torch.bfloat16]
COMBINATIONS = [*combinations(OPTIONS, 2), OPTIONS, tuple(option for option in OPTIONS if option != "varlen")]


def _check(options: tuple[str, ...], dtype: torch.dtype) -> None:
    features = tuple(option for option in options if option != "lse")
    oracle.check(make("+".join(options), SHAPE, features, dtype, lse_grad="lse" in options))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("options", COMBINATIONS, ids=lambda options: "+".join(options) if len(options) < 9 else "all")
def test_options_together(options: tuple[str, ...], dtype: torch.dtype, small_tiles: None) -> None:
    _check(options, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_everything_in_other_dtypes(dtype: torch.dtype) -> None:
    features = tuple(option for option in OPTIONS if option not in ("lse", "out_float32"))
    oracle.check(make("everything", replace(SHAPE, seqlen_q=70, seqlen_kv=140), features, dtype))
