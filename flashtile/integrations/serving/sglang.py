"""SGLang's attention backend "flashtile": `--attention-backend flashtile --page-size 64 --disable-cuda-graph`.

SGLang finds `register` by an entry point of the package, and calls `create` when the backend is chosen. Decoder layers
over a plain pool of keys and values: grouped heads, windows, softcap, sinks, values of another width. SGLang keeps a
slot for every token and gives slots out in whole pages, of which the kernels need 16 slots or more.
"""

import logging
from typing import Any

from torch import Tensor

from flashtile.check import guests as check
from flashtile.integrations.serving import ragged

try:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
except ImportError:  # none, or one with another interface: `register` does nothing then
    AttentionBackend = object

logger = logging.getLogger("flashtile")

NAME = "flashtile"
_PAGE = 16


def register() -> None:
    """Makes the backend known by its name, to SGLang and to its command line.

    Where SGLang has another interface, the log says so at level INFO and nothing changes, as in `vllm`.
    """
    try:
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang.srt.layers.attention.base_attn_backend import AttentionBackend as needed  # noqa: F401
        from sglang.srt.server_args import add_attention_backend_choices
    except ImportError as error:
        logger.info("flashtile is no backend of this SGLang, whose interface is another than 0.5.23's: %s", error)
        return
    register_attention_backend(NAME)(create)
    add_attention_backend_choices([NAME])


def create(runner: Any) -> "TileBackend":
    """The backend of a ModelRunner."""
    check.engine_layer("latent attention (MLA)", not getattr(runner, "use_mla_backend", False))
    return TileBackend(runner)


class TileBackend(AttentionBackend):
    """Attention of all layers of a runner."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.pool, self.slots = runner.token_to_kv_pool, runner.req_to_token_pool
        self.page_size = runner.page_size
        check.page_size(self.page_size, _PAGE, "--page-size 64")
        check.engine_layer("a pool of sliding windows", not getattr(self.pool, "swa_layer_nums", 0))
        self.forward_metadata: list[ragged.Group] | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Once a step, before its layers run."""
        mode = forward_batch.forward_mode
        check.engine_layer("speculative decoding", not (mode.is_target_verify() or mode.is_draft_extend_v2()))
        requests = len(forward_batch.seq_lens)
        extended = forward_batch.extend_seq_lens_cpu or []
        counts = [1] * requests if mode.is_decode() else list(extended)
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + int(count))
        longest = int(forward_batch.seq_lens_cpu.max()) if requests else 0
        # A page's slots follow each other, so that its first one names it.
        firsts = self.slots.req_to_token[:, : max(longest, 1) : self.page_size]
        table = firsts[forward_batch.req_pool_indices] // self.page_size
        self.forward_metadata = ragged.grouped(starts, forward_batch.seq_lens, table)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """q: (tokens, heads * headdim) or (tokens, heads, headdim) -> (tokens, heads * headdim_v)."""
        check.engine_layer("cross attention", not layer.is_cross_attention)
        attn_type = getattr(layer.attn_type, "value", layer.attn_type)
        check.engine_layer(str(attn_type), attn_type == "decoder")
        if save_kv_cache and k is not None:
            self.pool.set_kv_buffer(layer, _where(forward_batch), k, v)
        caches = (self.pool.get_key_buffer(layer.layer_id), self.pool.get_value_buffer(layer.layer_id))
        k_cache, v_cache = (cache.unflatten(0, (-1, self.page_size)) for cache in caches)
        window = (layer.sliding_window_size, 0) if layer.sliding_window_size > -1 else None
        queries = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = queries.new_zeros(*queries.shape[:-1], layer.v_head_dim)
        groups = self.forward_metadata or []
        options = {"scale": layer.scaling, "window": window, "softcap": layer.logit_cap, "sinks": sinks}
        return ragged.attention(queries, k_cache, v_cache, groups, out, **options).flatten(1)

    forward_decode = forward_extend


def _where(forward_batch: Any) -> Any:
    """Where new tokens go, in the words of the pool."""
    from sglang.srt.mem_cache import memory_pool

    location = getattr(memory_pool, "KVWriteLoc", None)
    return forward_batch.out_cache_loc if location is None else location.for_batch(forward_batch)
