"""Hugging Face transformers 5: import this module, then ask for `attn_implementation="tile_attention"`.

The import registers flashtile's attention and its mask function under that name, with transformers' own interfaces for
both; `model.set_attn_implementation("tile_attention")` and `from_pretrained(..., attn_implementation=...)` take it.
(A name with "flash" in it means something else to transformers, see `use_flash_name`.)
"""

from transformers import AttentionInterface, AttentionMaskInterface

from flashtile.integrations.transformers.attention import attention_forward
from flashtile.integrations.transformers.flash_name import use_flash_name
from flashtile.integrations.transformers.masks import attention_mask

__all__ = ["NAME", "attention_forward", "attention_mask", "use_flash_name"]

NAME = "tile_attention"

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
