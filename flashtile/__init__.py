"""flashtile: exact attention at the hardware's limit, from one pure-Python install.

Importing this package loads neither triton nor any integration; the public names below are resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flashtile import fp8, kvcache, masks, reference
    from flashtile.api import attention, attention_kvcache, attention_varlen, builds, explain, explain_kvcache, warmup
    from flashtile.dropout import dropout_mask
    from flashtile.integrations.dispatcher import activate_sdpa, deactivate_sdpa
    from flashtile.integrations.flash_attn import install_as_flash_attn
    from flashtile.integrations.sdpa import replace_sdpa, sdpa
    from flashtile.masks import Mask
    from flashtile.state import State, combine, merge

# Public name -> the module that holds it. A module listed under its own name is exported whole.
_HOMES = {
    "attention": "api",
    "attention_kvcache": "api",
    "attention_varlen": "api",
    "builds": "api",
    "explain": "api",
    "explain_kvcache": "api",
    "warmup": "api",
    "combine": "state",
    "merge": "state",
    "State": "state",
    "Mask": "masks",
    "dropout_mask": "dropout",
    "fp8": "fp8",
    "kvcache": "kvcache",
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
    "attention_kvcache",
    "attention_varlen",
    "builds",
    "combine",
    "deactivate_sdpa",
    "dropout_mask",
    "explain",
    "explain_kvcache",
    "fp8",
    "install_as_flash_attn",
    "kvcache",
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
