"""Continuous batching over a paged KV cache: a small Llama answers requests of different lengths.

    python examples/generate.py --device cuda       # or cpu, the default
    python examples/generate.py --weights FOLDER    # those of a Llama checkpoint; needs safetensors

Requests wait until there is a slot and pages for them, join while others are in the middle of theirs, and leave when
they are done. Prompts go in by chunks of 64 tokens; then every step adds one token to each running sequence, in one
call of `flashtile.attention_kvcache` a layer, which turns queries and keys, appends, and attends. On a GPU the step is
one CUDA graph, captured once, whatever the lengths are.

The same requests are then answered by the same model with PyTorch's `scaled_dot_product_attention` over a cache that
has a full row for every slot, in the same batches and graphs, for comparison; and once more one by one. At the end each
answer is checked token by token against the model without any cache, run over the whole of the sequence.
"""

import argparse
import functools
import random
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from llama import Llama, Size, from_checkpoint
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import flashtile
from flashtile.kvcache import OutOfPages, PagedCache

PAGE, CHUNK = 16, 64


class Memory(Protocol):
    """Keys and values of the sequences in some slots, at addresses that stay."""

    def join(self, slot: int, tokens: int) -> bool:
        """A new sequence, if there is room for so many tokens."""

    def leave(self, slot: int) -> None:
        """Its room is free again."""

    def extend(self, slots: list[int], tokens: int) -> None:
        """Each of these sequences is about to get so many rows."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: slice) -> Tensor:
        """New rows go into the cache; queries attend to all that is there."""


class Pages:
    """By `attention_kvcache`, in pages that sequences share out between them."""

    def __init__(self, model: Llama, slots: int, pages: int) -> None:
        size, weights = model.size, model.head.weight
        self.model = model
        self.pool = PagedCache(
            pages, PAGE, size.heads_kv, size.headdim, layers=size.layers, dtype=weights.dtype, device=weights.device
        )
        # What an empty slot appends goes to a page that nobody reads.
        self.width = -(-size.longest // PAGE)
        self.idle = self.pool.block_table([self.pool.allocate(1)], self.width)
        self.table = self.idle.repeat(slots, 1)
        self.lengths = torch.zeros(slots, dtype=torch.int32, device=weights.device)
        self.sequences: dict[int, int] = {}

    def join(self, slot: int, tokens: int) -> bool:
        try:
            self.sequences[slot] = self.pool.allocate(tokens)
        except OutOfPages:
            return False
        return True

    def leave(self, slot: int) -> None:
        self.pool.free(self.sequences.pop(slot))
        self.table[slot], self.lengths[slot] = self.idle[0], 0

    def extend(self, slots: list[int], tokens: int) -> None:
        batch = self.pool.extend([self.sequences[slot] for slot in slots], tokens, self.width)
        self.table[slots], self.lengths[slots] = batch.block_table, batch.cache_seqlens

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: slice) -> Tensor:
        out: Tensor = flashtile.attention_kvcache(
            q,
            self.pool.k[layer],
            self.pool.v[layer],
            k=k,
            v=v,
            cache_seqlens=self.lengths[slots],
            block_table=self.table[slots],
            rotary_cos=self.model.cos,
            rotary_sin=self.model.sin,
            rotary_interleaved=False,
        )
        return out


class Rows:
    """By PyTorch's own attention, in a row as long as the longest sequence for each slot."""

    def __init__(self, model: Llama, slots: int) -> None:
        size, weights = model.size, model.head.weight
        self.model = model
        shape = (size.layers, slots, size.heads_kv, size.longest, size.headdim)
        self.k, self.v = (torch.zeros(shape, dtype=weights.dtype, device=weights.device) for _ in range(2))
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=weights.device)
        self.after: dict[int, int] = {}

    def join(self, slot: int, tokens: int) -> bool:
        self.after[slot] = 0
        return tokens <= self.k.shape[3]

    def leave(self, slot: int) -> None:
        self.lengths[slot] = 0

    def extend(self, slots: list[int], tokens: int) -> None:
        self.lengths[slots] = torch.tensor([self.after[slot] for slot in slots], device=self.lengths.device)
        for slot in slots:
            self.after[slot] += tokens

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, slots: slice) -> Tensor:
        rows = torch.arange(q.shape[0], device=q.device)[:, None]
        places = self.lengths[slots, None] + torch.arange(q.shape[1], device=q.device)
        k_cache, v_cache = self.k[layer, slots], self.v[layer, slots]
        k_cache.transpose(1, 2)[rows, places], v_cache.transpose(1, 2)[rows, places] = self.model.turn(k, places), v
        seen = torch.arange(k_cache.shape[2], device=q.device) <= places[:, None, :, None]
        q = self.model.turn(q, places).transpose(1, 2)
        return scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=seen, enable_gqa=True).transpose(1, 2)


