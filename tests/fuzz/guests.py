"""Random calls of the functions that stand in for other libraries' ones, against those libraries' formulas."""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import flashtile
from flashtile.integrations.evoformer import evoformer_attention
from tests.fuzz.where import Where
from tests.integrations.rule import assert_close
from tests.problems import Draw

LENGTHS, WIDTH = st.integers(1, 40), st.sampled_from((1, 4, 8, 16))
DTYPES = st.sampled_from((torch.float32, torch.float32, torch.float64))
"""The rule for guests has no slack for searches; half precision has its own tests. No size is 0: PyTorch's
formula then forgets the sizes that key and value alone have."""


@dataclass(frozen=True)
class SdpaCall:
    """Shapes of query, key and value (leading dimensions, heads, length, width), of the mask, and the options."""

    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    mask: tuple[int, ...] | None
    bool_mask: bool
    dtype: torch.dtype
    causal: bool
    scale: float | None
    grouped: bool


@st.composite
def sdpa_calls(draw: Any, where: Where) -> SdpaCall:
    leading = draw(st.lists(st.integers(1, 3), max_size=2))
    heads = draw(st.integers(1, 4))
    grouped = draw(st.booleans())
    heads_kv = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0])) if grouped else heads
    lengths, widths = (draw(LENGTHS), draw(LENGTHS)), (draw(WIDTH), draw(WIDTH))

    def narrowed(sizes: list[int]) -> list[int]:
        """Some sizes 1, which broadcast."""
        return [1 if draw(st.integers(0, 5)) == 0 else size for size in sizes]

    def tensor(count: int, length: int, width: int) -> tuple[int, ...]:
        front = narrowed([*leading]) + ([count] if grouped else narrowed([count]))
        return (*front, length, width)

    shapes = (
        tensor(heads, lengths[0], widths[0]),
        tensor(heads_kv, lengths[1], widths[0]),
        tensor(heads_kv, lengths[1], widths[1]),
    )
    full = [*leading, heads, *lengths]
    mask = narrowed(full)[draw(st.integers(0, len(full) - 2)) :] if draw(st.booleans()) else None
    options = (draw(st.booleans()), draw(DTYPES), draw(st.booleans()), draw(st.sampled_from((None, 0.3, 1.0))))
    return SdpaCall(shapes, None if mask is None else tuple(mask), *options, grouped)


def check_sdpa(call: SdpaCall, where: Where) -> bool:
    """What PyTorch refuses must be refused, and everything else be what its formula gives."""
    draw = Draw(repr(call), where.tensors)
    leaves = {
        name: draw.normal(*shape).to(call.dtype)
        for name, shape in zip(("query", "key", "value"), call.shapes, strict=True)
    }
    if call.mask is not None:
        mask = draw.normal(*call.mask)
        leaves["attn_mask"] = mask > -0.5 if call.bool_mask else mask.to(call.dtype)
    options = {"is_causal": call.causal, "scale": call.scale, "enable_gqa": call.grouped}
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            truth = _results(F.scaled_dot_product_attention, leaves, torch.float64, options)
            textbook = _results(F.scaled_dot_product_attention, leaves, call.dtype, options)
    except RuntimeError:
        # Another of PyTorch's kernels may take it all the same.
        _as_pytorch(leaves, options)
        return False
    found = _results(flashtile.sdpa, leaves, call.dtype, options)
    for name, *three in zip(("out", *(f"d{name}" for name in leaves)), found, textbook, truth, strict=False):
        # Sums of many products cancel: what was added up is of the size of the inputs.
        assert_close(*three, name, scale=64.0)
    return True


def _as_pytorch(leaves: dict[str, Tensor], options: dict[str, Any]) -> None:
    """What PyTorch's function takes `sdpa` takes too, and gives the same; it may take more."""
    try:
        wanted = F.scaled_dot_product_attention(*leaves.values(), **options)
    except RuntimeError:
        with contextlib.suppress(RuntimeError):
            flashtile.sdpa(*leaves.values(), **options)
        return
    assert_close(flashtile.sdpa(*leaves.values(), **options), wanted, wanted, scale=64.0)


def _results(function: Any, leaves: dict[str, Tensor], dtype: torch.dtype, options: dict[str, Any]) -> list[Tensor]:
    """The output, and the gradients of the floating leaves for a fixed gradient of it."""
    used = [leaf.detach().to(dtype).requires_grad_() if leaf.is_floating_point() else leaf for leaf in leaves.values()]
    out = function(*used, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).sin().reshape(out.shape)
    wanted = [leaf for leaf in used if leaf.requires_grad]
    found = torch.autograd.grad((out * weights.to(out.dtype)).sum(), wanted, allow_unused=True)
    zeros = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(wanted, found, strict=True)]
    return [out, *zeros]


@dataclass(frozen=True)
class EvoformerCall:
    """leading: dimensions before the rows. biases: in their order; None stands for one that is not there."""

    leading: tuple[int, ...]
    sizes: tuple[int, int, int, int, int]
    biases: tuple[str | None, ...]
    dtype: torch.dtype
    masked: bool


def evoformer_calls(where: Where) -> st.SearchStrategy[EvoformerCall]:
    orders = ((), ("keys",), ("pairs",), ("keys", "pairs"), ("pairs", "keys"), (None, "pairs"), ("keys", None))
    count = st.integers(1, 3)
    return st.builds(
        EvoformerCall,
        st.lists(st.integers(0, 2), max_size=2).map(tuple),
        st.tuples(count, st.integers(1, 30), st.integers(1, 30), count, st.sampled_from((4, 8, 16))),
        st.sampled_from(orders),
        DTYPES,
        st.booleans(),
    )


def check_evoformer(call: EvoformerCall, where: Where) -> bool:
    draw, (rows, queries, keys, heads, width) = Draw(repr(call), where.tensors), call.sizes
    shapes: dict[str, tuple[int, ...]] = {
        "q": (rows, queries, heads, width),
        "k": (rows, keys, heads, width),
        "v": (rows, keys, heads, width),
        "keys": (rows, 1, 1, keys),
        "pairs": (1, heads, queries, keys),
    }
    names = ["q", "k", "v", *(name for name in call.biases if name is not None)]
    leaves = {name: draw.normal(*call.leading, *shapes[name]).to(call.dtype) for name in names}
    # In float64 the formula itself loses what -1e9 swallows, and nothing is left to measure that by.
    if call.masked and "keys" in leaves and call.dtype is torch.float32:
        leaves["keys"] = torch.where(leaves["keys"] > -0.5, 0.0, -1e9).to(call.dtype)
        leaves["keys"][..., 0] = 0.0  # a row of -1e9 alone has lost its scores

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        def ordered(*tensors: Tensor) -> Tensor:
            given = dict(zip(names, tensors, strict=True))
            out: Tensor = function(*tensors[:3], [None if name is None else given[name] for name in call.biases])
            return out

        return _results(ordered, leaves, dtype, {})

    found, textbook = run(evoformer_attention, call.dtype), run(_evoformer, call.dtype)
    truth = run(_evoformer, torch.float64)
    for name, *three in zip(("out", *(f"d{name}" for name in names)), found, textbook, truth, strict=True):
        assert_close(*three, name, scale=64.0)
    return True


def _evoformer(q: Tensor, k: Tensor, v: Tensor, biases: list[Tensor | None]) -> Tensor:
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) * q.shape[-1] ** -0.5
    for bias in biases:
        scores = scores if bias is None else scores + bias
    return torch.einsum("...hqk,...khd->...qhd", torch.softmax(scores, dim=-1), v)
