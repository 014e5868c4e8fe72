"""The Hopper backend: Gluon kernels for sm_90a, with the tensor memory accelerator, wgmma and specialised warps.

Half precision: every mask, score_mod, softcap, ALiBi, bias, sinks, dropout, packed sequences; headdim up to 256.
"""

import math
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashtile import backends, facts
from flashtile.backends import Decoder, Gradients, Kernel, Memory, Quantizer
from flashtile.problem import CacheTensors, Inputs, Problem
from flashtile.region import region
from flashtile.tuning import decoding
from flashtile.tuning.decoding import DecodeConfig, decode_splits
from flashtile.tuning.hopper import (
    BackwardConfig,
    HopperConfig,
    backward_config,
    backward_configs,
    forward_config,
    forward_configs,
)
from flashtile.tuning.portable import Tiles

DEVICE = "cuda"
"""Where tensors must be; an emulator takes them elsewhere."""
ARCH = "sm_90"


def unavailable() -> str | None:
    """A Triton that is supported is installed, and there is a GPU of compute capability 9.0."""
    missing = facts.no_gpu()
    if missing is not None:
        return missing
    if ARCH not in facts.architectures():
        return f"there is no Hopper ({ARCH}), but {', '.join(sorted(set(facts.architectures())))}"
    return facts.no_triton()


def builds() -> int:
    return backends.compiled((*_launch().KERNELS, *_cached().KERNELS))


def refuses(problem: Problem) -> str | None:
    """Takes half precision with rows that the copy engine can read."""
    # Tiles of keys begin where blocks of all rows do.
    in_blocks = problem.packed_eight
    checks = (
        *_elsewhere(problem),
        (problem.dtype not in (_EIGHT if problem.scaled else _HALF), f"it takes no {problem.dtype}"),
        (problem.out_dtype not in _outputs(problem), f"it writes no {problem.out_dtype} for {problem.dtype}"),
        (in_blocks and problem.dropout_p > 0, "it drops nothing of packed sequences of 8 bits"),
        (in_blocks and problem.batch_invariant, "tiles of packed sequences of 8 bits depend on those before"),
        (_width(problem) > 256, "it takes up to headdim 256"),
        (not problem.described, "rows of q, k or v do not begin at multiples of 16 bytes, or several are one"),
        (0 in (problem.batch, problem.seqlen_q, problem.seqlen_kv), "it takes no empty tensors"),
    )
    reason = next((reason for found, reason in checks if found), None)
    return reason or _no_kernel_takes(problem)


def _elsewhere(problem: Problem) -> tuple[tuple[bool, str], ...]:
    """What stands against where the tensors lie."""
    return (
        (problem.device != DEVICE, f"it runs on {DEVICE}, the tensors are on {problem.device}"),
        (problem.arch not in ("", ARCH), f"it runs on {ARCH}, the tensors are on a GPU of {problem.arch}"),
    )


def refuses_latent(problem: Problem) -> str | None:
    """Takes multi-head latent attention with many rows of queries over a cache of 16 bits, or of 8-bit floats."""
    cached, window = problem.cached, region(problem.mask)
    if cached is None:
        return "it reads KV caches"
    tile, few = _latent_tiles(problem).tile_kv, decoding.LATENT_LEAST
    shape = (problem.heads_kv, problem.headdim, problem.headdim_v)
    checks = (
        *_elsewhere(problem),
        (shape != (1, 576, 512) or not cached.latent, "it is for values that are the first 512 of 576 columns of keys"),
        (problem.dtype not in _HALF, "it takes queries of 16 bits"),
        (cached.stored not in (None, *_EIGHT), f"it takes no cache of {cached.stored}"),
        (cached.by_page, "it takes no scales of pages"),
        (not problem.described, "rows of q or of the cache do not begin at multiples of 16 bytes"),
        (cached.page % tile != 0, f"it takes pages of a multiple of {tile} rows"),
        (cached.page > 0 and cached.padded, "in pages it has no left padding"),
        ("sinks" in problem.modified, "it has no sinks"),
        (window.left is not None, "it has no window to the left"),
        (problem.batch_invariant, "it takes not all pages, and equal bits in all of them are wanted"),
        (few is None, "the tuning table leaves these calls to the portable kernel"),
        (problem.seqlen_q * problem.heads < (few or 0), f"it takes {few} rows of queries or more"),
        (problem.scale <= 0, "its scale must be positive"),
        (0 in (problem.batch, problem.seqlen_kv), "it takes no empty tensors"),
    )
    reason = next((reason for found, reason in checks if found), None)
    return reason or _no_kernel_takes(problem)


_HALF = (torch.float16, torch.bfloat16)
_EIGHT = (torch.float8_e4m3fn, torch.float8_e5m2)


def _outputs(problem: Problem) -> tuple[torch.dtype, ...]:
    return (*(_HALF if problem.scaled else (problem.dtype,)), torch.float32)


def _no_kernel_takes(problem: Problem) -> str | None:
    """Imported when first asked: it loads triton."""
    from flashtile.kernels import support

    return support.refuses(problem)


def configure(problem: Problem) -> HopperConfig | BackwardConfig:
    """The row of the tuning table."""
    if problem.backward:
        length = math.inf if _any_length(problem) else max(problem.seqlen_q, problem.seqlen_kv)
        return backward_config(problem.headdim, _backward_kind(problem), length, _dq_apart(problem), problem.headdim_v)
    length = 0 if _any_length(problem) else problem.seqlen_q
    return forward_config(problem.headdim, _kind(problem), length, problem.headdim_v)


