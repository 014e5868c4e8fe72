"""A small GPT over bytes, after nanoGPT. How it attends is an argument; all else is the same for both runs."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import flashtile
from flashtile.bench import textbook

# (q, k, v), each (batch, seqlen, heads, headdim), to the output in the same layout; causal.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The textbook formula, which holds a seqlen × seqlen matrix a head."""
    return textbook.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True).transpose(1, 2)


def by_flashtile(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same function, tile by tile."""
    return flashtile.attention(q, k, v, causal=True)


@dataclass(frozen=True)
class Size:
    """What the model is made of; 256 bytes are its vocabulary."""

    seqlen: int = 256
    layers: int = 4
    heads: int = 4
    width: int = 128


class Block(nn.Module):
    """Attention, then a feed-forward network, each normalised before and added to the stream."""

    def __init__(self, size: Size, attend: Attend) -> None:
        super().__init__()
        self.heads, self.attend = size.heads, attend
        self.norms = nn.ModuleList(nn.LayerNorm(size.width) for _ in range(2))
        self.qkv = nn.Linear(size.width, 3 * size.width, bias=False)
        self.project = nn.Linear(size.width, size.width, bias=False)
        self.widen = nn.Linear(size.width, 4 * size.width, bias=False)
        self.narrow = nn.Linear(4 * size.width, size.width, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        batch, seqlen, width = stream.shape
        q, k, v = self.qkv(self.norms[0](stream)).view(batch, seqlen, 3, self.heads, -1).unbind(dim=2)
        stream = stream + self.project(self.attend(q, k, v).reshape(batch, seqlen, width))
        return stream + self.narrow(functional.gelu(self.widen(self.norms[1](stream))))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, size: Size, attend: Attend) -> None:
        super().__init__()
        self.size = size
        self.bytes = nn.Embedding(256, size.width)
        self.places = nn.Embedding(size.seqlen, size.width)
        self.blocks = nn.Sequential(*(Block(size, attend) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, 256, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # Residual projections start smaller, so that the stream keeps its variance through the layers.
                residual = name.endswith(("project.weight", "narrow.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * size.layers) if residual else 0.02)

    def forward(self, text: Tensor) -> Tensor:
        places = torch.arange(text.shape[1], device=text.device)
        return self.head(self.norm(self.blocks(self.bytes(text) + self.places(places))))

    @torch.no_grad()
    def write(self, prompt: Tensor, length: int, temperature: float = 0.7) -> Tensor:
        """`prompt` (1, seqlen) continued by `length` bytes, each drawn from the model."""
        text = prompt
        for _ in range(length):
            logits = self(text[:, -self.size.seqlen :])[:, -1].float()
            text = torch.cat((text, torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)), dim=1)
        return text
