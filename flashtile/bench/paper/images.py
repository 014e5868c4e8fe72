"""Rows of image generation: Stable Diffusion 1.5's UNet as diffusers has it, with random weights and latents."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
    with_peaks,
)


def _unet(setting: Setting) -> Any:
    import diffusers

    full = {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8}
    small = {
        "block_out_channels": (8, 16),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    with torch.device(setting.device):
        model: Any = diffusers.UNet2DConditionModel(**setting.pick(full, small))
    return model.to(setting.dtype).eval()


Denoise = Callable[[Tensor, Tensor], Tensor]


class _Nothing(TorchFunctionMode):
    """In this context PyTorch's attention is `no_attention`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return no_attention(*args[:3])
        return func(*args, **(kwargs or {}))


def _denoisers(model: Any, setting: Setting) -> tuple[Denoise, Denoise, Denoise]:
    """(eager attention, flashtile's, none): functions of latents and text."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    from flashtile.integrations.diffusers import TileAttnProcessor

    step = torch.tensor(500, device=setting.device)
    layers = [name.removesuffix(".processor") for name in model.attn_processors]

    def variant(processor: Any) -> Denoise:
        def denoise(latents: Tensor, text: Tensor) -> Tensor:
            # What `set_attn_processor` does, without its walk through the model.
            for layer in layers:
                model.get_submodule(layer).processor = processor
            found: Tensor = model(latents, step, text).sample
            return found

        return denoise

    other = variant(AttnProcessor2_0())

    def without(latents: Tensor, text: Tensor) -> Tensor:
        with _Nothing():
            return other(latents, text)

    return variant(AttnProcessor()), variant(TileAttnProcessor()), without


def _inputs(model: Any, batch: int, pixels: int, setting: Setting) -> tuple[Tensor, Tensor]:
    """(latents, text)."""
    side, words = setting.pick((pixels // 8, 77), (8, 5))
    shapes = ((batch, 4, side, side), (batch, words, model.config.cross_attention_dim))
    latents, text = (torch.randn(shape, device=setting.device, dtype=setting.dtype) for shape in shapes)
    return latents, text


def _inference(pixels: int) -> Any:
    """A denoising step of one image with guidance, batch 2; CUDA graphs, for the host's time would hide the GPU's."""

    def measure(setting: Setting, note: Note) -> Figures:
        note("building the model")
        model = _unet(setting)
        inputs = _inputs(model, 2, pixels, setting)

        def variant(denoise: Denoise) -> Call:
            return torch.no_grad()(lambda: denoise(*inputs))

        calls = [variant(denoise) for denoise in _denoisers(model, setting)]
        theirs, ours, without = (captured(call, setting) for call in calls)
        found = timed(Pair(theirs, ours, without=without), setting, note)
        return with_peaks(found, Pair(calls[0], calls[1]), setting)

    return measure


def _training(setting: Setting, note: Note) -> Figures:
    """Images a second of training, each variant at the largest batch that fits in a given memory."""
    budget = setting.pick(16 * 2**30, 2 * 2**20)
    note("building the model")
    model = _unet(setting).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=setting.cuda or None)

    def step_of(denoise: Denoise, batch: int) -> Call:
        latents, text = _inputs(model, batch, 512, setting)

        def step() -> Tensor:
            loss = denoise(latents, text).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    found: list[tuple[Call, int]] = []
    *both, nothing = _denoisers(model, setting)
    for denoise in both:
        step_of(denoise, 1)()  # the optimizer's state is there before anything is measured
        fits = [(step_of(denoise, 1), 1)]
        for batch in () if setting.rehearsal else setting.pick((2, 4, 8, 16, 32, 64, 128), (2,)):
            note(f"batch {batch}")
            step = step_of(denoise, batch)
            try:
                if memory.allocated_peak(step, setting.device) > budget:
                    break
            except torch.OutOfMemoryError:
                break
            fits.append((step, batch))
        found.append(fits[-1])
    (theirs, batch), (ours, our_batch) = found
    pair = Pair(theirs, ours, (batch, our_batch), same=False, without=step_of(nothing, our_batch))
    measured = with_busy(timed(pair, setting, note), pair, setting, note)
    return measured._replace(details={**measured.details, "budget": budget, "batches": [batch, our_batch]})


ROWS = (
    *(
        Row(
            f"unet-{pixels}",
            f"Stable Diffusion 1.5, a denoising step, {pixels} x {pixels} pixels",
            "2x, less memory",
            2.0,
            "diffusers, eager attention (AttnProcessor), as a CUDA graph",
            "the whole UNet: convolutions are most of it at small sizes; only attention differs",
            _inference(pixels),
            ("diffusers",),
            rehearsed=pixels == 512,
        )
        for pixels in (512, 1024)
    ),
    Row(
        "unet-training",
        "Stable Diffusion 1.5, training, images a second at the largest batch that fits in 16 GiB",
        "fine-tuning on hardware that costs a seventh",
        7.0,
        "diffusers, eager attention (AttnProcessor)",
        "the claim is of prices; this is the throughput that one amount of memory allows, weights not counted",
        _training,
        ("diffusers",),
    ),
)