def configure_latent(problem: Problem) -> DecodeConfig:
    """As many parts of the keys as fill the device; no length is known here."""
    tiles = _latent_tiles(problem)
    append = decoding.append_most(problem.headdim, "hopper")
    if problem.cached is not None and problem.cached.splits is not None:
        return DecodeConfig(tiles, problem.cached.splits, append=append)
    programs = problem.batch * -(-problem.seqlen_q * problem.heads // tiles.tile_q)
    counted = -(-problem.seqlen_kv // decoding.LATENT_COUNTED)
    splits = decode_splits(programs, counted, _cached().calls.DEVICE.room(), decoding.Room(1, 1))
    return DecodeConfig(tiles, splits, append=append)


def _latent_tiles(problem: Problem) -> Tiles:
    narrow = problem.cached is not None and problem.cached.stored is not None
    return decoding.LATENT_WIDENED if narrow else decoding.LATENT


def configs(problem: Problem) -> tuple[Any, ...]:
    """All that such passes take, whatever their length."""
    if _any_length(problem):
        return (configure(problem),)
    if problem.backward:
        kind, apart = _backward_kind(problem), _dq_apart(problem)
        found = backward_configs(problem.headdim, kind, apart, problem.headdim_v)
        return tuple(dict.fromkeys(found.values()))
    return tuple(forward_configs(problem.headdim, _kind(problem), problem.headdim_v).values())


def _any_length(problem: Problem) -> bool:
    """Packed sequences have several, and for equal bits whatever stands beside a sequence tiles are the same."""
    return problem.varlen or problem.batch_invariant


def _width(problem: Problem) -> int:
    return max(problem.headdim, problem.headdim_v)


def _modified(problem: Problem) -> set[str]:
    """What changes scores; sinks are none of them."""
    return set(problem.modified) - {"sinks"}


def _dq_apart(problem: Problem) -> bool:
    """Whether dQ has its own kernel at any length. Gradients of slopes are sums over a query's keys, as dQ is."""
    return problem.deterministic or problem.wanted.alibi_slopes


def _backward_kind(problem: Problem) -> str:
    """Of `tuning.hopper.BACKWARD`."""
    left, right, _top_left, rest = region(problem.mask)
    modified = _modified(problem)
    if left is not None or rest:
        return "modified" if modified else "plain"
    if not modified:
        return _unchanged_kind(problem, left, right)
    if _any_length(problem):
        return "modified"
    if modified == {"alibi_slopes"}:
        return "alibi"
    if modified == {"score_mod"} and _only_adds(problem):
        return "added"
    if right is None and not modified & {"score_mod", "dropout_p"}:
        return "modified_full"
    return "modified"


def _only_adds(problem: Problem) -> bool:
    """Whether the way back through the score function is none. Imported when first asked: it loads triton."""
    from flashtile import lower

    return not any(problem.wanted.score) and lower.only_adds(problem.score_mod)


def _kind(problem: Problem) -> str:
    """Of `tuning.hopper.FORWARD`."""
    left, right, _top_left, rest = region(problem.mask)
    modified = _modified(problem)
    if problem.scaled:
        # Packed sequences have more to keep in registers, for what lies beside a sequence.
        return "eight_cut" if modified or rest or problem.packed_eight else "eight_" + _window_kind(left, right)
    if problem.dropout_p:
        return "dropout"
    if not modified:
        return "listed" if rest else _unchanged_kind(problem, left, right)
    if left is not None or rest:
        return "cut"
    if "bias" in modified:
        return "scored"
    if right is None:
        return "scored_full"
    return "called" if "score_mod" in modified else "scored"


def _unchanged_kind(problem: Problem, left: int | None, right: int | None) -> str:
    """Of what nothing changes; rows whose bits are to be equal in any company get what packed sequences do."""
    kind = _window_kind(left, right)
    return "packed_causal" if kind == "causal" and _any_length(problem) else kind


def _window_kind(left: int | None, right: int | None) -> str:
    if left is not None:
        return "window"
    return "full" if right is None else "causal"


@cache
def _launch() -> ModuleType:
    """Imported when first used: importing flashtile must not import triton."""
    from flashtile.backends.hopper import launch

    return launch


def _forward(inputs: Inputs, problem: Problem, config: HopperConfig, memory: Memory) -> tuple[Tensor, Tensor]:
    out_and_lse: tuple[Tensor, Tensor] = _launch().forward(inputs, problem, config, memory=_kept(memory))
    return out_and_lse


def _backward(inputs: Inputs, problem: Problem, config: BackwardConfig, *rest: Any) -> Gradients:
    *saved, memory = rest
    gradients: Gradients = _launch().backward(inputs, problem, config, *saved, memory=_kept(memory))
    return gradients


@cache
def _cached() -> ModuleType:
    """As `_launch`, of calls over a KV cache."""
    from flashtile.backends.hopper import cached

    return cached


def _decode(
    inputs: Inputs, cache: CacheTensors, problem: Problem, config: DecodeConfig, memory: Memory
) -> tuple[Tensor, Tensor]:
    out_and_lse: tuple[Tensor, Tensor] = _cached().decode(inputs, cache, problem, config, memory=_kept(memory))
    return out_and_lse


def _kept(memory: Memory) -> Memory | None:
    """Emulated launches leave nothing behind."""
    return memory if DEVICE == "cuda" else None


KERNELS = (Kernel("warp_specialized", refuses, configure, _forward, _backward, configs),)

DECODERS = (Decoder("latent", refuses_latent, configure_latent, _decode),)

QUANTIZERS: tuple[Quantizer, ...] = ()