@dataclass
class Request:
    """A prompt and how many tokens it asks for; `answer` fills up while it runs."""

    prompt: list[int]
    wanted: int
    answer: list[int] = field(default_factory=list)


class Engine:
    """Runs as many sequences at a time as there are slots, in tensors that stay where they are."""

    def __init__(self, model: Llama, memory: Memory, slots: int, graph: bool) -> None:
        self.model, self.memory = model, memory
        self.tokens = torch.zeros(slots, 1, dtype=torch.int64, device=model.head.weight.device)
        self.running: dict[int, Request] = {}
        self.graph = self._capture() if graph else None

    def _logits(self, tokens: Tensor, slots: slice) -> Tensor:
        """Of the next token, each sequence's new rows appended on the way."""
        return self.model(tokens, lambda layer, q, k, v: self.memory.attend(layer, q, k, v, slots))[:, -1]

    def _next(self) -> Tensor:
        return self._logits(self.tokens, slice(None)).argmax(-1)

    def _capture(self) -> Any:
        self._next()  # builds the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.next = self._next()
        return graph

    def admit(self, request: Request) -> bool:
        """Puts a request in, prompt and all, if there are a slot and room for all that it may become."""
        slot = next((slot for slot in range(len(self.tokens)) if slot not in self.running), None)
        if slot is None or not self.memory.join(slot, len(request.prompt) + request.wanted):
            return False
        prompt = torch.tensor([request.prompt], device=self.tokens.device)
        for part in prompt.split(CHUNK, dim=1):
            self.memory.extend([slot], part.shape[1])
            logits = self._logits(part, slice(slot, slot + 1))
        request.answer.append(int(logits.argmax()))
        self.running[slot] = request
        return True

    def step(self) -> None:
        """One token more for every running sequence."""
        slots = list(self.running)
        self.memory.extend(slots, 1)
        newest = [[request.answer[-1]] for request in self.running.values()]
        self.tokens[slots] = torch.tensor(newest, device=self.tokens.device)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.next = self._next()
        for slot, token in zip(slots, self.next[slots].tolist(), strict=True):
            self.running[slot].answer.append(token)

    def leave(self) -> None:
        """Sequences that have all they asked for make room."""
        for slot, request in [*self.running.items()]:
            if len(request.answer) >= request.wanted:
                self.memory.leave(slot)
                del self.running[slot]


def generate(engine: Engine, requests: list[Request], note: Callable[[int], None] = lambda tokens: None) -> float:
    """Answers all requests, joining and leaving as there is room; returns the seconds it took."""
    waiting = deque(requests)
    start = time.perf_counter()
    while waiting or engine.running:
        while waiting and engine.admit(waiting[0]):
            waiting.popleft()
            note(1)
        engine.leave()
        if engine.running:
            engine.step()
            note(len(engine.running))
            engine.leave()
        elif waiting and not engine.admit(waiting[0]):
            raise OutOfPages("a request is longer than the whole cache; try --pages with a larger number")
    return time.perf_counter() - start


