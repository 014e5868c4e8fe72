"""Stand-ins for vLLM and SGLang: the modules, classes and arguments that their public code has, and a server's steps.

Only what a backend is given and must return; no line is theirs. `Server` plays the scheduler: requests of different
lengths, prompts in chunks, some decoding meanwhile, pages in any order, and it knows each request's own rows.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

HEADS, HEADS_KV, HEADDIM, PAGE, PAGES = 4, 2, 16, 16, 24


@contextmanager
def installed(modules: dict[str, dict[str, Any]], forget: str) -> Iterator[None]:
    """Modules by their names and contents, importable in this context; `forget`: what must be imported anew."""
    before = dict(sys.modules)
    for name, content in modules.items():
        for parent in (name[:dot] for dot, letter in enumerate(name) if letter == "."):
            sys.modules.setdefault(parent, ModuleType(parent))
        made = ModuleType(name)
        vars(made).update(content)
        sys.modules[name] = made
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, made)
    sys.modules.pop(forget, None)
    try:
        yield
    finally:
        sys.modules.clear()
        sys.modules.update(before)


@dataclass
class Step:
    """What one step brings. counts: new tokens of each request; tensors are of all tokens, request after request."""

    requests: list[int]
    counts: list[int]
    lengths: list[int]
    q: Tensor
    k: Tensor
    v: Tensor
    slots: Tensor

    @property
    def starts(self) -> list[int]:
        return [0, *torch.tensor(self.counts).cumsum(0).tolist()]


@dataclass
class Server:
    """Requests by number: their pages, and the rows of keys and values that they have had."""

    dtype: torch.dtype = torch.float32
    pages: dict[int, list[int]] = field(default_factory=dict)
    rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # The first page is nobody's.
    free: list[int] = field(default_factory=lambda: [(7 * page) % 23 + 1 for page in range(23)])

    def step(self, news: dict[int, int]) -> Step:
        """The next step, in which request r brings `news[r]` tokens."""
        requests, counts = list(news), list(news.values())
        total = sum(counts)
        q = torch.randn(total, HEADS, HEADDIM).to(self.dtype)
        k, v = (torch.randn(total, HEADS_KV, HEADDIM).to(self.dtype) for _ in range(2))
        slots, lengths, begin = [], [], 0
        for request, count in news.items():
            empty = k[:0]
            old = self.rows.get(request, (empty, empty))
            new = (k[begin : begin + count], v[begin : begin + count])
            self.rows[request] = tuple(torch.cat(pair) for pair in zip(old, new, strict=True))  # type: ignore[assignment]
            owned = self.pages.setdefault(request, [])
            length = len(old[0]) + count
            while len(owned) * PAGE < length:
                owned.append(self.free.pop())
            slots += [owned[row // PAGE] * PAGE + row % PAGE for row in range(len(old[0]), length)]
            lengths.append(length)
            begin += count
        return Step(requests, counts, lengths, q, k, v, torch.tensor(slots))

    def table(self, requests: Sequence[int], width: int = PAGES) -> Tensor:
        """Pages of each request; entries behind its last are somebody else's."""
        return torch.tensor([(self.pages[request] + [3] * width)[:width] for request in requests])

    def expected(self, step: Step, **options: Any) -> list[Tensor]:
        """(textbook, truth) of a step's outputs, (tokens, heads, headdim)."""
        found = []
        for dtype in (self.dtype, torch.float64):
            outs = []
            for place, request in enumerate(step.requests):
                q = step.q[step.starts[place] : step.starts[place + 1]].to(dtype)
                k, v = (rows.to(dtype) for rows in self.rows[request])
                outs.append(textbook(q, k, v, **options))
            found.append(torch.cat(outs))
        return found


def textbook(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float = HEADDIM**-0.5,
) -> Tensor:
    """The last len(q) tokens of one request; `window`: how many keys before its own a token sees."""
    k, v = (rows.repeat_interleave(HEADS // HEADS_KV, dim=1) for rows in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(q))[:, None] + (len(k) - len(q)) - torch.arange(len(k))
    if slopes is not None:
        scores = scores - slopes.to(q.dtype)[:, None, None] * distance.abs()
    hidden = distance < 0 if window is None else (distance < 0) | (distance > window)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(q.dtype)[:, None, None].expand(-1, len(q), 1)], dim=-1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1)[..., : len(k)], v)


