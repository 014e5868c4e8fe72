"""Context parallelism: sequences longer than one GPU, over torch.distributed.

Every process holds some tokens of a sequence (`shard`), makes the same call, and gets its tokens' results; see
docs/distributed.md for the schemes and how to choose.
"""

from flashtile.distributed.balance import shard, unshard
from flashtile.distributed.calls import (
    attention,
    gather_attention,
    mixed_attention,
    ring_attention,
    ulysses_attention,
)
from flashtile.distributed.context import context_parallel

__all__ = [
    "attention",
    "context_parallel",
    "gather_attention",
    "mixed_attention",
    "ring_attention",
    "shard",
    "ulysses_attention",
    "unshard",
]
