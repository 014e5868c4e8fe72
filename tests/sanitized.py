"""Small calls of the GPU suite, forward and backward, without their references: what `tools/sanitize.py` runs.

    python -m tests.sanitized                                    all of them
    python -m tests.sanitized hopper:causal_square cache:fp8     some, as KIND:CASE
    python -m tests.sanitized --unwritten                        no result may keep the NaN that unwritten memory holds

KIND is a backend, whose cases are those of `tests.problems`, or `cache` or `latent`, whose cases are those of
`tests.caches`. Without a GPU they run where the library chooses, on the CPU.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from tests import caches, oracle
from tests.problems import CASES
from tests.unwritten import NAN, unwritten_holds

CALLS = (
    *("hopper:causal_square", "hopper:document", "hopper:deterministic", "hopper:headdim_160", "hopper:bias_queries"),
    *("hopper:dropout", "hopper:mask_mod", "hopper:causal_long", "hopper:varlen_used", "hopper:varlen_document"),
    *("latent:latent_pages", "latent:latent_many_fp8", "cache:plain", "cache:fp8"),
    *("portable:causal_square", "portable:varlen_used", "portable:all_in_one"),
)
PIECE = 16
"""Bytes that a thread reads at once."""

_ATTENTION = {case.name: case for case in CASES}
_CACHES: Mapping[str, Any] = {
    "cache": {str(case): case for case in (*caches.CASES, *caches.QUANTIZED)},
    "latent": {str(case): case for case in caches.LATENT},
}


def run(name: str, device: str, unwritten: bool = False) -> tuple[list[Tensor], int]:
    """(results, pieces of the output that Hopper's copy engine stores). unwritten: NaN is in unwritten memory."""
    kind, _, case = name.partition(":")
    filled = unwritten_holds(NAN) if unwritten else nullcontext()
    if kind in _CACHES:
        cached = caches.make(_CACHES[kind][case], torch.bfloat16, device)
        with filled:
            return list(cached.run()), 0
    call = _ATTENTION[case].call(torch.bfloat16, device)
    with filled:
        found = oracle.ours(call, kind if device == "cuda" else None)
    # Of packed sequences the warps store the output for themselves, as other kernels always do.
    stored = kind == "hopper" and not call.shape.packed
    return list(found.values()), found["out"].nbytes // PIECE if stored else 0


def tell(name: str, device: str, unwritten: bool) -> str:
    """One line, of what ran and of what failed."""
    begin = time.perf_counter()
    try:
        results, pieces = run(name, device, unwritten)
        if device == "cuda":
            torch.cuda.synchronize()
        if unwritten and any(bool(tensor.isnan().any()) for tensor in results):
            raise ValueError("a result holds NaN")
    except Exception as error:  # the next call is to run in any case
        traceback.print_exc(limit=-3)
        return f"CALL {name}: failed, {type(error).__name__}: {str(error)[:300]}"
    stored = pieces if device == "cuda" else 0
    return f"CALL {name}: ran in {time.perf_counter() - begin:.1f} s, {stored} pieces stored by the copy engine"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calls", nargs="*", metavar="KIND:CASE")
    parser.add_argument("--unwritten", action="store_true", help="fill unwritten memory with NaN, and look for it")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    said = []
    for name in given.calls or CALLS:
        said.append(tell(name, device, given.unwritten))
        print(said[-1], flush=True)
    print(f"CALLS ended, on {torch.cuda.get_device_name() if device == 'cuda' else 'the CPU'}", flush=True)
    return int(any(": failed" in line for line in said))


if __name__ == "__main__":
    sys.exit(main())
