"""flashtile: exact attention at the hardware's limit, from one pure-Python install.

Importing this package loads neither triton nor any integration; the public names below are resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flashtile import masks, reference
    from flashtile.api import attention, attention_varlen, builds, explain, warmup
    from flashtile.dropout import dropout_mask
    from flashtile.integrations.dispatcher import activate_sdpa, deactivate_sdpa
    from flashtile.integrations.flash_attn import install_as_flash_attn
    from flashtile.integrations.sdpa import replace_sdpa, sdpa
    from flashtile.masks import Mask
    from flashtile.state import State, merge

# Public name -> the module that holds it. A module listed under its own name is exported whole.
_HOMES = {
    "attention": "api",
    "attention_varlen": "api",
    "builds": "api",
    "explain": "api",
    "warmup": "api",
    "merge": "state",
    "State": "state",
    "Mask": "masks",
    "dropout_mask": "dropout",
    "masks": "masks",
    "reference": "reference",
    "activate_sdpa": "integrations.dispatcher",
    "deactivate_sdpa": "integrations.dispatcher",
    "install_as_flash_attn": "integrations.flash_attn",
    "replace_sdpa": "integrations.sdpa",
    "sdpa": "integrations.sdpa",
}

__all__ = [
    "Mask",
    "State",
    "activate_sdpa",
    "attention",
    "attention_varlen",
    "builds",
    "deactivate_sdpa",
    "dropout_mask",
    "explain",
    "install_as_flash_attn",
    "masks",
    "merge",
    "reference",
    "replace_sdpa",
    "sdpa",
    "warmup",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'flashtile' has no attribute {name!r}; public names: {', '.join(__all__)}")
    module = import_module(f"flashtile.{home}")
    value = module if home == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
