"""Hopper's kernel for latent attention over a KV cache, one case: python -m tests.gpu.latent NAME."""

import sys
from dataclasses import replace

import torch

from flashtile import decoding
from flashtile.decoding import CacheArguments
from tests import caches
from tests.caches import FP8, LATENT, CacheCase

REAL = replace(LATENT[0], name="real", heads=128, lengths=(1, 4097, 2222, 0), capacity=4160)
FURTHER = (REAL, replace(REAL, name="real_pages", page=64), replace(REAL, name="real_fp8", stored=FP8))
CASES = {case.name: case for case in (*LATENT, *FURTHER)}
"""Those that are emulated too, and thousands of keys."""


def check(case: CacheCase, dtype: torch.dtype, splits: int | None) -> None:
    """That this kernel runs, and is right: the launches are played from a tape the third time."""
    call = caches.make(case, dtype, "cuda")
    given = CacheArguments(**call.options, num_splits=splits)
    chosen = decoding.build(call.q, call.k_cache, call.v_cache, given).plan()
    if (chosen.backend, chosen.kernel) != ("hopper", "latent"):
        raise AssertionError(f"{chosen}")
    for _ in range(3):
        caches.check(call.copy(), num_splits=splits)


def main(name: str) -> None:
    for splits in (None, 1, 3):
        check(CASES[name], torch.bfloat16, splits)
    check(CASES[name], torch.float16, None)
    print("ran", name)


if __name__ == "__main__":
    main(sys.argv[1])
