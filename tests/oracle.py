"""The oracle: one call run through the library, through the float64 reference, and through the textbook formula.

Tolerance. The textbook formula evaluated in the input's own dtype (what a plain model would compute) has some error
against float64; the library may have twice that error, plus one unit in the last place of the result's dtype at the
largest value, plus a few rounding errors of the accumulator (for results that cancel to almost nothing). This holds

- for the largest error of each tensor: out, lse and every gradient;
- for the root mean square error of each 64-row block of each head, so that a small wrong region cannot hide in a
  large tensor.

The log-sum-exp never leaves the accumulator, so it is compared with the textbook formula in float32. Where the inputs
are half precision it may err by a sixteenth of their rounding: the weights exp(score - lse) are rounded more coarsely.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import flashtile
from flashtile import State, reference
from tests.problems import Call, Shape, Tensors

ROWS = 64
ROUNDINGS = 8
"""Rounding errors of the accumulator that a result may carry whatever the textbook formula does."""
FLIPS = ((), (-1,), (-2,), (-1, -2))
"""The textbook formula's gradients are measured four times, for incoming gradients flipped along these dimensions: the
error of a result of few numbers (a slope's gradient) is one throw of the dice."""
Truth = tuple[Tensors, dict[str, list[Tensor]]]
LSE_SHARE = 1 / 16
"""How much of a half-precision input's rounding error the log-sum-exp may carry."""


@dataclass(frozen=True)
class Ratio:
    """Measured error over allowed error, largest over tensors or blocks; above 1 is a failure."""

    name: str
    error: float
    allowed: float

    @property
    def value(self) -> float:
        return self.error / self.allowed if self.allowed else float(self.error > 0)


def ours(call: Call, backend: str | None = None, **more: Any) -> Tensors:
    """The library's out, lse and gradients."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in call.leaves.items()}
    arguments = {**call.arguments(leaves), **more, "return_lse": True, "backend": backend}
    tensors = (leaves["q"], leaves["k"], leaves["v"])
    if call.shape.packed:
        state = flashtile.attention_varlen(*tensors, **call.packing(), **arguments)
    else:
        state = flashtile.attention(*tensors, **arguments)
    return _results(state, leaves, call)


def expected(call: Call) -> Tensors:
    """The reference's out, lse and gradients in float64."""
    return _reference(call, torch.float64, FLIPS[:1])[0]


def _reference(call: Call, dtype: torch.dtype | None, flips: Sequence[tuple[int, ...]]) -> list[Tensors]:
    """Results in `dtype` (None: the input's own), one for each way of flipping the call's gradients."""
    leaves = {
        name: leaf.detach().clone().to(dtype or leaf.dtype).requires_grad_() for name, leaf in call.leaves.items()
    }
    compute = _packed_reference if call.shape.packed else _dense_reference
    state = compute(call, leaves, dtype)
    return [_results(state, leaves, call, dims) for dims in flips]


def _results(state: State, leaves: Tensors, call: Call, flips: tuple[int, ...] = ()) -> Tensors:
    """out, lse and the gradients of `leaves` for the call's gradients, flipped along some dimensions."""
    outputs = [(state.out, call.grads["out"].flip(flips))]
    if "lse" in call.grads:
        outputs.append((state.lse, call.grads["lse"].flip(flips)))
    # Without keys the reference's lse is a constant.
    differentiable = [(value, grad.to(value.dtype)) for value, grad in outputs if value.requires_grad]
    values, grads = zip(*differentiable, strict=True)
    found = torch.autograd.grad(values, list(leaves.values()), grads, allow_unused=True, retain_graph=True)
    results = {"out": state.out.detach(), "lse": state.lse.detach()}
    for (name, leaf), grad in zip(leaves.items(), found, strict=True):
        results[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def _dense_reference(call: Call, leaves: Tensors, dtype: torch.dtype | None) -> State:
    return reference.attention(leaves["q"], leaves["k"], leaves["v"], dtype=dtype, **call.specification(leaves))


def _packed_reference(call: Call, leaves: Tensors, dtype: torch.dtype | None) -> State:
    """Sequence i as the last entry of a batch of i + 1, so that everything that reads the batch index sees i."""
    assert call.shape.lengths_q is not None
    assert call.shape.lengths_kv is not None
    q, k, v = leaves["q"], leaves["k"], leaves["v"]
    outs, lses, first_q, first_kv = [], [], 0, 0
    options = call.specification(leaves)
    for index, (length_q, length_kv) in enumerate(zip(call.shape.lengths_q, call.shape.lengths_kv, strict=True)):
        count_q = call.shape.used_q[index] if call.shape.used_q else length_q
        count_kv = call.shape.used_kv[index] if call.shape.used_kv else length_kv
        rows, keys = slice(first_q, first_q + count_q), slice(first_kv, first_kv + count_kv)
        stacked = [tensor.expand(index + 1, *tensor.shape) for tensor in (q[rows], k[keys], v[keys])]
        state = reference.attention(*stacked, dtype=dtype, **_cut(options, index, count_q, count_kv))
        padding = length_q - count_q
        outs.append(torch.nn.functional.pad(state.out[index], (0, 0, 0, 0, 0, padding)))
        lses.append(torch.nn.functional.pad(state.lse[index], (0, padding), value=-torch.inf))
        first_q, first_kv = first_q + length_q, first_kv + length_kv
    if not outs:
        empty = q.new_zeros(0, q.shape[1], v.shape[2]) + 0 * (q.sum() + k.sum() + v.sum())
        return State(empty, empty[..., 0].transpose(0, 1))
    return State(torch.cat(outs), torch.cat(lses, dim=-1))


def _cut(options: dict[str, Any], index: int, rows: int, keys: int) -> dict[str, Any]:
    """Tables made for the longest sequence, cut to this one and to the batch of `_packed_reference`."""
    options = dict(options)
    if "bias" in options:
        bias = options["bias"]
        bias = bias[: index + 1] if bias.shape[0] > 1 else bias
        bias = bias[:, :, :rows] if bias.shape[2] > 1 else bias
        options["bias"] = bias[..., :keys] if bias.shape[3] > 1 else bias
    if "alibi_slopes" in options and options["alibi_slopes"].ndim == 2:
        options["alibi_slopes"] = options["alibi_slopes"][: index + 1]
    return options


def check(call: Call, backend: str | None = None, slack: float = 1.0, **more: Any) -> list[Ratio]:
    """Runs the call everywhere and asserts the tolerance rule; returns what was measured."""
    return compare(ours(call, backend, **more), call, slack)


def compare(
    found: Tensors,
    call: Call,
    slack: float = 1.0,
    known: Truth | None = None,
    inherent: dict[str, float] | None = None,
) -> list[Ratio]:
    """Asserts that `found` (as `ours` returns it) obeys the tolerance rule.

    slack: how many times the allowed error still passes. Only for random searches, which look for wrong results among
    thousands of tiny problems and meet the tails of the errors' distribution on the way.
    known: the call's `truth_and_textbook`, where several ways to compute one call are compared.
    inherent: absolute errors that results carry whatever is done, beside those of the textbook formula.
    """
    truth, textbook = known or truth_and_textbook(call)
    ratios = []
    for name, value in found.items():
        extra = LSE_SHARE * torch.finfo(call.leaves["q"].dtype).eps if name == "lse" and call.half else 0.0
        extra += (inherent or {}).get(name, 0.0)
        ratios += compare_one(name, value, truth[name], textbook[name], call.shape, extra)
    worst = max(ratios, key=lambda ratio: ratio.value, default=Ratio("nothing", 0.0, 1.0))
    assert worst.value <= slack, f"{worst.name}: error {worst.error:.3e}, allowed {worst.allowed:.3e}"
    return ratios


def truth_and_textbook(call: Call) -> Truth:
    """(float64 results, the textbook formula's errors in each run)."""
    truths = _reference(call, torch.float64, FLIPS)
    dtype = call.leaves["q"].dtype
    single = replace(call, leaves={name: leaf.float() for name, leaf in call.leaves.items()})
    runs = _reference(single if dtype is torch.float64 else call, None, FLIPS)
    if call.half:
        lse = _reference(single, None, FLIPS[:1])[0]["lse"]
        runs = [{**run, "lse": lse} for run in runs]
    # Nothing is more exact than float64: its textbook errors are those of float32, scaled down.
    shrink = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if dtype is torch.float64 else 1.0
    errors = {
        name: [_error(run[name], truth[name]) * shrink for run, truth in zip(runs, truths, strict=True)]
        for name in truths[0]
    }
    return truths[0], errors


def _error(value: Tensor, truth: Tensor) -> Tensor:
    """The difference; 0 where the truth is -inf, which is compared by itself."""
    return torch.where(truth == -torch.inf, 0.0, value.double() - truth)


def compare_one(
    name: str, value: Tensor, truth: Tensor, textbook: list[Tensor], shape: Shape, extra: float
) -> list[Ratio]:
    """Measured and allowed errors of one tensor; `textbook`: the textbook formula's errors."""
    assert value.shape == truth.shape, f"{name}: shape {tuple(value.shape)}, need {tuple(truth.shape)}"
    assert torch.equal(value == -torch.inf, truth == -torch.inf), f"{name}: -inf in the wrong places"
    error = _error(value, truth)
    assert bool(error.isfinite().all()), f"{name}: {int((~error.isfinite()).sum())} values are not finite"
    if truth.numel() == 0:
        return []
    largest = float(torch.where(truth == -torch.inf, 0.0, truth).abs().max())
    wide = torch.float64 if value.dtype is torch.float64 else torch.float32
    scale = max(1.0, largest, _cancelled(truth, shape) if name.startswith("d") else 0.0)
    floor = torch.finfo(value.dtype).eps * largest + ROUNDINGS * torch.finfo(wide).eps * scale + extra
    ratios = [Ratio(name, float(error.abs().max()), 2 * max(float(run.abs().max()) for run in textbook) + floor)]
    rms = _block_rms(name, error, shape)
    allowed = 2 * torch.stack([_block_rms(name, run, shape) for run in textbook]).amax(dim=0) + floor
    worst = int((rms / allowed).argmax())
    ratios.append(Ratio(f"{name} (block {worst})", float(rms[worst]), float(allowed[worst])))
    return ratios


def _cancelled(gradient: Tensor, shape: Shape) -> float:
    """The size of what may cancel to almost nothing in a gradient, for inputs that are standard normal.

    Score gradients are differences of dot products of headdim_v terms; a gradient smaller than the scores has summed
    those of many rows, whose rounding errors add up like steps of a random walk.
    """
    rows = shape.batch * shape.heads * shape.seqlen_q / max(1, gradient.numel())
    return float((shape.headdim_v * max(1.0, rows)) ** 0.5)


def _block_rms(name: str, error: Tensor, shape: Shape) -> Tensor:
    """Root mean square per (batch entry, head, 64 rows): 1-d. Tensors without rows are one block."""
    if name in ("out", "dq", "dk", "dv"):
        blocks = _cut_rows(error.transpose(-2, -3))
    elif name == "lse":
        blocks = _cut_rows(error[..., None])
    elif name == "dbias":
        blocks = _cut_rows(error)
    else:
        blocks = error.reshape(1, -1)
    return blocks.square().mean(dim=-1).sqrt()


def _cut_rows(error: Tensor) -> Tensor:
    """(..., rows, columns) -> (blocks, entries), short last blocks padded with zeros that do not count."""
    rows = error.shape[-2]
    pieces = [part.flatten(-2) for part in error.split(ROWS, dim=-2)]
    scaled = [part * (pieces[0].shape[-1] / part.shape[-1]) ** 0.5 for part in pieces] if rows else []
    width = pieces[0].shape[-1]
    padded = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in scaled]
    return torch.stack(padded, dim=-2).reshape(-1, width)


def assert_close(found: Tensor, wanted: Tensor, roundings: float = ROUNDINGS) -> None:
    """Equal but for `roundings` roundings of the found tensor's dtype, relative to the largest value wanted."""
    assert found.shape == wanted.shape, f"shape {tuple(found.shape)}, need {tuple(wanted.shape)}"
    found, wanted = found.detach(), wanted.detach()
    finite = wanted.isfinite()
    assert torch.equal(found.isfinite(), finite), "not finite in the wrong places"
    assert torch.equal(found[~finite].double(), wanted[~finite].double()), "infinities differ"
    largest = max(1.0, float(wanted[finite].abs().max())) if finite.any() else 1.0
    error = float((found[finite].double() - wanted[finite].double()).abs().max()) if finite.any() else 0.0
    allowed = roundings * torch.finfo(found.dtype).eps * largest
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def assert_equal_bits(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Bit for bit the same."""
    for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert one.dtype == other.dtype, f"{index}: {one.dtype} and {other.dtype}"
        assert torch.equal(one, other), f"{index}: largest difference {float((one - other).abs().max()):.3e}"


def dense_mask(
    mask_mod: Callable[..., Any], sizes: tuple[int, int, int, int], index: Callable[[int], Any] = int
) -> Tensor:
    """A mask function called on every single index: bool (batch, heads, q, kv). `index` makes an index from an int."""
    table = torch.zeros(sizes, dtype=torch.bool)
    places = [[index(i) for i in range(size)] for size in sizes]
    flat = [bool(mask_mod(*where)) for where in itertools.product(*places)]
    return table if not flat else torch.tensor(flat).view(sizes)
