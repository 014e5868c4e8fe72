"""What processes send and compute, for the cost model to be held against; apart from its test, for they import this."""

from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from flashtile import distributed, parts
from flashtile.bench import costs
from flashtile.bench.costs import BACKWARD, Work
from flashtile.distributed import balance, ring
from flashtile.distributed.scheme import ALL
from tests.distributed.jobs import mesh_of

COUNTED = Work(256, 8, 4, 64, element=4)


def counted(rank: int, ranks: int) -> dict[str, list[tuple[list[float], float]]]:
    """By scheme, of both passes: the bytes that this process waits for, message by message, and the flops of its
    products. What the processes compare before a call is left out."""
    found, bytes_of, flops = {}, list[float](), list[float]()
    start, all_to_all, gathered = ring.Exchange.start, dist.all_to_all_single, balance.gathered
    runs = {False: parts.forward, True: parts.backward}

    def arriving(exchange: ring.Exchange) -> ring.Exchange:
        bytes_of.append(sum(float(each.nbytes) for each in exchange.arriving or ()))
        return start(exchange)

    def dealt(arrived: Tensor, leaving: Tensor, group: Any) -> None:
        bytes_of.append(arrived.nbytes * (1 - 1 / group.size()))
        all_to_all(arrived, leaving, group=group)

    def collected(tensor: Tensor, group: Any) -> list[Tensor]:
        bytes_of.append(float(tensor.nbytes * (group.size() - 1)))
        return gathered(tensor, group)

    def computed(backward: bool, part: parts.Local, *rest: Any) -> Any:
        (_, rows, heads, width), keys = part.inputs.q.shape, part.inputs.k.shape[1]
        pairs = rows * keys / (1 if part.options.mask == ALL else 2)
        flops.append((BACKWARD if backward else 1) * 4 * pairs * heads * width)
        return runs[backward](part, *rest)

    patches = [
        mock.patch.object(ring.Exchange, "start", arriving),
        mock.patch.object(dist, "all_to_all_single", dealt),
        mock.patch.object(balance, "gathered", collected),
        mock.patch.object(parts, "forward", partial(computed, False)),
        mock.patch.object(parts, "backward", partial(computed, True)),
    ]
    heads = (COUNTED.heads, COUNTED.heads_kv, COUNTED.heads_kv)
    q, k, v = (torch.randn(1, COUNTED.seqlen // ranks, count, 64, requires_grad=True) for count in heads)
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        for scheme in costs.SCHEMES if ranks > 2 else costs.SCHEMES[:3]:
            mesh = mesh_of((ranks // 2, 2)) if scheme == "mixed" else None
            out = distributed.attention(q, k, v, mesh, scheme=scheme, causal=True)
            found[scheme] = [(list(bytes_of), sum(flops))]
            bytes_of.clear(), flops.clear()
            torch.autograd.grad(out.sum(), (q, k, v))
            found[scheme].append((list(bytes_of), sum(flops)))
            bytes_of.clear(), flops.clear()
    return found
