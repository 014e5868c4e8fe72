"""Requests with different numbers of new tokens over one paged cache, which is what a serving engine runs at each step.

`attention_kvcache` takes as many queries of every sequence. Requests are therefore grouped by how many tokens they
bring: all that decode are one call, and prompts of one length another.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile.api import attention_kvcache


class Group(NamedTuple):
    """Requests with as many queries each. rows: (requests, queries), where in the batch's tokens these lie.

    lengths: (requests,), keys of each, new ones included; table: (requests, pages), the pages that hold them.
    """

    rows: Tensor
    lengths: Tensor
    table: Tensor


def grouped(starts: Sequence[int], lengths: Tensor, table: Tensor) -> list[Group]:
    """The groups of a batch; made once a step, for all layers.

    Args:
        starts: where the tokens of each request begin, and where the last ones end; known to the host.
        lengths: (requests,), keys of each request, new ones included, on the device.
        table: (requests, pages), on the device.
    """
    by_count: dict[int, list[int]] = {}
    for request, (begin, end) in enumerate(pairwise(starts)):
        if end > begin:
            by_count.setdefault(end - begin, []).append(request)
    groups = []
    for count, requests in by_count.items():
        firsts = torch.tensor([starts[request] for request in requests], device=lengths.device)
        chosen = torch.tensor(requests, device=lengths.device)
        rows = firsts[:, None] + torch.arange(count, device=lengths.device)
        groups.append(Group(rows, lengths[chosen], table[chosen]))
    return groups


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    groups: Sequence[Group],
    out: Tensor,
    lse: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Attention of every token to the keys of its request, causal by default; writes to `out` and returns it.

    Args:
        q: (tokens, heads, headdim). k_cache, v_cache: (pages, page_size, heads_kv, headdim or headdim_v), which hold
            the new keys and values already.
        out: (tokens, heads, headdim_v); rows of no request stay as they are.
        lse: (heads, tokens), float32: is written too, if given.
        options: what `attention_kvcache` takes.
    """
    for rows, lengths, table in groups:
        places = rows.flatten()
        where: Any = {"cache_seqlens": lengths, "block_table": table, "return_lse": True}
        found = attention_kvcache(q[places].unflatten(0, rows.shape), k_cache, v_cache, **where, **options)
        out[places] = found.out.flatten(0, 1)
        if lse is not None:
            lse[:, places] = found.lse.transpose(0, 1).flatten(1)
    return out
