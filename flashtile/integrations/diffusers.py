"""diffusers: the attention backend "flashtile", and a processor for UNets.

`import flashtile.integrations.diffusers` adds the backend to diffusers' dispatcher, which has no official place for
others: its enumeration of names gets one more member. Then `model.set_attention_backend("flashtile")`, or
`with attention_backend("flashtile"):`, for models that use the dispatcher (Flux and most newer transformers).
diffusers' own ways apply: setting it on one model makes it the default of all, and it is a silent no-op on models that
do not use the dispatcher, UNets among them. Those take `unet.set_attn_processor(TileAttnProcessor())`.
"""

from typing import Any

import diffusers
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from flashtile.check import guests as check
from flashtile.integrations.sdpa import replace_sdpa, sdpa

__all__ = ["NAME", "TileAttnProcessor"]

NAME = "flashtile"
_TESTED = ("0.42",)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """The dispatcher's layout is (batch, seqlen, heads, headdim); everything else means what it does in `sdpa`."""
    check.diffusers_options(return_lse, _parallel_config)
    if attn_mask is not None and tuple(attn_mask.shape) == (query.shape[0], key.shape[1]):
        # As in diffusers' own backends, a mask of keys.
        attn_mask = attn_mask[:, None, None, :]
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out = sdpa(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    return out.transpose(1, 2)


class TileAttnProcessor(AttnProcessor2_0):
    """diffusers' processor for PyTorch's attention function, with flashtile as that function."""

    def __call__(self, *arguments: Any, **more: Any) -> Tensor:
        with replace_sdpa():
            out: Tensor = super().__call__(*arguments, **more)
        return out


def _register() -> None:
    names: Any = getattr(attention_dispatch, "AttentionBackendName", None)
    registry: Any = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
    check.diffusers_tested(diffusers.__version__, _TESTED, names, registry)
    if NAME in names._value2member_map_:
        return
    member = str.__new__(names, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    names._member_map_[NAME.upper()] = names._value2member_map_[NAME] = member
    names._member_names_.append(NAME.upper())
    constraints = [attention_dispatch._check_device, attention_dispatch._check_shape]
    registry.register(member, constraints=constraints)(_attention)


_register()
