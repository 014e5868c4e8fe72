"""One call as JAX sees it: a function of arrays with a derivative and a rule for vmap.

`operands` maps names to arrays: q, k, v (batch, seqlen, heads, headdim), and of these, those that are there:
bias (batch or 1, heads or 1, seqlen_q or 1, seqlen_kv or 1), mask likewise, query_ids and key_ids (batch or 1, seqlen),
alibi_slopes (batch or 1, heads), sinks (heads,). `options` is JSON text: the plain arguments of `flashtile.attention`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from operator import and_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from jax import Array
from jax.custom_batching import custom_vmap
from torch import Tensor

import flashtile
from flashtile import masks
from flashtile.gradients import SOURCES, gradients
from flashtile.integrations.jax import ffi

FORWARD, BACKWARD = "flashtile_forward", "flashtile_backward"
DTYPES = {jnp.dtype(str(dtype).removeprefix("torch.")): dtype for dtype in ffi.DTYPES.values()}
Operands = dict[str, Array]


def arguments(tensors: dict[str, Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `flashtile.attention` beside q, k and v."""
    # One row for the whole batch is a vector there.
    vectors = ("query_ids", "key_ids", "alibi_slopes")
    known = {name: t[0] if name in vectors and t.shape[0] == 1 else t for name, t in tensors.items()}
    allowed = [masks.document(known["query_ids"], known["key_ids"])] if "query_ids" in known else []
    allowed += [masks.dense(known["mask"])] if "mask" in known else []
    rule = {"mask": reduce(and_, allowed)} if allowed else {}
    window = None if options["window"] is None else tuple(options["window"])
    return {**options, "window": window, **rule, **{name: known[name] for name in SOURCES[3:] if name in known}}


def _forward(operands: list[Tensor], results: list[Tensor], told: dict[str, Any]) -> None:
    named = dict(zip(told["operands"], operands, strict=True))
    chosen = arguments(named, told["options"])
    found = flashtile.attention(named["q"], named["k"], named["v"], return_lse=True, **chosen)
    for result, tensor in zip(results, found, strict=True):
        result.copy_(tensor)


def _backward(operands: list[Tensor], results: list[Tensor], told: dict[str, Any]) -> None:
    named = dict(zip(told["operands"], operands, strict=True))
    chosen = arguments(named, told["options"])
    for name in told["wanted"]:
        if name in chosen:
            chosen[name].requires_grad_()
    saved = named["out"], named["lse"], named["grad_out"]
    found = gradients(named["q"], named["k"], named["v"], *saved, grad_lse=named.get("grad_lse"), **chosen)
    made = dict(zip(SOURCES, found, strict=True))
    for result, name in zip(results, told["wanted"], strict=True):
        result.copy_(made[name])


ffi.register(FORWARD, _forward)
ffi.register(BACKWARD, _backward)


def shapes(operands: Operands, options: str) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """(out, lse), by flashtile itself on tensors without numbers, which checks the arguments on the way."""
    meta = {
        name: torch.empty(array.shape, dtype=DTYPES[array.dtype], device="meta") for name, array in operands.items()
    }
    chosen = arguments(meta, json.loads(options))
    out, lse = flashtile.attention(meta["q"], meta["k"], meta["v"], return_lse=True, **chosen)
    return _like(out), _like(lse)


def _like(tensor: Tensor) -> jax.ShapeDtypeStruct:
    dtype = next(name for name, known in DTYPES.items() if known is tensor.dtype)
    return jax.ShapeDtypeStruct(tuple(tensor.shape), dtype)


def _varying(*arrays: Any) -> frozenset[Any]:
    """The axes of the mesh along which arrays differ, inside a shard_map that keeps count of them."""
    return frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))


