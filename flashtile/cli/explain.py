"""`flashtile explain`: which backend, kernel and tiles a call would use."""

import argparse
from typing import Any

from flashtile.cli.common import DTYPES, USUAL_DEVICE, UsageError, add_command, usual_device


def add_explain(commands: Any) -> None:
    """The command and its options."""
    command = add_command(
        commands, "explain", _explain, "which backend, kernel and tiles a call would use, and why none faster"
    )
    for name, value in (("batch", 1), ("seqlen-q", 1024), ("heads", 8), ("headdim", 64)):
        command.add_argument(f"--{name}", type=int, default=value, metavar="N", help=f"default {value}")
    for name, other in (("seqlen-kv", "seqlen-q"), ("heads-kv", "heads"), ("headdim-v", "headdim")):
        command.add_argument(f"--{name}", type=int, metavar="N", help=f"default: {other}")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="default %(default)s")
    command.add_argument("--device", help=USUAL_DEVICE)
    command.add_argument("--causal", action="store_true")
    command.add_argument("--window", nargs=2, type=_limit, metavar=("LEFT", "RIGHT"), help="keys, or none for no limit")
    command.add_argument("--documents", type=int, metavar="N", help="N packed documents of equal length")
    command.add_argument("--softcap", type=float)
    command.add_argument("--alibi", action="store_true", help="ALiBi slopes")
    command.add_argument("--bias", action="store_true", help="a bias (1, heads, seqlen_q, seqlen_kv)")
    command.add_argument("--sinks", action="store_true", help="a sink logit a head")
    command.add_argument("--dropout-p", type=float, default=0.0)
    command.add_argument("--alignment", choices=("bottom_right", "top_left"), default="bottom_right")
    command.add_argument("--deterministic", action="store_true")
    command.add_argument("--batch-invariant", action="store_true")
    command.add_argument("--backend", help="insist on this one")


def _limit(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _explain(given: argparse.Namespace) -> int:
    import torch

    import flashtile

    if given.documents is not None and given.documents < 1:
        raise UsageError(f"--documents: got {given.documents}, need at least 1")
    keys, heads_kv = given.seqlen_kv or given.seqlen_q, given.heads_kv or given.heads
    make = {"dtype": getattr(torch, given.dtype), "device": given.device or usual_device()}
    try:
        # The tensors are only described, never read: their memory is not touched.
        q = torch.empty(given.batch, given.seqlen_q, given.heads, given.headdim, **make)
        k = torch.empty(given.batch, keys, heads_kv, given.headdim, **make)
        v = torch.empty(given.batch, keys, heads_kv, given.headdim_v or given.headdim, **make)
        flashtile.explain(q, k, v, **_explain_options(given, q, k))
    except (TypeError, ValueError, NotImplementedError, RuntimeError, AssertionError) as error:
        # AssertionError: what torch raises where it was built without the device that was asked for.
        raise UsageError(str(error).splitlines()[0]) from error
    return 0


def _explain_options(given: argparse.Namespace, q: Any, k: Any) -> dict[str, Any]:
    """The options as keyword arguments of `flashtile.explain`."""
    import torch

    from flashtile import masks

    heads, documents = given.heads, None
    if given.documents:
        documents = masks.document(
            *(torch.arange(n, device=q.device) * given.documents // n for n in (len(q[0]), len(k[0])))
        )
    return {
        "causal": given.causal,
        "window": tuple(given.window) if given.window else None,
        "mask": documents,
        "softcap": given.softcap,
        "alibi_slopes": torch.ones(heads, device=q.device) if given.alibi else None,
        "bias": q.new_empty(1, heads, q.shape[1], k.shape[1]) if given.bias else None,
        "sinks": torch.zeros(heads, device=q.device) if given.sinks else None,
        "dropout_p": given.dropout_p,
        "alignment": given.alignment,
        "deterministic": given.deterministic or None,
        "batch_invariant": given.batch_invariant,
        "backend": given.backend,
    }
