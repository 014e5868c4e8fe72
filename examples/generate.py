"""Continuous batching over a paged KV cache: a small Llama with random weights answers requests of different lengths.

    python examples/generate.py --device cuda       # or cpu, the default

Requests wait until there is a slot and pages for them, join while others are in the middle of theirs, and leave when
they are done. Prompts go in by chunks of 64 tokens; then every step adds one token to each running sequence, in one
call of `flashtile.attention_kvcache` a layer, which turns queries and keys, appends, and attends. On a GPU the step is
one CUDA graph, captured once, whatever the lengths are. At the end each answer is checked against the model without any
cache, run over the whole of the sequence.
"""

import argparse
import random
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional

import flashtile
from flashtile.kvcache import OutOfPages, PagedCache, turned

PAGE, CHUNK = 16, 64

# (layer, q, k, v) to the output: (batch, seqlen, heads, headdim), q and k not yet turned.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """What the model is made of."""

    layers: int = 4
    heads: int = 8
    heads_kv: int = 2
    headdim: int = 32
    vocabulary: int = 512
    longest: int = 128

    @property
    def width(self) -> int:
        return self.heads * self.headdim


class Block(nn.Module):
    """Attention with grouped heads, then SwiGLU, each normalised before and added to the stream (Llama)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.norms = nn.ModuleList(nn.RMSNorm(size.width) for _ in range(2))
        self.qkv = nn.Linear(size.width, (size.heads + 2 * size.heads_kv) * size.headdim, bias=False)
        self.project = nn.Linear(size.width, size.width, bias=False)
        self.gate = nn.Linear(size.width, 4 * size.width, bias=False)
        self.widen = nn.Linear(size.width, 4 * size.width, bias=False)
        self.narrow = nn.Linear(4 * size.width, size.width, bias=False)

    def forward(self, stream: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        heads = self.qkv(self.norms[0](stream)).unflatten(-1, (-1, self.size.headdim))
        q, k, v = heads.split((self.size.heads, self.size.heads_kv, self.size.heads_kv), dim=2)
        stream = stream + self.project(attend(q, k, v).flatten(2))
        inner = self.norms[1](stream)
        return stream + self.narrow(functional.silu(self.gate(inner)) * self.widen(inner))


class Llama(nn.Module):
    """Tokens in, logits of the next token out; how it attends is an argument."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.embed = nn.Embedding(size.vocabulary, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        rate = 10000.0 ** (-torch.arange(0, size.headdim, 2) / size.headdim)
        angles = torch.arange(size.longest)[:, None] * rate
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        stream = self.embed(tokens)
        for layer, block in enumerate(self.blocks):
            stream = block(stream, lambda q, k, v, layer=layer: attend(layer, q, k, v))
        logits: Tensor = self.head(self.norm(stream))
        return logits

    def without_cache(self, tokens: Tensor) -> Tensor:
        """Logits of whole sequences (batch, seqlen), nothing kept: what caching must not change."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = (turned(rows, self.cos, self.sin, places, interleaved=False) for rows in (q, k))
            out: Tensor = flashtile.attention(q, k, v, causal=True)
            return out

        return self(tokens, attend)


@dataclass
class Request:
    """A prompt and how many tokens it asks for; `answer` fills up while it runs."""

    prompt: list[int]
    wanted: int
    answer: list[int] = field(default_factory=list)


class Engine:
    """Runs at most `slots` sequences at a time, in tensors that stay where they are."""

    def __init__(self, model: Llama, pages: int, slots: int, graph: bool) -> None:
        size, weights = model.size, model.head.weight
        self.model = model
        self.pool = PagedCache(
            pages, PAGE, size.heads_kv, size.headdim, layers=size.layers, dtype=weights.dtype, device=weights.device
        )
        # What an empty slot appends goes to a page that nobody reads.
        self.width = -(-size.longest // PAGE)
        self.idle = self.pool.block_table([self.pool.allocate(1)], self.width)
        self.tokens = torch.zeros(slots, 1, dtype=torch.int64, device=weights.device)
        self.lengths = torch.zeros(slots, dtype=torch.int32, device=weights.device)
        self.table = self.idle.repeat(slots, 1)
        self.running: dict[int, Request] = {}
        self.graph = self._capture() if graph else None

    def _logits(self, tokens: Tensor, lengths: Tensor, table: Tensor) -> Tensor:
        """Of the next token, each sequence's new rows appended on the way."""
        model, pool = self.model, self.pool

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = flashtile.attention_kvcache(
                q,
                pool.k[layer],
                pool.v[layer],
                k=k,
                v=v,
                cache_seqlens=lengths,
                block_table=table,
                rotary_cos=model.cos,
                rotary_sin=model.sin,
                rotary_interleaved=False,
            )
            return out

        return model(tokens, attend)[:, -1]

    def _capture(self) -> Any:
        self._logits(self.tokens, self.lengths, self.table)  # builds the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.next = self._logits(self.tokens, self.lengths, self.table).argmax(-1)
        return graph

    def admit(self, request: Request) -> bool:
        """Puts a request in, prompt and all, if there are a slot and pages for all that it may become."""
        if len(self.running) == len(self.tokens):
            return False
        try:
            sequence = self.pool.allocate(len(request.prompt) + request.wanted)
        except OutOfPages:
            return False
        prompt = torch.tensor([request.prompt], device=self.tokens.device)
        for part in prompt.split(CHUNK, dim=1):
            batch = self.pool.extend([sequence], part.shape[1], self.width)
            logits = self._logits(part, batch.cache_seqlens, batch.block_table)
        request.answer.append(int(logits.argmax()))
        self.running[sequence] = request
        return True

    def step(self) -> None:
        """One token more for every running sequence; those that have all they asked for leave."""
        sequences = list(self.running)
        count = len(sequences)
        batch = self.pool.extend(sequences, 1, self.width)
        newest = [self.running[sequence].answer[-1] for sequence in sequences]
        self.tokens[:count, 0] = torch.tensor(newest, device=self.tokens.device)
        self.lengths[:count], self.lengths[count:] = batch.cache_seqlens, 0
        self.table[:count], self.table[count:] = batch.block_table, self.idle
        if self.graph is not None:
            self.graph.replay()
        else:
            self.next = self._logits(self.tokens, self.lengths, self.table).argmax(-1)
        for sequence, token in zip(sequences, self.next[:count].tolist(), strict=True):
            self.running[sequence].answer.append(token)

    def leave(self) -> None:
        """Frees the pages of sequences that have all they asked for."""
        for sequence, request in [*self.running.items()]:
            if len(request.answer) >= request.wanted:
                self.pool.free(sequence)
                del self.running[sequence]


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
        elif waiting and engine.pool.pages_free == engine.pool.k.shape[1] - 1:
            raise OutOfPages("a request is longer than the whole cache; try --pages with a larger number")
    return time.perf_counter() - start


