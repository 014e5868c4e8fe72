"""The model of `generate.py`: a Llama, with random weights or those of a checkpoint, that is told how to attend."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import flashtile
from flashtile.kvcache import turned

# (layer, q, k, v) to the output: (batch, seqlen, heads, headdim), q and k not yet turned.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """What the model is made of. longest: rows of a sequence; inner: columns inside of the feed-forward part; base: of
    the angles of rotary embedding."""

    layers: int = 4
    heads: int = 8
    heads_kv: int = 2
    headdim: int = 32
    vocabulary: int = 512
    longest: int = 128
    inner: int = 1024
    base: float = 10000.0
    epsilon: float = 1e-5

    @property
    def width(self) -> int:
        return self.heads * self.headdim


class Block(nn.Module):
    """Attention with grouped heads, then SwiGLU, each normalised before and added to the stream."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size
        self.norms = nn.ModuleList(nn.RMSNorm(size.width, eps=size.epsilon) for _ in range(2))
        self.qkv = nn.Linear(size.width, (size.heads + 2 * size.heads_kv) * size.headdim, bias=False)
        self.project = nn.Linear(size.width, size.width, bias=False)
        self.gate = nn.Linear(size.width, size.inner, bias=False)
        self.widen = nn.Linear(size.width, size.inner, bias=False)
        self.narrow = nn.Linear(size.inner, size.width, bias=False)

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
        self.norm = nn.RMSNorm(size.width, eps=size.epsilon)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        rate = size.base ** (-torch.arange(0, size.headdim, 2) / size.headdim)
        angles = torch.arange(size.longest)[:, None] * rate
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        stream = self.embed(tokens)
        for layer, block in enumerate(self.blocks):
            stream = block(stream, lambda q, k, v, layer=layer: attend(layer, q, k, v))
        logits: Tensor = self.head(self.norm(stream))
        return logits

    def turn(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of rows (batch, seqlen, heads, headdim) at positions (batch, seqlen)."""
        return turned(rows, self.cos, self.sin, positions, interleaved=False)

    def without_cache(self, tokens: Tensor) -> Tensor:
        """Logits of whole sequences (batch, seqlen), nothing kept: what caching must not change."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = flashtile.attention(self.turn(q, places), self.turn(k, places), v, causal=True)
            return out

        return self(tokens, attend)


def from_checkpoint(folder: Path, longest: int) -> Llama:
    """The Llama in a folder that transformers' `save_pretrained` has made, float32.

    Raises:
        ValueError: the folder holds another model, or one whose positions are rescaled.
    """
    from safetensors.torch import load_file

    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config["model_type"] != "llama" or rotary.get("rope_type", "default") != "default":
        raise ValueError(f"{folder}: got {config['model_type']} with {rotary}, need a Llama with plain positions")
    heads = config["num_attention_heads"]
    size = Size(
        layers=config["num_hidden_layers"],
        heads=heads,
        heads_kv=config["num_key_value_heads"],
        headdim=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        longest=longest,
        inner=config["intermediate_size"],
        base=config.get("rope_theta") or rotary.get("rope_theta", 10000.0),
        epsilon=config["rms_norm_eps"],
    )
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    model = Llama(size)
    model.load_state_dict(_renamed(stored, size.layers))
    return model


def _renamed(stored: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The weights of a checkpoint under this file's names."""
    embed = stored["model.embed_tokens.weight"]
    found = {
        "embed.weight": embed,
        "norm.weight": stored["model.norm.weight"],
        "head.weight": stored.get("lm_head.weight", embed),
    }
    names = {
        "norms.0": "input_layernorm",
        "norms.1": "post_attention_layernorm",
        "project": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "widen": "mlp.up_proj",
        "narrow": "mlp.down_proj",
    }
    for layer in range(layers):
        theirs = f"model.layers.{layer}"
        for ours, name in names.items():
            found[f"blocks.{layer}.{ours}.weight"] = stored[f"{theirs}.{name}.weight"]
        projections = [stored[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkv"]
        found[f"blocks.{layer}.qkv.weight"] = torch.cat(projections)
    return found
