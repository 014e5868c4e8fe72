"""The opt-in route under a name with "flash" in it, for models that ask for the name.

Some models, most of them vision towers, hand over packed sequences (cu_seqlens) only to implementations whose name
contains "flash"; others get a loop of one call an image. transformers loads such implementations by a private function,
which `use_flash_name` extends; that is why it is a choice, and why it checks the version.
"""

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

from flashtile.api import attention, attention_varlen
from flashtile.check import guests as check
from flashtile.integrations.flash_attn.common import Maximum, Window, options

FLASH_NAME = "flashtile"
_TESTED = ("5.23", "5.24")
_LOADER = "_lazy_imports"


def use_flash_name(*model_classes: type) -> str:
    """Registers flashtile as the flash-attention implementation "flashtile" and returns that name.

    transformers then treats it as it treats "flash_attention_2": its own wrapper unpads, packs and calls flashtile's
    functions, with sliding windows, softcap and sinks. Masks that flash-attention cannot express are lost there, as
    with any flash-attention: prefer "tile_attention" where the model does not ask for a flash name.

    Args:
        model_classes: models that list the flash-attention implementations they work with (GPT-OSS is one) and to
            whose lists the name is to be added.

    Raises:
        NotImplementedError: this version of transformers was not tested, or works otherwise.
    """
    load: Any = getattr(modeling_flash_attention_utils, _LOADER, None)
    check.transformers_tested(transformers.__version__, _TESTED, load)
    if not getattr(load, "loads_flashtile", False):
        setattr(modeling_flash_attention_utils, _LOADER, _extended(load))
    AttentionInterface.register(FLASH_NAME, flash_attention_forward)
    AttentionMaskInterface.register(FLASH_NAME, flash_attention_mask)
    for model_class in model_classes:
        _allow(model_class)
    return FLASH_NAME


def _extended(load: Callable[..., Any]) -> Callable[..., Any]:
    def lazy_imports(implementation: str | None, *arguments: Any, **more: Any) -> Any:
        if implementation != FLASH_NAME:
            return load(implementation, *arguments, **more)
        pad, unpad = modeling_flash_attention_utils._pad_input, modeling_flash_attention_utils._unpad_input
        return _dense, _packed, None, pad, unpad

    lazy_imports.loads_flashtile = True  # type: ignore[attr-defined]
    return lazy_imports


def _allow(model_class: type) -> None:
    """Adds the name to the lists of the class and of its bases; a model's head and body look at their own."""
    for base in inspect.getmro(model_class):
        names = vars(base).get("_compatible_flash_implementations")
        if names is not None and FLASH_NAME not in names:
            base._compatible_flash_implementations = [*names, FLASH_NAME]  # type: ignore[attr-defined]


# transformers passes on what it finds by name in the signature of `_packed`, and drops the rest without a word.


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    chosen = options(softmax_scale, causal, window_size, softcap, deterministic)
    return attention(q, k, v, dropout_p=dropout_p, sinks=s_aux, **chosen)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: Maximum | None = None,
    max_seqlen_k: Maximum | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    return attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        dropout_p=dropout_p,
        sinks=s_aux,
        **options(softmax_scale, causal, window_size, softcap, deterministic),
    )
