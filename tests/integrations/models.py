"""Small models of transformers with random weights, and the comparison of their attention with "eager"."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.rule import assert_close, ran

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VOCABULARY = 61
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {
    **SMALL,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
WINDOWED = {**DECODER, "sliding_window": 4, "head_dim": 8}


@dataclass(frozen=True)
class Model:
    """A model class, its configuration, and how many attention calls a forward pass makes."""

    name: str
    config: str
    options: dict[str, Any]
    calls: int = 2
    generates: bool = True
    inputs: Callable[[], dict[str, Tensor]] = field(default=lambda: {"input_ids": tokens(2, 9)})

    def build(self, implementation: str = "eager") -> Any:
        torch.manual_seed(7)
        config = getattr(transformers, self.config)(**self.options)
        model = getattr(transformers, self.name)._from_config(config, attn_implementation="eager").eval()
        # Experts in one grouped product are not there for float64.
        model.config._experts_implementation = "eager"
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
            else:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
        model.set_attn_implementation(implementation)
        return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(3))


def _pixels() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))}


def _speech() -> dict[str, Tensor]:
    features = torch.randn(2, 8, 22, generator=torch.Generator().manual_seed(3))
    return {"input_features": features, "decoder_input_ids": tokens(2, 7)}


def _translation() -> dict[str, Tensor]:
    return {"input_ids": tokens(2, 9), "decoder_input_ids": tokens(2, 7)}


_MODELS = (
    Model("BertForMaskedLM", "BertConfig", {**SMALL, "intermediate_size": 48}, generates=False),
    Model(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "eos_token_id": None},
    ),
    Model("LlamaForCausalLM", "LlamaConfig", DECODER),
    Model("MistralForCausalLM", "MistralConfig", WINDOWED),
    Model(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**WINDOWED, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    ),
    Model("Gemma3ForCausalLM", "Gemma3TextConfig", {**WINDOWED, "query_pre_attn_scalar": 8}),
    Model("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 8}),
    Model(
        "GptOssForCausalLM",
        "GptOssConfig",
        {**WINDOWED, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    Model(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **DECODER,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "first_k_dense_replace": 2,
        },
    ),
    Model(
        "ViTForImageClassification",
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 12,
            "patch_size": 4,
        },
        generates=False,
        inputs=_pixels,
    ),
    Model(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 11,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
            "decoder_start_token_id": 1,
        },
        calls=3,
        inputs=_speech,
    ),
    Model(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 1,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        calls=3,
        inputs=_translation,
    ),
)
MODELS = {model.name: model for model in _MODELS}


def run(model: Any, inputs: dict[str, Any], valid: Tensor | None = None, gradients: bool = True) -> dict[str, Tensor]:
    """Logits, those at padding zero, and the gradients of all parameters."""
    dtype = next(model.parameters()).dtype
    given = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    logits = model(**given).logits
    if valid is not None:
        logits = logits * valid[..., None].to(logits.dtype)
    if not gradients:
        return {"logits": logits}
    loss = (logits * torch.linspace(-1, 1, logits.numel(), device=logits.device).sin().reshape(logits.shape)).sum()
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {"logits": logits, **{n: g for n, g in zip(names, found, strict=True) if g is not None}}


def compare(
    model: Model,
    implementation: str,
    inputs: dict[str, Any] | None = None,
    valid: Tensor | None = None,
    gradients: bool = True,
    reference: dict[str, Any] | None = None,
) -> list[Any]:
    """Logits and gradients are those of "eager", within the tolerance rule; returns the plans that ran.

    reference: what "eager" is to be given, where it needs other inputs to mean the same.
    """
    inputs = model.inputs() if inputs is None else inputs
    reference = inputs if reference is None else reference
    eager = model.build()
    truth = run(copy.deepcopy(eager).double(), reference, valid, gradients)
    textbook = run(eager, reference, valid, gradients)
    with ran() as plans:
        found = run(model.build(implementation), inputs, valid, gradients)
    assert found.keys() == truth.keys()
    passes = [plan for plan in plans if not plan.problem.backward]
    assert len(passes) == model.calls, "every layer calls flashtile once"
    assert len(plans) == model.calls * (2 if gradients else 1)
    largest = max(value.abs().max().item() for name, value in truth.items() if name != "logits") if gradients else 0.0
    for name, value in found.items():
        assert_close(value, textbook[name], truth[name], name, scale=0.0 if name == "logits" else largest)
    return passes


def same_tokens(model: Model, implementation: str, inputs: dict[str, Any] | None = None, **options: Any) -> None:
    """Greedy generation picks the tokens that "eager" picks."""
    inputs = model.inputs() if inputs is None else inputs
    settings = {"max_new_tokens": 5, "do_sample": False, **options}
    expected = model.build().generate(**inputs, **settings)
    with ran() as plans:
        found = model.build(implementation).generate(**inputs, **settings)
    assert len(plans) >= 5
    assert found.tolist() == expected.tolist()
