"""flash-attn's functions over flashtile's kernels: `from flashtile.integrations.flash_attn import flash_attn_func`.

The names of `flash_attn` 2.8 are here; those of FlashAttention-3's `flash_attn_interface` in
`flashtile.integrations.flash_attn.version3`, and `flash_attn.bert_padding` in `.bert_padding`. Arguments, defaults,
shapes and results are theirs. Where more is possible it is taken: the CPU, float32, any head dimension, dropout beside
softcap. Three things differ, see docs/integrations.md: a row that sees no key has log-sum-exp -inf, log-sum-exps pass
gradients on, and dropout draws other random numbers.
"""

from flashtile.integrations.flash_attn.install import install_as_flash_attn
from flashtile.integrations.flash_attn.version2 import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install_as_flash_attn",
]
