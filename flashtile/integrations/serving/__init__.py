"""Attention backends of serving engines, over `attention_kvcache`: `vllm` and `sglang`, with `ragged` between."""
