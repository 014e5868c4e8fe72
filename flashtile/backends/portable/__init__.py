"""The portable backend: Triton kernels for NVIDIA and AMD GPUs, and for Triton's interpreter on the CPU."""

import os
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashtile import facts, trace
from flashtile.backends import Decoder, Gradients, Kernel, Memory, Quantizer, compiled
from flashtile.problem import CacheTensors, Inputs, Problem
from flashtile.region import region
from flashtile.tuning import decoding
from flashtile.tuning.decoding import DecodeConfig, decode_splits, decode_tiles
from flashtile.tuning.portable import PortableConfig, portable_config


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (its own switch, for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable() -> str | None:
    """A Triton that is supported is installed, and there is a GPU or its interpreter."""
    return (None if interpreted() else facts.no_gpu()) or facts.no_triton()


def builds() -> int:
    """Interpreted kernels are not compiled."""
    return compiled((*_launch().KERNELS, *_cached().KERNELS, *_rounding().KERNELS))


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_FNUZ = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
_LARGEST = 512
_LARGEST_KEY = 576
"""Over a KV cache: multi-head latent attention has 512 columns and 64 more with positions."""
_SMALL = ("sm_86", "sm_89", "sm_120", "sm_121")
"""GPUs of 99 KB of shared memory."""
_LARGEST_SMALL = 256
"""Columns there, of keys or values, of a backward pass in float32: of more of both the smallest tiles take 128 KB."""


def refuses(problem: Problem) -> str | None:
    """Takes head dimensions to 512 and the functions that can be written in Triton; 8 bits where the GPU does."""
    if problem.scaled and problem.device == ("cpu" if interpreted() else "cuda"):
        name = str(problem.dtype).removeprefix("torch.")
        if interpreted():
            return f"Triton's interpreter multiplies no {name}"
        if not multiplies_eight_bits(problem.dtype, problem.arch):
            return f"the GPU multiplies no {name}"
        if min(problem.headdim, problem.headdim_v) <= _SMALLEST_EIGHT:
            return f"8-bit products sum up more than {_SMALLEST_EIGHT} columns at a time"
    return _refuses_shape(problem)


_SMALLEST_EIGHT = 16


def refuses_halves(problem: Problem) -> str | None:
    """Takes what has 8 bits, and makes 16 of them."""
    return _refuses_shape(problem) if problem.scaled else "its inputs have 8 bits"


def _refuses_shape(problem: Problem) -> str | None:
    if max(problem.headdim, problem.headdim_v) > _LARGEST:
        return f"headdim {problem.headdim} and headdim_v {problem.headdim_v}: it takes up to {_LARGEST}"
    exact = problem.backward and problem.dtype is torch.float32
    if exact and problem.arch in _SMALL and min(problem.headdim, problem.headdim_v) > _LARGEST_SMALL:
        return f"the backward pass of more than {_LARGEST_SMALL} columns in float32 exceeds the GPU's shared memory"
    return _refuses_numbers(problem)


def _refuses_numbers(problem: Problem) -> str | None:
    """What stands against the dtype, the device and the functions, whatever the head dimensions are."""
    device = "cpu" if interpreted() else "cuda"
    if problem.device != device:
        return f"it runs on {device}, the tensors are on {problem.device}"
    if interpreted() and problem.dtype is torch.bfloat16:
        return "Triton's interpreter multiplies no bfloat16"
    if problem.dtype not in _DTYPES and not problem.scaled:
        return f"it computes in float32; the tensors are {problem.dtype}"
    from flashtile.kernels import support

    return support.refuses(problem)


def refuses_cached(problem: Problem) -> str | None:
    """Of calls over a KV cache keys to headdim 576, and those whose numbers the device can convert."""
    reason, cached = _refuses_numbers(problem), problem.cached
    if problem.headdim > _LARGEST_KEY or problem.headdim_v > _LARGEST:
        sizes = f"headdim {problem.headdim} and headdim_v {problem.headdim_v}"
        return f"{sizes}: it takes up to {_LARGEST_KEY} and {_LARGEST} over a KV cache"
    stored = cached.stored if cached is not None else None
    if reason is not None or cached is None or stored is None or not stored.is_floating_point:
        return reason
    if interpreted():
        return "Triton's interpreter rounds nothing to 8-bit floats" if cached.appended else None
    if stored is torch.float8_e4m3fn and problem.arch.startswith("sm_") and not _converts_eight_bits(problem.arch):
        return "the GPU converts no float8_e4m3fn; float8_e5m2 or int8 would do"
    return None


def configure(problem: Problem, family: str | None = None) -> PortableConfig:
    """The row of the tuning table; `family`: of another GPU than the current one."""
    family = family or family_of(problem.arch)
    return portable_config(max(problem.headdim, problem.headdim_v), kind_of(problem), family)


def configure_decoding(problem: Problem, family: str | None = None) -> DecodeConfig:
    """Tiles from the table, and as many parts of the keys as fill the device; no length is known here."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    rows, headdim = problem.seqlen_q * problem.group, min(_LARGEST, max(problem.headdim, problem.headdim_v))
    family = family or family_of(problem.arch)
    tiles = decode_tiles(headdim, rows, _kind_of_cache(problem), kind_of(problem), family)
    append = decoding.append_most(max(problem.headdim, problem.headdim_v), family)
    longest = -(-problem.seqlen_kv // tiles.tile_kv)
    if problem.batch_invariant:
        part = decoding.PART // tiles.tile_kv
        return DecodeConfig(tiles, max(1, -(-longest // part)), part, append)
    programs = problem.batch * problem.heads_kv * -(-rows // tiles.tile_q)
    splits, stored = (problem.cached.splits, problem.cached.stored) if problem.cached is not None else (None, None)
    row = (problem.headdim + problem.headdim_v) * (stored or problem.dtype).itemsize
    room, multiprocessors = decoding.room_for(tiles, row, stored is not None, family), _multiprocessors(device)
    splits = splits or decode_splits(programs, longest, multiprocessors, room)
    return DecodeConfig(tiles, splits, append=append)


def _kind_of_cache(problem: Problem) -> str:
    """Which of the tables of `tuning.decoding` holds; those for pages would spill registers with scales by page."""
    cached = problem.cached
    if problem.dtype is torch.float32:
        return "single"
    kind = "half" if cached is None or cached.stored is None else "narrow"
    # Where a sequence is to get the same bits in pages and without, it gets the same tiles.
    paged = cached is not None and cached.page > 0 and not cached.by_page and not problem.batch_invariant
    return f"{kind}_paged" if paged else kind


@cache
def _multiprocessors(device: int | None) -> int:
    """None: the interpreter, which runs one program after the other."""
    return 1 if device is None else torch.cuda.get_device_properties(device).multi_processor_count


def kind_of(problem: Problem) -> str:
    """Which rows of the tuning tables hold (see `KINDS`)."""
    if problem.dtype is torch.float32:
        return "single"
    rest = region(problem.mask).rest
    if problem.scaled:
        return "eight_masked" if rest else "eight"
    if set(problem.modified) - {"sinks"}:
        return _kind_of_function(problem.score_mod) if problem.score_mod else "modified"
    packed = problem.varlen and not problem.batch_invariant
    return "masked" if rest else "packed" if packed else "half"


def _kind_of_function(score_mod: str) -> str:
    """Whether it reads tensors; numbers that it captures are loaded once."""
    return "table" if any(node.meta["val"].ndim for node in trace.graph(score_mod).captures) else "function"


def family_of(arch: str) -> str:
    """Which tables hold for an architecture; "" is the interpreter, which takes any."""
    if not arch:
        return "hopper"
    if arch.startswith("gfx"):
        return "cdna" if arch.startswith("gfx9") else "rdna"
    return {"9": "hopper", "10": "blackwell"}.get(arch.removeprefix("sm_")[:-1], "ampere")


@cache
def _launch() -> ModuleType:
    """Imported when first used: importing flashtile must not import triton."""
    from flashtile.backends.portable import launch

    return launch


@cache
def _cached() -> ModuleType:
    """As `_launch`, of calls over a KV cache."""
    from flashtile.backends.portable import cached

    return cached


def _backward(inputs: Inputs, problem: Problem, config: PortableConfig, *rest: Any) -> Gradients:
    *saved, memory = rest
    gradients: Gradients = _launch().backward(inputs, problem, config, *saved, memory=_kept(memory))
    return gradients


def _decode(
    inputs: Inputs, cache: CacheTensors, problem: Problem, config: DecodeConfig, memory: Memory
) -> tuple[Tensor, Tensor]:
    out_and_lse: tuple[Tensor, Tensor] = _cached().decode(inputs, cache, problem, config, memory=_kept(memory))
    return out_and_lse


def refuses_rounding(q: Tensor) -> str | None:
    """Rounds what the device, or for tests an emulator of one, converts by itself."""
    if interpreted():
        return "Triton's interpreter rounds nothing to 8-bit floats"
    if q.device.type != "cuda":
        return f"it runs on cuda, the tensors are on {q.device.type}"
    return None if _converts_eight_bits(facts.arch(q.device)) else "the GPU converts no float8_e4m3fn"


@cache
def _rounding() -> ModuleType:
    """As `_launch`, of rounding to 8 bits."""
    from flashtile.backends.portable import quantize

    return quantize


def _quantize(*arguments: Any) -> Any:
    return _rounding().quantize(*arguments)


def multiplies_eight_bits(dtype: torch.dtype, arch: str) -> bool:
    """Whether matrix instructions take this format: on Ada, Hopper and later, CDNA4; on CDNA3 in fnuz."""
    if arch.startswith("gfx"):
        return arch.startswith("gfx94" if dtype in _FNUZ else "gfx95")
    return dtype not in _FNUZ and _converts_eight_bits(arch)


def _converts_eight_bits(arch: str) -> bool:
    """Whether there are instructions from and to e4m3."""
    return int(arch[3:]) >= 89 if arch.startswith("sm_") else arch.startswith("gfx9")


def _kept(memory: Memory) -> Memory | None:
    """Interpreted launches leave nothing behind."""
    return None if interpreted() else memory


def _forward_eight(eight: str) -> Any:
    """The forward pass of 8-bit inputs; see `Meta.eight`."""

    def forward(inputs: Inputs, problem: Problem, config: PortableConfig, memory: Memory) -> tuple[Tensor, Tensor]:
        mode = eight if problem.scaled else ""
        out_and_lse: tuple[Tensor, Tensor] = _launch().forward(
            inputs, problem, config, memory=_kept(memory), eight=mode
        )
        return out_and_lse

    return forward


KERNELS = (
    Kernel("sweep", refuses, configure, _forward_eight("products"), _backward),
    Kernel("sweep_halves", refuses_halves, configure, _forward_eight("halves"), _backward),
)

DECODERS = (Decoder("split_keys", refuses_cached, configure_decoding, _decode),)

QUANTIZERS = (Quantizer("fused", refuses_rounding, _quantize),)
