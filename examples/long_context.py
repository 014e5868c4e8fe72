"""Trains a small GPT on one long sequence that several processes share.

    torchrun --nproc-per-node 2 examples/long_context.py      2 GPUs, 128k tokens of context
    torchrun --nproc-per-node 2 examples/long_context.py --device cpu
                                                              2 processes on a CPU, 4k tokens
    python examples/long_context.py --device cpu              one process: the same losses

The text is the prose that every Python carries (its `help()` texts), byte by byte. The model knows nothing of the other
processes: it calls `flashtile.attention`, and takes positions as an input. What is left to do is what data parallelism
does, too: average gradients over the processes. `--record FILE` keeps losses, seconds and memory.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import flashtile
from flashtile.bench import machine
from flashtile.demo.training import corpus
from flashtile.distributed import context_parallel

BYTES = 256


class Block(nn.Module):
    """Attention with rotary positions, then a feed-forward network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mix, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        q, k, v = self.mix(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.project(flashtile.attention(turned(q, places), turned(k, places), v, causal=True).flatten(2))
        return x + self.narrow(functional.gelu(self.widen(self.norms[1](x))))


def turned(x: Tensor, places: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021): pairs of columns turned by angles that grow with the token's place."""
    half = x.shape[-1] // 2
    speeds = 1e5 ** (-torch.arange(half, device=x.device) / half)
    angles = places[..., None, None].float() * speeds
    real, imaginary = x.float().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((real * cos - imaginary * sin, real * sin + imaginary * cos), -1).to(x.dtype)


class GPT(nn.Module):
    """Bytes and their places in, logits of the next bytes out."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.bytes, self.norm = nn.Embedding(BYTES, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, BYTES)

    def forward(self, text: Tensor, places: Tensor) -> Tensor:
        x = self.bytes(text)
        for block in self.blocks:
            x = block(x, places)
        return self.head(self.norm(x))


def pieces(text: Tensor, tokens: int, step: int) -> list[Tensor]:
    """(text, places, the bytes that follow), whole, the same on every process; a text that is too short repeats."""
    start = step * tokens // 2
    rows = (torch.arange(start, start + tokens + 1)) % len(text)
    piece = text[rows.to(text.device)].long()
    return [piece[None, :-1], torch.arange(tokens, device=text.device)[None], piece[None, 1:]]


def train(given: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Of every step the loss, averaged over the processes, and the seconds that it took."""
    ranks = processes()
    torch.manual_seed(0)
    model = GPT(given.layers, given.width, given.heads).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.rate)
    text, losses, seconds = corpus().to(device), [], []
    for step in range(given.steps):
        begun = time.perf_counter()
        if ranks == 1:
            loss = one_step(model, pieces(text, given.tokens, step), device)
        else:
            batch = pieces(text, given.tokens, step)
            with context_parallel(model, buffers=batch, buffer_seq_dims=[1, 1, 1], no_restore_buffers=set(batch)):
                loss = one_step(model, batch, device)
            for value in (loss, *(parameter.grad for parameter in model.parameters())):
                dist.all_reduce(value)
                value /= ranks
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))  # waits for the device
        seconds.append(time.perf_counter() - begun)
        if is_first():
            speed = f"{given.tokens / seconds[-1]:,.0f} tokens a second"
            print(f"step {step:3}  loss {losses[-1]:.5f}  {speed}", flush=True)
    return {"losses": losses, "seconds": seconds}


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def one_step(model: nn.Module, batch: list[Tensor], device: torch.device) -> Tensor:
    """Forward and backward pass of a batch, or of this process's share of it; returns the loss."""
    text, places, following = batch
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(text, places)
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), following.flatten())
    loss.backward()
    return loss.detach()


def record(given: argparse.Namespace, device: torch.device, steps: dict[str, list[float]]) -> None:
    """Writes what the run found; memory: the most that the first process had allocated, on a GPU."""
    found: dict[str, Any] = {
        "kind": "long_context",
        "processes": processes(),
        "machine": machine.describe(str(device)),
        "settings": {name: value for name, value in vars(given).items() if name != "record"},
        "memory": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        **steps,
    }
    given.record.parent.mkdir(parents=True, exist_ok=True)
    given.record.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="of context; default 131072, on a CPU 4096")
    for name, value in (("steps", 20), ("layers", 4), ("width", 256), ("heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
    parser.add_argument("--rate", type=float, default=3e-4, help="of learning; default %(default)s")
    parser.add_argument("--record", type=Path, help="a file for losses, seconds and memory, as JSON")
    given = parser.parse_args()
    given.tokens = given.tokens or (2**17 if given.device == "cuda" else 2**12)
    if given.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = torch.device(given.device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if given.device == "cuda" else "gloo")
    steps = train(given, device)
    if given.record is not None and is_first():
        record(given, device, steps)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
