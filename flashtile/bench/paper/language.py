"""Rows of language models: BERT and GPT-2 as Hugging Face transformers has them, with random weights and tokens.

Dropout is off in both columns. A training step is forward, backward and AdamW with a learning rate of 0, which costs
what any does and leaves the weights as they are.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile.bench import memory
from flashtile.bench.paper.experiment import (
    Call,
    Figures,
    Note,
    Pair,
    Row,
    Setting,
    captured,
    no_attention,
    timed,
    with_busy,
)

NAME = "tile_attention"
NOTHING = "without_attention"
"""What transformers is told to use where attention's share of a step is to be known."""

WHOLE = "the whole step: attention is a part of it, and only attention differs"
_NEEDS = ("transformers",)
_VOCABULARY = {"bert": 30522, "gpt2": 50257}


class Sizes(NamedTuple):
    """Of a transformer."""

    layers: int
    width: int
    heads: int


BERT_BASE, BERT_LARGE = Sizes(12, 768, 12), Sizes(24, 1024, 16)
GPT2_SMALL, GPT2_MEDIUM, GPT2_2_7B = Sizes(12, 768, 12), Sizes(24, 1024, 16), Sizes(32, 2560, 20)
TOY = Sizes(1, 32, 2)


def _model(kind: str, sizes: Sizes, length: int, setting: Setting) -> Any:
    import transformers

    import flashtile.integrations.transformers  # noqa: F401

    transformers.AttentionInterface.register(NOTHING, _nothing)
    transformers.AttentionMaskInterface.register(NOTHING, _no_mask)
    layers, width, heads = setting.pick(sizes, TOY)
    words = setting.pick(_VOCABULARY[kind], 101)
    common: dict[str, Any] = {"vocab_size": words, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if kind == "bert":
        off: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        sized: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
        config: Any = transformers.BertConfig(
            **common, **off, **sized, intermediate_size=4 * width, max_position_embeddings=length
        )
        model_class: Any = transformers.BertForMaskedLM
    else:
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(
            **common, **off, n_layer=layers, n_embd=width, n_head=heads, n_positions=length, use_cache=False
        )
        model_class = transformers.GPT2LMHeadModel
    with torch.device(setting.device):
        return model_class._from_config(config, dtype=setting.dtype, attn_implementation="eager")


def _nothing(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return no_attention(query, key, value).transpose(1, 2), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _tokens(model: Any, batch: int, length: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), device=model.device)


def _training(model: Any, ids: Tensor, implementation: str, optimizer: Any) -> tuple[Call, Call]:
    """(a step, a probe: the loss and the norm of every gradient)."""

    def backward() -> Tensor:
        model.config._attn_implementation = implementation
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    def step() -> Tensor:
        loss = backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def probe() -> Tensor:
        loss = backward()
        norms = [parameter.grad.float().norm() for parameter in model.parameters() if parameter.grad is not None]
        optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.float(), *norms])

    return step, probe


def _optimizer(model: Any, setting: Setting) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=setting.cuda or None)


