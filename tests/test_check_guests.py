"""Every message of the integrations' checks, whether or not the library in question is installed."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flashtile.check import guests
from tests.raises import lines_run, raises
from tests.test_check import Refusal

T = torch.zeros(1, 2, 3, 4, 5)
PAIRS = torch.zeros(1, 1, 4, 3, 3)
PAGED = type("PagedAttentionCache", (), {})()
NONE = NotImplementedError
F = ("f32",)
FLAT = dict.fromkeys("qkv", ((1, 3, 4, 5), "f32"))


def _with(name: str, *shape: int) -> dict[str, tuple[tuple[int, ...], str]]:
    return {**FLAT, name: (shape, "f32")}


TABLE = [
    Refusal(
        ValueError, "device", "'tpu', need one of 'cuda', 'cpu'", lambda: guests.sdpa_device("tpu", ("cuda", "cpu"))
    ),
    Refusal(NONE, "activate_sdpa", "a PyTorch without", lambda: guests.has_flash_registry(SimpleNamespace())),
    Refusal(ValueError, "cache_seqlens", "None beside k, need the place", lambda: guests.needs_cache_seqlens(T)),
    Refusal(ValueError, "k", "None beside cu_seqlens_k_new", lambda: guests.rows_for_offsets(None, T)),
    Refusal(ValueError, "cache_seqlens", "9 for sequence 1", lambda: guests.rows_that_fit([8, 9], [4, 4], 12)),
    Refusal(NONE, "dropout_p", "0.1 beside block_table, need 0", lambda: guests.no_paged_dropout(0.1)),
    Refusal(NONE, "leftpad_k", "Tensor, need None: .* no left-padded", lambda: guests.no_left_padding(T)),
    Refusal(NONE, "k_descale", "Tensor, need None: .* 8-bit", lambda: guests.no_descales({"k_descale": T})),
    Refusal(NONE, "qv", "one beside 8-bit", lambda: guests.absorbed_of_eight_bits(T)),
    Refusal(ValueError, "qkv", r"shape \(1, 2, 3, 4\), need", lambda: guests.packed_heads(T[0][None, ..., 0], None)),
    Refusal(ValueError, "num_heads_q", "1 of 4 heads, need it to leave", lambda: guests.packed_heads(T[0], 1)),
    Refusal(ValueError, "rng_state", "None with dropout, need what the forward", guests.no_rng_state),
    Refusal(ValueError, "modules", "'a', need some of", lambda: guests.flash_attn_modules("a", ("a", "b"))),
    Refusal(
        ImportError, "m", "flashtile in its place already", lambda: guests.not_installed("m", "d", "1+flashtile", True)
    ),
    Refusal(ImportError, "m", r"the real package .*d 1\.2", lambda: guests.not_installed("m", "d", "1.2", True)),
    Refusal(ImportError, "m", "the real package .*unknown", lambda: guests.not_installed("m", "d", None, True)),
    Refusal(NONE, "attention_mask", "chunks inside of context_parallel", lambda: guests.mask_of_shares("chunks")),
    Refusal(ValueError, "position_ids", "others than the places", lambda: guests.positions_of_shares(False)),
    Refusal(NONE, "cache", "transformers' paged cache", lambda: guests.no_paged_batching({"cache": PAGED})),
    Refusal(NONE, "k_cache", "transformers' paged cache", lambda: guests.no_paged_batching({"k_cache": T})),
    Refusal(
        NONE,
        "use_flash_name",
        "transformers 5.1, need 5.2 or 5.3",
        lambda: guests.transformers_tested("5.1", ("5.2", "5.3"), 1),
    ),
    Refusal(
        NONE, "use_flash_name", "transformers 5.2.1, need", lambda: guests.transformers_tested("5.2.1", ("5.2",), None)
    ),
    Refusal(TypeError, "q", "int, need a torch.Tensor", lambda: guests.evoformer(1, T, T, [])),
    Refusal(ValueError, "k", r"shape \(4, 5\), need \(\.\.\., rows", lambda: guests.evoformer(T, T[0, 0, 0], T, [])),
    Refusal(ValueError, "v", r"shape .*, need \(1, 2\) before", lambda: guests.evoformer(T, T, T[:, :1], [])),
    Refusal(ValueError, "biases", "3, need at most two", lambda: guests.evoformer(T, T, T, [PAIRS] * 3)),
    Refusal(ValueError, r"biases\[0\]", r"shape \(1, 2, 3, 4, 5\), need", lambda: guests.evoformer(T, T, T, [T])),
    Refusal(ValueError, "biases", "two of shape", lambda: guests.evoformer(T, T, T, [PAIRS, PAIRS])),
    Refusal(ValueError, "k", r"shape .*, need \(batch, rows, heads", lambda: guests.triangle(T, T[0], T, T, None)),
    Refusal(ValueError, "bias", r"shape .*, need \(1, 1, 3, 4, 4\)", lambda: guests.triangle(T, T, T, T, None)),
    Refusal(NONE, "diffusers", "version 0.1, need 0.2", lambda: guests.diffusers_tested("0.1", ("0.2",), 1)),
    Refusal(NONE, "return_lse", "True, need False", lambda: guests.diffusers_options(True, None)),
    Refusal(NONE, "parallel_config", "diffusers' context", lambda: guests.diffusers_options(False, 1)),
    Refusal(ValueError, "segment_ids", "a tuple of 3, need the ids", lambda: guests.jax_pair((T, T, T))),
    Refusal(TypeError, "k", "dtype int8, need one of f32", lambda: guests.jax_arrays({**FLAT, "k": ((), "int8")}, F)),
    Refusal(ValueError, "v", r"shape \(4, 5\), need \(", lambda: guests.jax_arrays({**FLAT, "v": ((4, 5), "f32")}, F)),
    Refusal(ValueError, "bias", r"shape \(5,\), need .*\(1, 4, 3, 3\)", lambda: guests.jax_arrays(_with("bias", 5), F)),
    Refusal(ValueError, "segment_ids", r"shape \(1,\), need", lambda: guests.jax_arrays(_with("key_ids", 1), F)),
    Refusal(ValueError, "sinks", r"shape \(1, 4\), need", lambda: guests.jax_arrays(_with("sinks", 1, 4), F)),
    Refusal(ValueError, "constant", r"\('q',\), need some of", lambda: guests.jax_constants(("q",))),
    Refusal(ValueError, "page_size", "1, need a multiple of 16; try x", lambda: guests.page_size(1, 16, "x")),
    Refusal(NONE, "attention", "cross attention, need decoder", lambda: guests.engine_layer("cross attention", False)),
    Refusal(NONE, "causal", "other than True, need a causal", lambda: guests.causal_batch(T)),
    Refusal(NONE, "output_scale", "one, need None", lambda: guests.no_quantised_output(None, T)),
    Refusal(RuntimeError, "attention_mask", "packed sequences with blocks", lambda: guests.no_later_key(T == 0)),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=f"{n}-{row.argument}") for n, row in enumerate(TABLE)])
def test_message(row: Refusal) -> None:
    """The message starts with the name of what is wrong, says what it got, what it needs and what to try."""
    with pytest.raises(row.error, match=f"^{row.argument}: got .*{row.says}") as caught:
        row.call()
    assert type(caught.value) is row.error
    assert re.search("[,;] need ", str(caught.value)), str(caught.value)
    assert re.search("[,;] (try|or|qkv is) ?", str(caught.value)), str(caught.value)


def test_every_message_is_in_the_table() -> None:
    path = Path(guests.__file__)
    wanted = raises([path])
    assert len(wanted) > 20
    assert sorted(wanted - lines_run(path.parent, [(row.call, row.error) for row in TABLE])) == []


def test_what_is_sound_passes() -> None:
    guests.has_flash_registry(SimpleNamespace(register_flash_attention_impl=1))
    guests.packed_heads(T[0], 2)
    guests.flash_attn_modules(["a"], ("a", "b"))
    guests.not_installed("m", "d", None, False)
    guests.no_paged_batching({"cache": object(), "block_table": None})
    guests.transformers_tested("5.2.7", ("5.2",), 1)
    guests.diffusers_tested("0.2.3", ("0.2",), 1, 2)
    guests.evoformer(T, T, T, [None, torch.zeros(1, 1, 4, 3, 3), torch.zeros(1, 2, 1, 1, 3)])
    guests.triangle(T, T, T, torch.zeros(1, 1, 3, 4, 4), torch.zeros(1, 2, 1, 1, 4))
    guests.no_later_key(T == 1)
    guests.no_paged_dropout(0.0)
    guests.rows_for_offsets(T, T)
    guests.rows_that_fit([8, 0], [4, 4], 12)
    guests.page_size(32, 16, "x")
    guests.engine_layer("cross attention", True)
    guests.causal_batch(True)
    guests.no_quantised_output(None, None)
    guests.jax_pair((T, T))
    guests.jax_arrays({**_with("mask", 3), **_with("bias", 1, 3, 1), **_with("query_ids", 3)}, F)
    guests.jax_constants({"bias", "sinks"})