def shortfall(model: Llama, request: Request) -> float:
    """How far the logits of the answer's tokens lie below the best ones, without a cache: 0, or a rounding of them."""
    tokens = torch.tensor([request.prompt + request.answer], device=model.head.weight.device)
    logits = model.without_cache(tokens)[0, len(request.prompt) - 1 : -1].float()
    chosen = logits.gather(1, tokens[0, len(request.prompt) :, None])[:, 0]
    return float((logits.amax(-1) - chosen).max())


def drawn(count: int, size: Size) -> list[Request]:
    """Requests of all lengths, the same each time."""
    numbers = random.Random(1)
    half = size.longest // 2
    return [
        Request([numbers.randrange(size.vocabulary) for _ in range(numbers.randint(1, half))], numbers.randint(1, half))
        for _ in range(count)
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--requests", type=int, default=16, metavar="N", help="default %(default)s")
    parser.add_argument("--slots", type=int, default=8, metavar="N", help="sequences at a time; default %(default)s")
    parser.add_argument("--pages", type=int, default=48, metavar="N", help=f"of {PAGE} rows; default %(default)s")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="default %(default)s")
    parser.add_argument("--longest", type=int, default=128, metavar="N", help="rows of a sequence; default %(default)s")
    given = parser.parse_args(arguments)
    size = Size(layers=given.layers, longest=given.longest)
    on_gpu = torch.device(given.device).type == "cuda"
    torch.manual_seed(0)
    model = Llama(size).to(given.device, torch.bfloat16 if on_gpu else torch.float32)
    requests = drawn(given.requests, size)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with torch.inference_mode(), Progress(*columns) as progress:
        engine = Engine(model, given.pages, given.slots, graph=on_gpu)
        task = progress.add_task("tokens", total=sum(request.wanted for request in requests))
        seconds = generate(engine, requests, lambda tokens: progress.advance(task, tokens))
        task = progress.add_task("checked without a cache", total=len(requests))
        worst = 0.0
        for request in requests:
            worst = max(worst, shortfall(model, request))
            progress.advance(task)
    tokens = sum(len(request.answer) for request in requests)
    print(f"{len(requests)} requests, {tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens a second")
    allowed = 8 * torch.finfo(model.head.weight.dtype).eps
    print(f"no chosen logit lies more than {worst:.1e} below the best one without a cache; {allowed:.1e} is allowed")
    return 0 if worst <= allowed else 1


if __name__ == "__main__":
    sys.exit(main())
