"""The PyTorch backend: attention in tiled PyTorch operations, wherever PyTorch runs; the CPU's backend.

Two kernels. `aten_flash` is PyTorch's own CPU flash operator, for what it computes exactly as we do; `tiled` is the
sweep of this package and takes everything. Over a KV cache both walk one sequence after the other.
"""

from flashtile.backends import Decoder, Kernel, Quantizer
from flashtile.backends.pytorch import cached, native, packed, quantize, sweep


def unavailable() -> str | None:
    """PyTorch is always there."""
    return None


def builds() -> int:
    """PyTorch's operations are compiled already."""
    return 0


KERNELS = (
    Kernel("aten_flash", native.refuses, sweep.configure, *packed.over_sequences(native.forward, native.backward)),
    Kernel("tiled", sweep.refuses, sweep.configure, *packed.over_sequences(sweep.forward, sweep.backward)),
)

DECODERS = (
    Decoder("aten_flash", cached.refuses_native, sweep.configure, cached.decode_natively),
    Decoder("tiled", sweep.refuses, sweep.configure, cached.decode),
)

QUANTIZERS = (Quantizer("eager", lambda q: None, quantize.quantize),)