STEPS: list[dict[int, int]] = [{0: 20, 1: 3}, {0: 5, 1: 1}, {2: 40, 0: 1, 1: 1}, {0: 1, 1: 1, 2: 1}, {3: 5, 2: 1, 1: 5}]
"""Prompts, chunks of prompts, and tokens one by one."""


def vllm_modules() -> dict[str, dict[str, Any]]:
    """vLLM's interface of attention backends, as in its version 0.33."""

    class Base:
        pass

    class MultipleOf:
        def __init__(self, base: int) -> None:
            self.base = base

    class Builder:
        def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
            self.kv_cache_spec, self.layer_names, self.device = kv_cache_spec, layer_names, device

    overrides: dict[Any, str] = {}

    class AttentionBackendEnum(Enum):
        FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"
        CUSTOM = None

        def is_overridden(self) -> bool:
            return self in overrides

    def register_backend(backend: Any, class_path: str) -> None:
        overrides[backend] = class_path

    names = {"AttentionBackend": Base, "AttentionImpl": Base, "AttentionMetadataBuilder": Builder}
    registry = {"AttentionBackendEnum": AttentionBackendEnum, "register_backend": register_backend, "paths": overrides}
    return {
        "vllm.v1.attention.backend": {**names, "MultipleOf": MultipleOf},
        "vllm.v1.attention.backends.registry": registry,
    }


class Pool:
    """SGLang's pool of slots, a row each, for one layer."""

    swa_layer_nums = 0

    def __init__(self) -> None:
        self.k, self.v = (torch.full((PAGES * PAGE, HEADS_KV, HEADDIM), torch.nan) for _ in range(2))

    def set_kv_buffer(self, layer: Any, loc: Any, k: Tensor, v: Tensor) -> None:
        self.k[loc.location], self.v[loc.location] = k, v

    def get_key_buffer(self, layer_id: int) -> Tensor:
        return self.k

    def get_value_buffer(self, layer_id: int) -> Tensor:
        return self.v


@dataclass(frozen=True)
class Mode:
    """SGLang's ForwardMode."""

    decoding: bool = False
    verifying: bool = False

    def is_decode(self) -> bool:
        return self.decoding

    def is_target_verify(self) -> bool:
        return self.verifying

    def is_draft_extend_v2(self) -> bool:
        return False


def sglang_modules() -> dict[str, dict[str, Any]]:
    """SGLang's interface of attention backends, as in its version 0.5.23."""
    backends: dict[str, Any] = {}
    choices: list[str] = ["triton"]

    class AttentionBackend:
        pass

    @dataclass
    class KVWriteLoc:
        location: Tensor

        @classmethod
        def for_batch(cls, batch: Any) -> "KVWriteLoc":
            return cls(batch.out_cache_loc)

    def register_attention_backend(name: str) -> Any:
        return lambda create: backends.setdefault(name, create)

    layers = "sglang.srt.layers.attention"
    return {
        f"{layers}.base_attn_backend": {"AttentionBackend": AttentionBackend},
        f"{layers}.attention_registry": {
            "register_attention_backend": register_attention_backend, "ATTENTION_BACKENDS": backends
        },
        "sglang.srt.server_args": {"add_attention_backend_choices": choices.extend, "choices": choices},
        "sglang.srt.mem_cache.memory_pool": {"KVWriteLoc": KVWriteLoc},
    }  # fmt: skip


def layer(**changes: Any) -> SimpleNamespace:
    """SGLang's RadixAttention, as far as backends read it."""
    usual = {
        "tp_q_head_num": HEADS,
        "qk_head_dim": HEADDIM,
        "v_head_dim": HEADDIM,
        "scaling": HEADDIM**-0.5,
        "layer_id": 0,
        "logit_cap": 0.0,
        "sliding_window_size": -1,
        "is_cross_attention": False,
        "attn_type": "decoder",
    }
    return SimpleNamespace(**{**usual, **changes})