def _training_row(
    kind: str, sizes: Sizes, batch: int, length: int, baseline: str = "eager", baseline_length: int | None = None
) -> Any:
    """Measures a training step; `baseline_length`: that of the baseline's sequences, as many tokens in all."""

    def measure(setting: Setting, note: Note) -> Figures:
        ours_at, theirs_at = (setting.pick(n, n // 32) for n in (length, baseline_length or length))
        note("building the model")
        model = _model(kind, sizes, ours_at, setting)
        optimizer = _optimizer(model, setting)
        count = setting.batch(batch, 2)
        ids = _tokens(model, count, ours_at)
        theirs = ids.reshape(-1, theirs_at)
        (first, first_probe), (second, second_probe) = (
            _training(model, tokens, name, optimizer) for tokens, name in ((theirs, baseline), (ids, NAME))
        )
        work = float(ids.numel())
        rest, _ = _training(model, ids, NOTHING, optimizer)
        pair = Pair(first, second, (work, work), (first_probe, second_probe), same=ours_at == theirs_at, without=rest)
        found = with_busy(timed(pair, setting, note), pair, setting, note)
        tokens = {name: round(work / ms * 1e3) for name, ms in (("baseline", found.baseline), ("ours", found.ours))}
        return found._replace(details={**found.details, "tokens_a_second": tokens})

    return measure


def _inference_row(kind: str, sizes: Sizes, batch: int, length: int) -> Any:
    """Both variants as CUDA graphs, so that launching kernels costs neither anything."""

    def measure(setting: Setting, note: Note) -> Figures:
        note("building the model")
        at = setting.pick(length, 16)
        model = _model(kind, sizes, at, setting).eval()
        ids = _tokens(model, batch, at)

        # A decoder fills its cache, as generation does; without one, transformers looks for packed sequences. In graphs
        # eager adds a mask made before, of zeros for an encoder: transformers makes one in there in any case, and
        # older versions from a number on the host, which no graph can hold.
        later = torch.full((1, 1, at, at), torch.finfo(setting.dtype).min, dtype=setting.dtype, device=ids.device)
        decoder: dict[str, Any] = {"use_cache": True} if kind == "gpt2" else {}
        masked = {"attention_mask": later.triu(1) if kind == "gpt2" else torch.zeros_like(later)}

        def variant(implementation: str, **more: Any) -> Call:
            @torch.no_grad()
            def forward() -> Tensor:
                model.config._attn_implementation = implementation
                logits: Tensor = model(input_ids=ids, **more, **decoder).logits
                return logits

            return forward

        plain = variant("eager")
        calls = variant("eager", **masked), variant(NAME), variant(NOTHING)
        graphs = [captured(call, setting) for call in calls]
        found = timed(Pair(graphs[0], graphs[1], without=graphs[2]), setting, note)
        alone = timed(Pair(plain, plain), setting, note).baseline
        return found._replace(details={**found.details, "eager_without_graph_ms": alone})

    return measure


def _longest(setting: Setting, note: Note) -> Figures:
    """The longest context whose training step fits in a given memory, batch 1; the ceiling has no attention at all."""
    budget = setting.pick(16 * 2**30, 3 * 2**20)
    lengths = setting.pick([1024 * n for n in (*range(1, 17), 20, 24, 32, 48, 64)], [32, 256, 512])
    note("building the model")
    model = _model("gpt2", GPT2_SMALL, lengths[-1], setting)
    optimizer = _optimizer(model, setting)
    found: dict[str, int] = {}
    peaks: dict[str, dict[int, int]] = {"eager": {}, NAME: {}, NOTHING: {}}
    for implementation in peaks:
        for length in lengths:
            note(f"{implementation}: {length} tokens")
            step, _ = _training(model, _tokens(model, 1, length), implementation, optimizer)
            try:
                peak = memory.allocated_peak(step, setting.device)
            except torch.OutOfMemoryError:
                break
            if peak > budget:
                break
            peaks[implementation][length] = peak
            found[implementation] = length
        optimizer.zero_grad(set_to_none=True)
    baseline, ours, rest = (float(found[implementation]) for implementation in peaks)
    details = {"budget": budget, "peak_bytes": peaks, "ceiling": rest / baseline}
    return Figures(baseline, ours, "tokens", ours / baseline, None, details)


ROWS = (
    Row(
        "bert-training",
        "BERT-large training, 512 tokens",
        "+15 % end to end",
        1.15,
        "transformers, SDPA (the claim's: an MLPerf record's own fused attention)",
        f"{WHOLE}, which is fused in the baseline too",
        _training_row("bert", BERT_LARGE, 16, 512, "sdpa"),
        _NEEDS,
    ),
    Row(
        "bert-training-eager",
        "BERT-large training, 512 tokens, against eager",
        "+15 % end to end",
        1.15,
        "transformers, eager",
        WHOLE,
        _training_row("bert", BERT_LARGE, 16, 512),
        _NEEDS,
        rehearsed=False,
    ),
    Row(
        "gpt2-small",
        "GPT-2 small training, 1k tokens",
        "3x over Hugging Face",
        3.0,
        "transformers, eager",
        WHOLE,
        _training_row("gpt2", GPT2_SMALL, 16, 1024),
        _NEEDS,
    ),
    Row(
        "gpt2-medium",
        "GPT-2 medium training, 1k tokens",
        "3x over Hugging Face",
        3.0,
        "transformers, eager",
        WHOLE,
        _training_row("gpt2", GPT2_MEDIUM, 8, 1024),
        _NEEDS,
        rehearsed=False,
    ),
    Row(
        "gpt2-4k",
        "GPT-2 small, 4k tokens against 1k of eager",
        "30 % faster",
        1.3,
        "transformers, eager, at 1k tokens, as many tokens in all",
        "tokens a second; the longer context costs ours more attention",
        _training_row("gpt2", GPT2_SMALL, 4, 4096, "eager", 1024),
        _NEEDS,
    ),
    Row(
        "gpt2-longest",
        "GPT-2 small, longest context that trains in 16 GiB",
        "4x longer",
        4.0,
        "transformers, eager",
        "logits and activations, linear in the length, take their part of the memory in both columns",
        _longest,
        _NEEDS,
        rehearsed=False,
    ),
    Row(
        "gpt2-2.7b",
        "GPT-2 architecture at 2.7 billion parameters, training, 1k tokens",
        "half the time (PubMedGPT)",
        2.0,
        "transformers, eager",
        WHOLE,
        _training_row("gpt2", GPT2_2_7B, 2, 1024),
        _NEEDS,
        rehearsed=False,
    ),
    *(
        Row(
            f"bert-{size}-inference-{batch}",
            f"BERT-{size} inference, 384 tokens, batch {batch}",
            "5.3x (AITemplate)",
            5.3,
            "transformers, eager, as a CUDA graph",
            "the claim rests on fusing everything else too; here both columns have a CUDA graph and nothing else",
            _inference_row("bert", sizes, batch, 384),
            _NEEDS,
            rehearsed=batch == 1 and size == "base",
        )
        for size, sizes in (("base", BERT_BASE), ("large", BERT_LARGE))
        for batch in (1, 32)
    ),
    *(
        Row(
            f"{kind}-small-batch",
            f"{title} inference, 128 tokens, batch 1",
            "12x (Kernl)",
            12.0,
            "transformers, eager, as a CUDA graph",
            "the claim is mostly CUDA graphs, which both columns have; the record holds eager without one too",
            _inference_row(kind, sizes, 1, 128),
            _NEEDS,
        )
        for kind, title, sizes in (("bert", "BERT-base", BERT_BASE), ("gpt2", "GPT-2 small", GPT2_SMALL))
    ),
)