def shortfall(model: Llama, request: Request) -> float:
    """How far the logits of the answer's tokens lie below the best ones, without a cache, as a share of the largest:
    0, or a rounding."""
    tokens = torch.tensor([request.prompt + request.answer], device=model.head.weight.device)
    logits = model.without_cache(tokens)[0, len(request.prompt) - 1 : -1].float()
    chosen = logits.gather(1, tokens[0, len(request.prompt) :, None])[:, 0]
    return float((logits.amax(-1) - chosen).max() / logits.abs().max())


def drawn(count: int, size: Size) -> list[Request]:
    """Requests of all lengths, the same each time."""
    numbers = random.Random(1)
    half = size.longest // 2
    return [
        Request([numbers.randrange(size.vocabulary) for _ in range(numbers.randint(1, half))], numbers.randint(1, half))
        for _ in range(count)
    ]


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="a Llama checkpoint; default: random weights")
    parser.add_argument("--requests", type=int, default=16, metavar="N", help="default %(default)s")
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="sequences at a time; default %(default)s")
    parser.add_argument("--pages", type=int, metavar="N", help=f"of {PAGE} rows; default: three quarters of all slots'")
    parser.add_argument("--longest", type=int, default=128, metavar="N", help="rows of a sequence; default %(default)s")
    for name in ("layers", "heads", "heads_kv", "headdim"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=getattr(Size, name), metavar="N", help="default %(default)s")
    return parser.parse_args(arguments)


def built(given: argparse.Namespace, on_gpu: bool) -> Llama:
    torch.manual_seed(0)
    if given.weights is not None:
        model = from_checkpoint(given.weights, given.longest)
    else:
        width = given.heads * given.headdim
        sizes = {name: getattr(given, name) for name in ("layers", "heads", "heads_kv", "headdim", "longest")}
        with torch.device(given.device):
            model = Llama(Size(**sizes, inner=4 * width))
    return model.to(given.device, torch.bfloat16 if on_gpu else torch.float32)


def main(arguments: list[str] | None = None) -> int:
    given = options(arguments)
    on_gpu = torch.device(given.device).type == "cuda"
    model = built(given, on_gpu)
    pages = given.pages or 2 + -(-given.longest // PAGE) * max(1, given.slots * 3 // 4)
    ways: dict[str, Callable[[], Engine]] = {
        "flashtile": lambda: Engine(model, Pages(model, given.slots, pages), given.slots, on_gpu),
        "SDPA": lambda: Engine(model, Rows(model, given.slots), given.slots, on_gpu),
        "one by one": lambda: Engine(model, Pages(model, 1, pages), 1, on_gpu),
    }
    answered = {name: drawn(given.requests, model.size) for name in ways}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    speed = {}
    with torch.inference_mode(), Progress(*columns) as progress:
        for name, engine in ways.items():
            tokens = sum(request.wanted for request in answered[name])
            task = progress.add_task(name, total=tokens)
            seconds = generate(engine(), answered[name], functools.partial(progress.advance, task))
            speed[name] = tokens / seconds
        task = progress.add_task("checked without a cache", total=len(answered["flashtile"]))
        worst = 0.0
        for request in answered["flashtile"]:
            worst = max(worst, shortfall(model, request))
            progress.advance(task)
    for name in ways:
        print(f"{name}: {speed[name]:.0f} tokens a second")
    pairs = zip(answered["flashtile"], answered["one by one"], strict=True)
    equal = sum(together.answer == alone.answer for together, alone in pairs)
    print(f"{equal} of {given.requests} answers are those of the requests one by one, token by token")
    allowed = 8 * torch.finfo(model.head.weight.dtype).eps
    print(
        f"no chosen logit lies below the best one without a cache by more than {worst:.1e} of it; allowed {allowed:.1e}"
    )
    # With 16 bits another batch is another rounding, which decides between tokens that are as good.
    return 0 if worst <= allowed and (on_gpu or equal == given.requests) else 1


if __name__ == "__main__":
    sys.exit(main())