def _vary(array: Array, axes: frozenset[Any]) -> Array:
    """The same array, counted as one that differs along these axes."""
    missing = tuple(sorted(axes - _varying(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def _call(target: str, results: Any, operands: Operands, options: str, **more: Any) -> list[Array]:
    told = json.dumps({"operands": list(operands), "options": json.loads(options), **more}, sort_keys=True)
    axes = _varying(*operands.values())
    found = jax.ffi.ffi_call(target, results)(*(_vary(array, axes) for array in operands.values()), told=told)
    return [_vary(array, axes) for array in found]


@dataclass(frozen=True)
class _Target:
    """What XLA is to call. wanted: the operands whose gradients are the results; empty in the forward pass."""

    options: str
    wanted: tuple[str, ...] = ()

    def __call__(self, operands: Operands) -> Any:
        if not self.wanted:
            return tuple(_call(FORWARD, shapes(operands, self.options), operands, self.options))
        results = [jax.ShapeDtypeStruct(operands[name].shape, operands[name].dtype) for name in self.wanted]
        found = _call(BACKWARD, results, operands, self.options, wanted=self.wanted)
        return dict(zip(self.wanted, found, strict=True))

    def batchable(self) -> Callable[[Operands], Any]:
        """The call under vmap's rule."""
        call = custom_vmap(self.__call__)

        @call.def_vmap
        def rule(size: int, in_batched: Any, operands: Operands) -> Any:
            (batched,) = in_batched
            single = "sinks" in operands and (batched["sinks"] or "sinks" in self.wanted)
            found = (_one_by_one if single else self._together)(call, size, batched, operands)
            return found, jax.tree.map(lambda _: True, found)

        return call

    def _together(self, call: Any, size: int, batched: dict[str, bool], operands: Operands) -> Any:
        """vmap's axis joins the batch; gradients are parted again, also where all entries share an operand."""
        batch = operands["q"].shape[int(batched["q"])]
        own = ("q", "k", "v", "out", "lse", "grad_out", "grad_lse", *self.wanted)
        joined = {
            name: array if name == "sinks" else _joined(array, batched[name], (size, batch), name in own)
            for name, array in operands.items()
        }
        found = jax.tree.map(lambda array: array.reshape(size, batch, *array.shape[1:]), call(joined))
        if self.wanted:
            shared = {name: operands[name].shape[int(batched[name])] < batch for name in self.wanted}
            found = {name: g.sum(1, keepdims=True) if shared[name] else g for name, g in found.items()}
        return found


def _one_by_one(call: Any, size: int, batched: dict[str, bool], operands: Operands) -> Any:
    """A call knows one set of sinks: an entry after the other."""
    moving = {name: array for name, array in operands.items() if batched[name]}
    # The order of operands is that of their names in the call.
    return jax.lax.map(lambda entry: call({name: entry.get(name, operands[name]) for name in operands}), moving)


def _joined(array: Array, batched: bool, sizes: tuple[int, int], own: bool) -> Array:
    """(size * batch, ...) of an operand; one row, which all share, stays one where it has no row of its `own`."""
    rows = array.shape[int(batched)]
    if not batched and rows == 1 and not own:
        return array
    rest = array.shape[int(batched) + 1 :]
    spread = array if batched else array[None]
    return jnp.broadcast_to(spread, (*sizes, *rest)).reshape(sizes[0] * sizes[1], *rest)


class Call(NamedTuple):
    """What is fixed when a call is traced. constant: the operands that get no gradients."""

    options: str
    constant: tuple[str, ...]
    return_lse: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(call: Call, operands: Operands) -> tuple[Array, Array]:
    """(out, lse); without return_lse the gradient of lse is taken to be 0."""
    found: tuple[Array, Array] = _Target(call.options).batchable()(operands)
    return found


def _attend_forward(call: Call, operands: Operands) -> Any:
    out, lse = attend(call, operands)
    return (out, lse), (operands, out, lse)


def _attend_backward(call: Call, kept: Any, grads: tuple[Array, Array]) -> tuple[Any]:
    given, out, lse = kept
    operands = {**given, "out": out, "lse": lse, "grad_out": grads[0]}
    if call.return_lse:
        operands["grad_lse"] = grads[1]
    wanted = tuple(name for name in SOURCES if name in given and name not in call.constant)
    found = _Target(call.options, wanted).batchable()(operands)
    return ({name: _summed(found[name], array) if name in found else None for name, array in given.items()},)


def _summed(gradient: Array, operand: Array) -> Array:
    """What devices share, as a bias along the batch's axis of the mesh, gets the sum of their gradients."""
    axes = _varying(gradient) - _varying(operand)
    return jax.lax.psum(gradient, tuple(sorted(axes))) if axes else gradient


attend.defvjp(_attend_forward, _attend_backward)
