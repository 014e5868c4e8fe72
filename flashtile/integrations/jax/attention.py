"""The public function: what its arguments mean, and the one layout that `transforms` works on."""

import json
import math
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike

from flashtile.check import guests as check
from flashtile.integrations.jax.transforms import DTYPES, Call, Operands, attend
from flashtile.masks import Alignment


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    *,
    segment_ids: ArrayLike | tuple[ArrayLike, ArrayLike] | None = None,
    mask: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    sinks: ArrayLike | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    alignment: Alignment = "bottom_right",
    return_lse: bool = False,
    constant: Collection[str] = (),
    backend: str | None = None,
) -> Any:
    """Exact attention of JAX arrays by flashtile's kernels, on the CPU and on NVIDIA GPUs.

    Goes under jit, grad, vmap, shard_map, scan and checkpoint. Gradients reach q, k, v, bias, alibi_slopes and sinks;
    there is no second derivative and no forward mode.

    Args:
        q: (..., seqlen_q, heads, headdim), any number of leading dimensions, floating.
        k: (..., seqlen_kv, heads_kv, headdim), v: (..., seqlen_kv, heads_kv, headdim_v), leading dimensions and dtype
            as q's, heads_kv a divisor of heads.
        segment_ids: integers (..., seqlen) or (seqlen,), or two such arrays, of queries and of keys: a query sees the
            keys of its own segment.
        mask: bool, broadcasts to (..., heads, seqlen_q, seqlen_kv), True where a query may attend.
        bias: broadcasts to the same, any float dtype; added to the scaled scores.
        alibi_slopes: (heads,); sinks: (heads,). These and causal, window, softcap, scale, alignment and backend as in
            `flashtile.attention`.
        constant: those of "bias", "alibi_slopes" and "sinks" whose gradient is 0 and is not computed, which spares the
            backward pass the work: JAX does not tell it what is asked for.
        return_lse: return (out, lse) instead of out; lse has a gradient.

    Returns:
        out (..., seqlen_q, heads, headdim_v) in q's dtype; with return_lse, (out, lse) where lse is
        (..., heads, seqlen_q), float32 (float64 for float64 inputs), natural logarithm.

    Raises:
        TypeError, ValueError: an argument is not as described; when the function is traced, before anything runs.
    """
    given = {"q": q, "k": k, "v": v, "mask": mask, "bias": bias, "alibi_slopes": alibi_slopes, "sinks": sinks}
    arrays = {name: jnp.asarray(value) for name, value in given.items() if value is not None}
    if segment_ids is not None:
        both = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        check.jax_pair(both)
        arrays |= {name: jnp.asarray(ids) for name, ids in zip(("query_ids", "key_ids"), both, strict=True)}
    known = [dtype.name for dtype in DTYPES]
    check.jax_arrays({name: (tuple(array.shape), array.dtype.name) for name, array in arrays.items()}, known)
    check.jax_constants(constant)
    leading = arrays["q"].shape[:-3]
    plain = {"causal": causal, "window": window, "softcap": softcap, "scale": scale, "alignment": alignment}
    options = {**plain, "backend": backend}
    call = Call(json.dumps(options), tuple(sorted(constant)), return_lse)
    out, lse = attend(call, _flat(arrays, leading))
    out, lse = out.reshape(*leading, *out.shape[1:]), lse.reshape(*leading, *lse.shape[1:])
    return (out, lse) if return_lse else out


def _flat(arrays: Operands, leading: tuple[int, ...]) -> Operands:
    """The operands with one batch dimension; what all entries share has one row there."""
    flat: Operands = {}
    for name, array in arrays.items():
        if name == "sinks":
            flat[name] = array
            continue
        # q, k, v and tables have three dimensions behind the batch, segment ids and slopes one.
        own = 1 if name in ("query_ids", "key_ids", "alibi_slopes") else 3
        rest = (*(1,) * (own - array.ndim), *array.shape[-own:])
        rows = array.shape[: max(0, array.ndim - own)]
        shared = name not in "qkv" and all(length == 1 for length in rows)
        spread = array if shared else jnp.broadcast_to(array, (*leading, *rest))
        flat[name] = spread.reshape(1 if shared else math.prod(leading), *rest)
    return flat
