"""What the integrations refuse: the versions and arguments of other libraries' doors."""

from collections.abc import Sequence
from typing import Any


def sdpa_device(value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"device: got {value!r}, need one of {', '.join(map(repr, known))}; try 'cuda'")


def has_flash_registry(attention: Any) -> None:
    """`attention`: the module torch.nn.attention."""
    if not hasattr(attention, "register_flash_attention_impl"):
        raise NotImplementedError(
            "activate_sdpa: got a PyTorch without torch.nn.attention.register_flash_attention_impl, need one that has "
            "it; try flashtile.replace_sdpa(), which needs nothing of the kind"
        )
