"""Rows of image generation: Stable Diffusion 1.5's UNet as diffusers has it, with random weights and latents."""

from typing import Any

import torch
from torch import Tensor

from flashtile.bench.paper.experiment import Call, Figures, Note, Pair, Row, Setting, timed, with_peaks


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


def _inference(pixels: int) -> Any:
    """A denoising step of one image with guidance, batch 2."""

    def measure(setting: Setting, note: Note) -> Figures:
        from diffusers.models.attention_processor import AttnProcessor

        from flashtile.integrations.diffusers import TileAttnProcessor

        note("building the model")
        model = _unet(setting)
        side = setting.pick(pixels // 8, 8)
        latents = torch.randn(2, 4, side, side, device=setting.device, dtype=setting.dtype)
        text = torch.randn(
            2, setting.pick(77, 5), model.config.cross_attention_dim, device=setting.device, dtype=setting.dtype
        )
        step = torch.tensor(500, device=setting.device)

        def variant(processors: dict[str, Any]) -> Call:
            @torch.no_grad()
            def denoise() -> Tensor:
                # What `set_attn_processor` does, without its walk through the model.
                for layer, processor in processors.items():
                    model.get_submodule(layer.removesuffix(".processor")).processor = processor
                found: Tensor = model(latents, step, text).sample
                return found

            return denoise

        names = list(model.attn_processors)
        theirs, tiled = ({name: kind() for name in names} for kind in (AttnProcessor, TileAttnProcessor))
        pair = Pair(variant(theirs), variant(tiled))
        return with_peaks(timed(pair, setting, note), pair, setting)

    return measure


ROWS = tuple(
    Row(
        f"unet-{pixels}",
        f"Stable Diffusion 1.5, a denoising step, {pixels} x {pixels} pixels",
        "2x, less memory",
        2.0,
        "diffusers, eager attention (AttnProcessor)",
        "the whole UNet: convolutions are most of it at small sizes; only attention differs",
        _inference(pixels),
        ("diffusers",),
    )
    for pixels in (512, 1024)
)
