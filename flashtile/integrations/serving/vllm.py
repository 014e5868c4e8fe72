"""vLLM's attention backend CUSTOM: `vllm serve ... --attention-backend CUSTOM --enforce-eager`.

vLLM finds `register` by an entry point of the package, in each of its processes, and imports the rest of this module
when the backend is chosen. Decoder layers with a cache of the model's dtype: grouped heads, sliding windows, ALiBi,
softcap, sinks, caches shared between layers. Mixed batches run as one call for each number of new tokens (`ragged`),
outside of CUDA graphs. Chunked prompts, prefix caching and preemption are the scheduler's, and only show in lengths and
pages.
"""

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashtile.check import guests as check
from flashtile.integrations.serving import ragged

try:
    from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, MultipleOf
except ImportError:  # vLLM before 0.14, or none: `register` does nothing then
    AttentionBackend = AttentionImpl = AttentionMetadataBuilder = object
    MultipleOf = int

logger = logging.getLogger("flashtile")

_PAGE = 16
_DECODER = "decoder"


def register() -> None:
    """Makes the backend known as CUSTOM, if nobody else has that name.

    Where vLLM keeps its interface elsewhere, the log says so at level INFO and nothing changes: a plug-in that raises
    would stop a server that never asked for it.
    """
    try:
        from vllm.v1.attention.backend import AttentionBackend as needed  # noqa: F401
        from vllm.v1.attention.backends import registry
    except ImportError as error:
        logger.info("flashtile is no backend of this vLLM, whose interface is another than that of 0.14: %s", error)
        return
    custom = registry.AttentionBackendEnum.CUSTOM
    if not custom.is_overridden():
        registry.register_backend(custom, f"{__name__}.{TileBackend.__qualname__}")


class TileBackend(AttentionBackend):
    """What vLLM asks before it runs anything. A block is (2, block_size, heads_kv, head_size): keys and values."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type:
        return TileImpl

    @staticmethod
    def get_builder_cls() -> type:
        return TileMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[Any]:
        return [MultipleOf(_PAGE)]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        check.page_size(block_size, _PAGE, "--block-size 16")
        return (num_blocks, 2, block_size, num_kv_heads, head_size)

    @staticmethod
    def use_cascade_attention(*_: Any, **__: Any) -> bool:
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        return True


@dataclass
class TileMetadata:
    """A step's batch. slots: where in the cache each new token goes; negative for tokens that are padding."""

    tokens: int
    slots: Tensor
    groups: list[ragged.Group]


class TileMetadataBuilder(AttentionMetadataBuilder):
    """Makes a step's `TileMetadata`, once for all layers of a kind."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> TileMetadata:
        """From vLLM's CommonAttentionMetadata."""
        given = common_attn_metadata
        check.causal_batch(given.causal)
        starts = given.query_start_loc_cpu.tolist()
        groups = ragged.grouped(starts, given.seq_lens, given.block_table_tensor)
        return TileMetadata(given.num_actual_tokens, given.slot_mapping, groups)


class TileImpl(AttentionImpl):
    """One layer's attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = _DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        check.engine_layer(attn_type, attn_type == _DECODER)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.writes = kv_sharing_target_layer_name is None
        self.slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        window = None if sliding_window is None else (sliding_window - 1, 0)
        self.options: dict[str, Any] = {"scale": self.scale, "window": window, "softcap": logits_soft_cap}
        self.sinks = sinks

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: TileMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Writes the new keys and values to the cache, and every token's attention to `output`.

        Args:
            query: (tokens or more, heads, head_size); key, value: (tokens or more, heads_kv, head_size).
            kv_cache: (blocks, 2, block_size, heads_kv, head_size).
            attn_metadata: None in the run that measures memory.
            output: (tokens or more, heads, head_size) or (tokens or more, heads * head_size).
        """
        check.no_quantised_output(output_scale, output_block_scale)
        if attn_metadata is None:
            return output.zero_()
        tokens = attn_metadata.tokens
        k_cache, v_cache = kv_cache.unbind(1)
        if self.writes and key is not None and value is not None:
            # Block 0 is nobody's; padding goes there.
            slots = attn_metadata.slots[:tokens].clamp(min=0)
            pages, rows = slots // k_cache.shape[1], slots % k_cache.shape[1]
            k_cache[pages, rows], v_cache[pages, rows] = key[:tokens], value[:tokens]
        if self.slopes is not None:
            self.slopes = self.slopes.to(query.device)
        beside = {"alibi_slopes": self.slopes, "sinks": self.sinks, **self.options}
        found = output.view(-1, self.num_heads, self.head_size)
        ragged.attention(query[:tokens], k_cache, v_cache, attn_metadata.groups, found, **beside)
        return output
