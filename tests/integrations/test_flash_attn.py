"""flash-attn's functions: their signatures, and their results against the reference in float64."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile import reference
from flashtile.integrations import flash_attn
from flashtile.integrations.flash_attn import bert_padding, lowlevel, version3
from tests.integrations.rule import assert_close, ran

FA2 = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
PACKED = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
DESCALES = "q_descale=None, k_descale=None, v_descale=None"
LOCAL = "window_size=(-1, -1), attention_chunk=0, softcap=0.0"
FA3_TAIL = (
    f"softmax_scale=None, causal=False, qv=None, {DESCALES}, {LOCAL}, num_splits=1, pack_gqa=None, "
    "deterministic=False, sm_margin=0, return_attn_probs=False"
)
CACHE = "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None"
SIGNATURES = {
    flash_attn.flash_attn_func: f"q, k, v, {FA2}",
    flash_attn.flash_attn_kvpacked_func: f"q, kv, {FA2}",
    flash_attn.flash_attn_qkvpacked_func: f"qkv, {FA2}",
    flash_attn.flash_attn_varlen_func: f"q, k, v, {PACKED}, {FA2}, block_table=None",
    flash_attn.flash_attn_varlen_kvpacked_func: f"q, kv, {PACKED}, {FA2}",
    flash_attn.flash_attn_varlen_qkvpacked_func: f"qkv, cu_seqlens, max_seqlen, {FA2}",
    flash_attn.flash_attn_with_kvcache: (
        f"q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, {CACHE}, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, "
        "alibi_slopes=None, num_splits=0, return_softmax_lse=False"
    ),
    version3.flash_attn_func: f"q, k, v, {FA3_TAIL}",
    version3.flash_attn_varlen_func: f"q, k, v, {PACKED}, seqused_q=None, seqused_k=None, {FA3_TAIL}",
    version3.flash_attn_qkvpacked_func: (
        f"qkv, softmax_scale=None, causal=False, {DESCALES}, {LOCAL}, deterministic=False, num_heads_q=None, "
        "sm_margin=0, return_attn_probs=False"
    ),
    version3.flash_attn_combine: "out_partial, lse_partial, out=None, out_dtype=None",
    version3.flash_attn_with_kvcache: (
        f"q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, {CACHE}, page_table=None, "
        f"cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, {DESCALES}, "
        f"softmax_scale=None, causal=False, {LOCAL}, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, "
        "pack_gqa=None, sm_margin=0, return_softmax_lse=False"
    ),
    version3.get_scheduler_metadata: (
        "batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, cache_seqlens, "
        "qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None, cache_leftpad=None, "
        "page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1), attention_chunk=0, "
        "has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0"
    ),
    lowlevel._flash_attn_forward: (
        "q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, "
        "return_softmax"
    ),
    lowlevel._flash_attn_backward: (
        "dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, "
        "window_size_right, softcap, alibi_slopes, deterministic, rng_state=None"
    ),
    lowlevel._flash_attn_varlen_forward: (
        f"q, k, v, {PACKED}, dropout_p, softmax_scale, causal, window_size_left=-1, window_size_right=-1, softcap=0.0, "
        "alibi_slopes=None, return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, "
        "zero_tensors=False, num_splits=0"
    ),
    lowlevel._flash_attn_varlen_backward: (
        f"dout, q, k, v, out, softmax_lse, dq, dk, dv, {PACKED}, dropout_p, softmax_scale, causal, window_size_left, "
        "window_size_right, softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False"
    ),
    bert_padding.unpad_input: "hidden_states, attention_mask, unused_mask=None",
    bert_padding.unpad_input_for_concatenated_sequences: "hidden_states, attention_mask_in_length",
    bert_padding.pad_input: "hidden_states, indices, batch, seqlen",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: f"{function.__module__}.{function.__name__}")
def test_signatures(function: Any) -> None:
    found = inspect.signature(function)
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    assert str(inspect.Signature(plain)) == f"({SIGNATURES[function]})"


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def _specified(leaves: list[Tensor], dtype: torch.dtype | None, **options: Any) -> list[Tensor]:
    """out, lse and gradients of the specification."""
    used = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    out, lse = reference.attention(*used, dtype=dtype, **options)
    return [out, lse, *torch.autograd.grad(_sum(out), used)]


def _sum(out: Tensor) -> Tensor:
    return (out * torch.linspace(-1, 1, out.numel()).sin().reshape(out.shape)).sum()


def _compare(found: list[Tensor], leaves: list[Tensor], **options: Any) -> None:
    """out, lse, dq, dk, dv."""
    truth, textbook = _specified(leaves, torch.float64, **options), _specified(leaves, None, **options)
    textbook[1] = _specified(leaves, torch.float32, **options)[1]
    for name, *three in zip(("out", "lse", "dq", "dk", "dv"), found, textbook, truth, strict=True):
        assert_close(*three, name, leaves[0].dtype if name == "lse" else None)


SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.02])
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window_size": (5, 2), "softmax_scale": 0.3}, {"window": (5, 2), "scale": 0.3}),
    "left window": ({"window_size": (4, -1), "causal": True}, {"window": (4, None), "causal": True}),
    "window in a tensor": ({"window_size": torch.tensor([5, 2])}, {"window": (5, 2)}),
    "right window": ({"window_size": (-1, 3)}, {"window": (None, 3)}),
    "softcap": ({"softcap": 2.0, "deterministic": True}, {"softcap": 2.0}),
    "alibi": ({"alibi_slopes": SLOPES, "causal": True}, {"alibi_slopes": SLOPES, "causal": True}),
}


class TestVersion2:
    @pytest.mark.parametrize("case", OPTIONS)
    def test_dense(self, case: str) -> None:
        theirs, ours = OPTIONS[case]
        leaves = [_normal(2, 13, 4, 16), _normal(2, 21, 2, 16), _normal(2, 21, 2, 16)]
        with ran():
            out, lse, weights = flash_attn.flash_attn_func(*leaves, **theirs, return_attn_probs=True)
        assert weights.shape == (0,)
        assert lse.dtype is torch.float32
        _compare([out, lse, *torch.autograd.grad(_sum(out), leaves)], leaves, **ours)
        assert torch.equal(out, flash_attn.flash_attn_func(*leaves, **theirs))

    def test_kvpacked(self) -> None:
        q, kv = _normal(2, 13, 4, 16), _normal(2, 13, 2, 2, 16)
        with ran():
            out, lse, _ = flash_attn.flash_attn_kvpacked_func(q, kv, causal=True, return_attn_probs=True)
        dq, dkv = torch.autograd.grad(_sum(out), (q, kv))
        _compare([out, lse, dq, *dkv.unbind(2)], [q, *kv.unbind(2)], causal=True)

    def test_qkvpacked(self) -> None:
        qkv = _normal(2, 13, 3, 4, 16)
        with ran():
            out, lse, _ = flash_attn.flash_attn_qkvpacked_func(qkv, 0.0, 0.4, True, return_attn_probs=True)
        (gradient,) = torch.autograd.grad(_sum(out), qkv)
        _compare([out, lse, *gradient.unbind(2)], list(qkv.unbind(2)), causal=True, scale=0.4)

    @pytest.mark.parametrize("packing", ["three", "kv", "qkv"])
    def test_varlen(self, packing: str) -> None:
        """Each sequence alone gives the same."""
        offsets = torch.tensor([0, 9, 9, 22], dtype=torch.int32)
        qkv = _normal(22, 3, 4, 16)
        q, k, v = qkv.unbind(1)
        options: dict[str, Any] = {"causal": True, "softcap": 3.0, "return_attn_probs": True}
        with ran():
            if packing == "three":
                out, lse, _ = flash_attn.flash_attn_varlen_func(q, k, v, offsets, offsets, 13, 13, **options)
            elif packing == "kv":
                out, lse, _ = flash_attn.flash_attn_varlen_kvpacked_func(
                    q, qkv[:, 1:], offsets, offsets, torch.tensor(13), 13, **options
                )
            else:
                out, lse, _ = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, offsets, 13, **options)
        weight = torch.linspace(-1, 1, 22)[:, None, None]
        (gradient,) = torch.autograd.grad((out * weight).sum(), qkv)
        for begin, end in ((0, 9), (9, 22)):
            alone = qkv[None, begin:end].detach().requires_grad_()
            expected = flash_attn.flash_attn_qkvpacked_func(alone, causal=True, softcap=3.0, return_attn_probs=True)
            torch.testing.assert_close(out[begin:end], expected[0][0])
            torch.testing.assert_close(lse[:, begin:end], expected[1][0])
            (wanted,) = torch.autograd.grad((expected[0][0] * weight[begin:end]).sum(), alone)
            torch.testing.assert_close(gradient[begin:end], wanted[0], rtol=2**-6, atol=2**-6)

    @pytest.mark.parametrize("varlen", [False, True])
    def test_weights_with_dropout(self, varlen: bool) -> None:
        """The weights that are not negative, rescaled, times the values are the output."""
        q, k, v = (_normal(2, 9, 4, 16, dtype=torch.float32) for _ in range(3))
        if varlen:
            offsets = torch.tensor([0, 9, 18], dtype=torch.int32)
            packed = [tensor.flatten(0, 1) for tensor in (q, k, v)]
            results = flash_attn.flash_attn_varlen_func(
                *packed, offsets, offsets, 9, 9, 0.3, causal=True, return_attn_probs=True
            )
            out, weights = results[0].unflatten(0, (2, 9)), results[2]
        else:
            out, _, weights = flash_attn.flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)
        assert weights.shape == (2, 4, 9, 9)
        torch.testing.assert_close(weights.abs().sum(-1), torch.ones(2, 4, 9))
        assert 0.1 < (weights < 0).sum() / (weights != 0).sum() < 0.5
        torch.testing.assert_close(out, (weights.relu() / 0.7 @ v.transpose(1, 2)).transpose(1, 2))

    def test_gradients_of_dropout(self) -> None:
        q, k, v = (_normal(2, 9, 4, 16, dtype=torch.float32) for _ in range(3))
        torch.manual_seed(5)
        out, _, weights = flash_attn.flash_attn_func(q, k, v, 0.3, return_attn_probs=True)
        (found,) = torch.autograd.grad(_sum(out), v)
        (wanted,) = torch.autograd.grad(_sum((weights.relu() / 0.7 @ v.transpose(1, 2)).transpose(1, 2)), v)
        torch.testing.assert_close(found, wanted)

    def test_compiled(self) -> None:
        q = _normal(1, 9, 2, 16)
        compiled = torch.compile(flash_attn.flash_attn_func, fullgraph=True, backend="aot_eager")
        with ran():
            found = compiled(q, q, q, causal=True)
        torch.testing.assert_close(found, flash_attn.flash_attn_func(q, q, q, causal=True))


class TestVersion3:
    def test_chunks(self) -> None:
        leaves = [_normal(2, 13, 4, 16), _normal(2, 21, 2, 16), _normal(2, 21, 2, 8)]
        with ran():
            out, lse = version3.flash_attn_func(*leaves, None, True, attention_chunk=6, return_attn_probs=True)
        found = [out, lse, *torch.autograd.grad(_sum(out), leaves)]
        rule = lambda b, h, q_idx, kv_idx: (q_idx + 8) // 6 == kv_idx // 6  # noqa: E731
        _compare(found, leaves, causal=True, mask=rule)

    def test_absorbed_queries(self) -> None:
        q, k = _normal(1, 5, 4, 8, dtype=torch.float32), _normal(1, 9, 1, 8, dtype=torch.float32)
        v, qv = _normal(1, 9, 1, 24, dtype=torch.float32), _normal(1, 5, 4, 24, dtype=torch.float32)
        with ran():
            out = version3.flash_attn_func(q, k, v, qv=qv)
        scores = torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]) + torch.einsum("bqhd,bkd->bhqk", qv, v[:, :, 0])
        expected = torch.einsum("bhqk,bkd->bqhd", torch.softmax(scores * 32**-0.5, -1), v[:, :, 0])
        torch.testing.assert_close(out, expected)

    @pytest.mark.parametrize("packed", [False, True])
    def test_eight_bits(self, packed: bool) -> None:
        """Numbers that are exact in 8 bits, beside bfloat16 tensors of what they stand for; packed, without scales."""
        q, k, v = (torch.randint(-3, 4, (2, n, heads, 16)).float() for n, heads in ((5, 4), (9, 2), (9, 2)))
        scales = [torch.ones(2, 2) if packed else torch.rand(2, 2) + 0.5 for _ in range(3)]
        groups = zip((q, k, v), scales, (2, 1, 1), strict=True)
        meant = [data * scale.repeat_interleave(group, 1)[:, None, :, None] for data, scale, group in groups]
        eight = [data.to(torch.float8_e4m3fn) for data in (q, k, v)]
        with ran():
            if packed:
                offsets = [torch.arange(3, dtype=torch.int32) * data.shape[1] for data in (q, k)]
                flat = [data.flatten(0, 1) for data in eight]
                out = version3.flash_attn_varlen_func(*flat, *offsets, 5, 9, causal=True).unflatten(0, (2, 5))
            else:
                names = ("q_descale", "k_descale", "v_descale")
                out = version3.flash_attn_func(*eight, causal=True, **dict(zip(names, scales, strict=True)))
        assert out.dtype is torch.bfloat16
        expected = version3.flash_attn_func(*meant, causal=True)
        torch.testing.assert_close(out, expected.bfloat16(), rtol=2**-7, atol=1e-3)

    def test_varlen_with_rows_in_use(self) -> None:
        offsets, used = torch.tensor([0, 10, 20], dtype=torch.int32), torch.tensor([7, 10], dtype=torch.int32)
        q = _normal(20, 2, 16)
        with ran():
            out, lse = version3.flash_attn_varlen_func(
                q, q, q, offsets, offsets, 10, 10, used, used, causal=True, return_attn_probs=True
            )
        first, second = (
            version3.flash_attn_func(q[None, rows], q[None, rows], q[None, rows], causal=True, num_splits=3)
            for rows in (slice(0, 7), slice(10, 20))
        )
        torch.testing.assert_close(out, torch.cat((first[0], torch.zeros(3, 2, 16), second[0])).to(out.dtype))
        assert lse.shape == (2, 20)

    @pytest.mark.parametrize("heads", [None, 4])
    def test_qkvpacked(self, heads: int | None) -> None:
        qkv = _normal(1, 9, 3, 4, 16) if heads is None else _normal(1, 9, 8, 16)
        split = qkv.unbind(2) if heads is None else qkv.split((4, 2, 2), dim=2)
        with ran():
            found = version3.flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=heads, window_size=(3, -1))
        assert torch.equal(found, flash_attn.flash_attn_func(*split, causal=True, window_size=(3, -1)))

    @pytest.mark.parametrize("given", [False, True])
    def test_combine(self, given: bool) -> None:
        q, k, v = (_normal(2, 10, 2, 16, dtype=torch.float32) for _ in range(3))
        parts = [flashtile.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 4), slice(4, 10))]
        outs, lses = (
            torch.stack([part.out for part in parts]),
            torch.stack([part.lse.transpose(1, 2) for part in parts]),
        )
        target = torch.empty(2, 10, 2, 16, dtype=torch.bfloat16) if given else None
        with torch.no_grad():
            out, lse = version3.flash_attn_combine(outs, lses, target, None if given else torch.bfloat16)
        expected = flashtile.attention(q, k, v, return_lse=True)
        assert (out is target) == given
        torch.testing.assert_close(out, expected.out.bfloat16())
        torch.testing.assert_close(lse, expected.lse.transpose(1, 2))


class TestLowLevel:
    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    def test_dense(self, dropout_p: float) -> None:
        q, k, v = (_normal(2, 9, 4, 16, dtype=torch.float32) for _ in range(3))
        torch.manual_seed(3)
        expected = flash_attn.flash_attn_func(q, k, v, dropout_p, None, True, (4, -1))
        torch.manual_seed(3)
        how = (dropout_p, None, True, 4, -1, 0.0, None)
        with ran() as plans:
            out, lse, weights, state = lowlevel._wrapped_flash_attn_forward(q, k, v, *how, True)
            assert not out.requires_grad
            grads = [torch.full_like(q, torch.nan) for _ in range(3)]
            dout = torch.linspace(-1, 1, out.numel()).sin().reshape(out.shape)
            sums = lowlevel._wrapped_flash_attn_backward(dout, q, k, v, out, lse, *grads, *how, False, state)
        assert [plan.problem.backward for plan in plans][-1]
        assert torch.equal(out, expected)
        for found, wanted in zip(grads, torch.autograd.grad(_sum(expected), (q, k, v)), strict=True):
            torch.testing.assert_close(found, wanted)
        assert weights.shape == ((2, 4, 9, 9) if dropout_p else (0,))
        torch.testing.assert_close(sums, (dout * out).sum(-1).transpose(1, 2))

    @pytest.mark.parametrize("dropout_p", [0.0, 0.3])
    def test_varlen(self, dropout_p: float) -> None:
        offsets = torch.tensor([0, 4, 11], dtype=torch.int32)
        q, k, v = (_normal(11, 4, 16, dtype=torch.float32) for _ in range(3))
        where = (offsets, offsets, 7, 7)
        torch.manual_seed(3)
        expected = flash_attn.flash_attn_varlen_func(q, k, v, *where, dropout_p, causal=True)
        torch.manual_seed(3)
        with ran():
            out, lse, weights, state = lowlevel._flash_attn_varlen_forward(
                q, k, v, *where, dropout_p, None, True, return_softmax=True
            )
            grads = [torch.full_like(q, torch.nan) for _ in range(3)]
            dout = torch.linspace(-1, 1, out.numel()).sin().reshape(out.shape)
            how = (dropout_p, None, True, -1, -1, 0.0, None, False)
            sums = lowlevel._flash_attn_varlen_backward(dout, q, k, v, out, lse, *grads, *where, *how, state)
        assert torch.equal(out, expected)
        for found, wanted in zip(grads, torch.autograd.grad(_sum(expected), (q, k, v)), strict=True):
            torch.testing.assert_close(found, wanted)
        assert weights.shape == ((2, 4, 7, 7) if dropout_p else (0,))
        assert sums.shape == (4, 11)

    @pytest.mark.parametrize("used", [None, torch.tensor([20, 3], dtype=torch.int32)], ids=["all", "used"])
    def test_varlen_over_pages(self, used: Tensor | None) -> None:
        """Where seqused_k says less than the offsets, it holds."""
        q, k, v = (torch.randn(*shape) for shape in ((4, 4, 16), (4, 16, 2, 16), (4, 16, 2, 16)))
        table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)
        offsets, lengths = torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([20, 32], dtype=torch.int32)
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        out, lse, weights, _ = lowlevel._flash_attn_varlen_forward(
            q, k, v, offsets, ends, 3, 32, 0.0, None, True, block_table=table, seqused_k=used
        )
        assert weights.shape == (0,)
        for i, (first, last) in enumerate(((0, 1), (1, 4))):
            keys, values = (x[table[i].long()].flatten(0, 1)[: (lengths if used is None else used)[i]] for x in (k, v))
            expected, sums = reference.attention(q[None, first:last], keys[None], values[None], causal=True)
            torch.testing.assert_close(out[None, first:last], expected.float())
            torch.testing.assert_close(lse[None, :, first:last], sums.float())


def _turned(rows: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Rotary embedding, written as a product of complex numbers: rows (seqlen, heads, headdim), angles of each row."""
    size, dim = 2 * angles.shape[1], -1 if interleaved else -2
    pairs = rows[..., :size].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    turned = torch.complex(*pairs.unbind(dim)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([torch.stack([turned.real, turned.imag], dim=dim).flatten(-2), rows[..., size:]], dim=-1)


class TestCaches:
    """The cache as flash-attn documents it: written in place, then attended over like any keys."""

    @pytest.mark.parametrize("version", [flash_attn, version3])
    @pytest.mark.parametrize("paged", [False, True])
    def test_append_and_attend(self, version: Any, paged: bool) -> None:
        lengths, heads = torch.tensor([3, 17], dtype=torch.int32), 2
        q, k, v = (torch.randn(2, 4, n, 16) for n in (4, heads, heads))
        caches = [torch.randn(2, 32, heads, 16) for _ in range(2)]
        table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
        more = {}
        given = [cache.clone() for cache in caches]
        if paged:
            given = [torch.empty(4, 16, heads, 16) for _ in caches]
            for pages, cache in zip(given, caches, strict=True):
                pages[table.flatten().long()] = cache.reshape(4, 16, heads, 16)
            more = {"block_table" if version is flash_attn else "page_table": table}
        found = version.flash_attn_with_kvcache(
            q, *given, k, v, cache_seqlens=lengths, causal=True, return_softmax_lse=True, **more
        )
        assert len(found) == (2 if version is flash_attn else 4)
        for index, length in enumerate(lengths.tolist()):
            keys, values = (
                torch.cat((cache[index, :length], fresh[index]))[None]
                for cache, fresh in zip(caches, (k, v), strict=True)
            )
            out, lse, _ = flash_attn.flash_attn_func(
                q[index : index + 1], keys, values, causal=True, return_attn_probs=True
            )
            torch.testing.assert_close(found[0][index], out[0])
            torch.testing.assert_close(found[1][index], lse[0])
            if not paged:
                torch.testing.assert_close(given[0][index, length : length + 4], k[index])

    @pytest.mark.parametrize("version", [flash_attn, version3])
    def test_packed_queries_over_pages(self, version: Any) -> None:
        """Sequences of different lengths, one of which has no query, and pages in any order."""
        counts, lengths = torch.tensor([3, 1, 0, 3]), torch.tensor([20, 33, 5, 3])
        offsets_q, offsets_k = (torch.nn.functional.pad(each.cumsum(0), (1, 0)).int() for each in (counts, lengths))
        q, k, v = torch.randn(8, 4, 16), torch.randn(61, 2, 16), torch.randn(61, 2, 16)
        table = torch.tensor([[5, 2, 0], [1, 7, 4], [6, 0, 0], [3, 0, 0]], dtype=torch.int32)
        pages = [torch.full((8, 16, 2, 16), torch.nan) for _ in range(2)]
        for place, length in enumerate(lengths.tolist()):
            begin = int(offsets_k[place])
            for row in range(length):
                for cache, fresh in zip(pages, (k, v), strict=True):
                    cache[table[place, row // 16], row % 16] = fresh[begin + row]
        how: dict[str, Any] = {"causal": True, "window_size": (9, 0), "softcap": 3.0}
        where = (offsets_q, offsets_k, 3, 33)
        # The eighth query is behind the last sequence.
        expected = flash_attn.flash_attn_varlen_func(q, k, v, *where, **how, return_attn_probs=True)
        if version is flash_attn:
            found = version.flash_attn_varlen_func(q, *pages, *where, **how, return_attn_probs=True, block_table=table)
        else:
            more = {"cu_seqlens_q": offsets_q, "max_seqlen_q": 3, "return_softmax_lse": True}
            found = version.flash_attn_with_kvcache(
                q, *pages, cache_seqlens=lengths.int(), page_table=table, **more, **how
            )
        for ours, wanted in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(ours, wanted)

    @pytest.mark.parametrize("paged", [False, True])
    @pytest.mark.parametrize("packed", ["queries", "keys", "both"])
    def test_packed_beside_something_new(self, packed: str, paged: bool) -> None:
        """As one call for each sequence: some have no query, or no new key, and positions of their own."""
        counts = [3, 0, 2] if packed != "keys" else [3, 3, 3]
        fresh = [2, 4, 0] if packed != "queries" else [2, 2, 2]
        lengths, positions = torch.tensor([5, 9, 13], dtype=torch.int32), torch.tensor([8, 9, 2], dtype=torch.int32)
        q, k, v = torch.randn(sum(counts), 4, 16), torch.randn(sum(fresh), 2, 16), torch.randn(sum(fresh), 2, 16)
        caches = [torch.randn(3, 32, 2, 16) for _ in range(2)]
        table = torch.tensor([[3, 0], [1, 5], [4, 2]], dtype=torch.int32)
        angles = torch.rand(40, 4) * 6
        given = [cache.clone() for cache in caches]
        if paged:
            for place, cache in enumerate(caches):
                given[place] = torch.empty(6, 16, 2, 16)
                given[place][table.flatten().long()] = cache.reshape(6, 16, 2, 16)
        offsets_q, offsets_k = (torch.tensor([0, *each]).cumsum(0).int() for each in (counts, fresh))
        found, lse, *_ = version3.flash_attn_with_kvcache(
            q if packed != "keys" else q.view(3, 3, 4, 16),
            *given,
            *((k, v) if packed != "queries" else (k.view(3, 2, 2, 16), v.view(3, 2, 2, 16))),
            rotary_cos=angles.cos(),
            rotary_sin=angles.sin(),
            cache_seqlens=lengths,
            page_table=table if paged else None,
            cu_seqlens_q=None if packed == "keys" else offsets_q,
            cu_seqlens_k_new=None if packed == "queries" else offsets_k,
            max_seqlen_q=3,
            rotary_seqlens=positions,
            causal=True,
            return_softmax_lse=True,
        )
        found = found.reshape(-1, 4, 16)
        lse = lse if packed != "keys" else lse.transpose(0, 1).flatten(1)
        for i, (length, position) in enumerate(zip(lengths.tolist(), positions.tolist(), strict=True)):
            rows = slice(int(offsets_q[i]), int(offsets_q[i + 1]))
            its = slice(int(offsets_k[i]), int(offsets_k[i + 1]))
            turned = _turned(k[its], angles[position : position + fresh[i]], True)
            keys = torch.cat((caches[0][i, :length], turned))
            values = torch.cat((caches[1][i, :length], v[its]))
            if paged:
                held = given[0][table[i].long()].flatten(0, 1)
            else:
                held = given[0][i]
            torch.testing.assert_close(held[: len(keys)], keys)
            if not counts[i]:
                continue
            # Causal queries sit at the end of the keys, and turn by their places from the first new row on.
            asked = _turned(q[rows], angles[position : position + counts[i]], True)
            out, wanted, _ = flash_attn.flash_attn_func(
                asked[None], keys[None], values[None], causal=True, return_attn_probs=True
            )
            torch.testing.assert_close(found[rows], out[0])
            torch.testing.assert_close(lse[:, rows], wanted[0])

    @pytest.mark.parametrize("paged", [False, True])
    @pytest.mark.parametrize("what", ["chunk", "absorbed", "eight bits", "small pages"])
    def test_what_is_gathered(self, what: str, paged: bool) -> None:
        """New keys are written, and then as `flash_attn_func` over all keys of a sequence."""
        lengths, heads = torch.tensor([3, 17], dtype=torch.int32), 2
        dtype = torch.float8_e4m3fn if what == "eight bits" else torch.float32
        q, k, v = (torch.randn(2, 4, n, 16).to(dtype) for n in (4, heads, heads))
        caches = [torch.randn(2, 32, heads, 16).to(dtype) for _ in range(2)]
        rows = 4 if what == "small pages" else 16
        count = 64 // rows
        table = torch.randperm(count, generator=torch.Generator().manual_seed(1)).int().view(2, -1)
        given = [cache.clone() for cache in caches]
        if paged:
            given = [torch.empty(count, rows, heads, 16, dtype=dtype) for _ in caches]
            for pages, cache in zip(given, caches, strict=True):
                for place, page in enumerate(table.flatten().tolist()):
                    pages[page] = cache.reshape(count, rows, heads, 16)[place]
        more: dict[str, Any] = {"attention_chunk": 5} if what == "chunk" else {}
        if what == "absorbed":
            more = {"qv": torch.randn(2, 4, 4, 16)}
        if what == "eight bits":
            more = {f"{name}_descale": torch.rand(2, heads) + 0.5 for name in "qkv"}
        found, lse, *_ = version3.flash_attn_with_kvcache(
            q,
            *given,
            k,
            v,
            cache_seqlens=lengths,
            page_table=table if paged else None,
            causal=True,
            return_softmax_lse=True,
            **more,
        )
        for i, length in enumerate(lengths.tolist()):
            here = slice(i, i + 1)
            keys, values = (
                torch.cat((cache[here, :length].float(), fresh[here].float()), dim=1).to(dtype)
                for cache, fresh in zip(caches, (k, v), strict=True)
            )
            its = {name: each[here] if isinstance(each, Tensor) else each for name, each in more.items()}
            out, wanted = version3.flash_attn_func(q[here], keys, values, causal=True, return_attn_probs=True, **its)
            torch.testing.assert_close(found[i], out[0])
            torch.testing.assert_close(lse[i], wanted[0])

    def test_packed_sequences_with_scales_of_their_own(self) -> None:
        counts, lengths = [5, 0, 3], [7, 4, 9]
        offsets = [torch.tensor([0, *each]).cumsum(0).int() for each in (counts, lengths)]
        q, k, v = (torch.randn(n, h, 16).to(torch.float8_e4m3fn) for n, h in ((8, 4), (20, 2), (20, 2)))
        scales = {f"{name}_descale": torch.rand(3, 2) + 0.5 for name in "qkv"}
        used = torch.tensor([6, 4, 9], dtype=torch.int32)
        found, lse = version3.flash_attn_varlen_func(
            q, k, v, *offsets, 5, 9, seqused_k=used, causal=True, return_attn_probs=True, **scales
        )
        assert found.dtype is torch.bfloat16
        for i in (0, 2):
            rows = slice(int(offsets[0][i]), int(offsets[0][i + 1]))
            keys = slice(int(offsets[1][i]), int(offsets[1][i]) + int(used[i]))
            its = {name: scale[i : i + 1] for name, scale in scales.items()}
            out, wanted = version3.flash_attn_func(
                q[None, rows], k[None, keys], v[None, keys], causal=True, return_attn_probs=True, **its
            )
            torch.testing.assert_close(found[rows], out[0])
            torch.testing.assert_close(lse[:, rows], wanted[0])

    def test_options(self) -> None:
        """The whole cache, by default; each option means what it means elsewhere."""
        q, k, v = torch.randn(2, 3, 4, 16), torch.randn(2, 20, 2, 16), torch.randn(2, 20, 2, 16)
        how: dict[str, Any] = {"softmax_scale": 0.3, "window_size": (6, 0), "softcap": 2.0, "alibi_slopes": SLOPES}
        found = flash_attn.flash_attn_with_kvcache(q, k, v, num_splits=2, **how)
        torch.testing.assert_close(found, flash_attn.flash_attn_func(q, k, v, **how))
        swapped = flash_attn.flash_attn_with_kvcache(q, k, v, cache_batch_idx=torch.tensor([1, 0], dtype=torch.int32))
        torch.testing.assert_close(swapped, flash_attn.flash_attn_func(q, k.flip(0), v.flip(0)))

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("interleaved", [False, True])
    def test_rotary(self, causal: bool, interleaved: bool) -> None:
        """More queries than new keys, and tables for no more places than the cache has, as flash-attn asks for: causal
        queries turn each by its own place, others all by that of the first."""
        lengths = torch.tensor([3, 9], dtype=torch.int32)
        q, k, v = (torch.randn(2, n, 2, 16) for n in (5, 3, 3))
        caches = [torch.randn(2, 14, 2, 16) for _ in range(2)]
        angles = torch.rand(14, 4) * 6
        given = [cache.clone() for cache in caches]
        found = flash_attn.flash_attn_with_kvcache(
            q, *given, k, v, angles.cos(), angles.sin(), lengths, causal=causal, rotary_interleaved=interleaved
        )
        for index, length in enumerate(lengths.tolist()):
            places = length + torch.arange(5)
            turned_k = _turned(k[index], angles[places[:3]], interleaved)
            turned_q = _turned(q[index], angles[places if causal else places[:1].expand(5)], interleaved)
            keys = torch.cat((caches[0][index, :length], turned_k))[None]
            values = torch.cat((caches[1][index, :length], v[index]))[None]
            expected = flash_attn.flash_attn_func(turned_q[None], keys, values, causal=causal)
            torch.testing.assert_close(found[index], expected[0])
            torch.testing.assert_close(given[0][index, length : length + 3], turned_k)

    @pytest.mark.parametrize("paged", [False, True])
    def test_no_gradient(self, paged: bool) -> None:
        """Tensors that want one are taken, for flash-attn takes them, and the result has none."""
        q, k, v = _normal(5, 2, 16), _normal(2, 16, 2, 16), _normal(2, 16, 2, 16)
        if paged:
            table = torch.tensor([[1, 0]], dtype=torch.int32)
            offsets = torch.tensor([[0, 5], [0, 20]], dtype=torch.int32)
            found = flash_attn.flash_attn_varlen_func(q, k, v, *offsets, 5, 20, causal=True, block_table=table)
        else:
            found = flash_attn.flash_attn_with_kvcache(q[None].expand(2, -1, -1, -1), k, v)
        assert not found.requires_grad

    def test_new_keys_need_a_place(self) -> None:
        q = torch.randn(1, 2, 2, 16)
        with pytest.raises(ValueError, match="cache_seqlens: got None beside k, need the place of the new keys; try 0"):
            flash_attn.flash_attn_with_kvcache(q, q, q, q, q)


def test_metadata() -> None:
    found = version3.get_scheduler_metadata(1, 4, 4, 2, 2, 8, OFFSETS)
    assert (found.numel(), found.dtype) == (0, torch.int32)


class TestPadding:
    def test_there_and_back(self) -> None:
        hidden = _normal(3, 5, 2, 4, dtype=torch.float32)
        mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
        packed, indices, offsets, longest, used = bert_padding.unpad_input(hidden, mask)
        assert (offsets.tolist(), longest, used.tolist()) == ([0, 2, 6, 6], 4, [2, 4, 0])
        assert indices.tolist() == [0, 1, 6, 7, 8, 9]
        assert offsets.dtype is used.dtype is torch.int32
        assert torch.equal(packed, hidden[mask.bool()])
        padded = bert_padding.pad_input(packed, indices, 3, 5)
        assert torch.equal(padded, hidden * mask[..., None, None])
        (gradient,) = torch.autograd.grad(padded.sum(), hidden)
        assert torch.equal(gradient, mask[..., None, None].expand_as(hidden).float())

    def test_unused_places(self) -> None:
        mask, unused = torch.tensor([[1, 1, 0, 0]]), torch.tensor([[0, 0, 1, 0]])
        packed, indices, offsets, longest, used = bert_padding.unpad_input(torch.arange(4.0)[None], mask, unused)
        assert (packed.tolist(), indices.tolist(), offsets.tolist()) == ([0, 1, 2], [0, 1, 2], [0, 3])
        assert (longest, used.tolist()) == (3, [2])

    def test_concatenated_sequences(self) -> None:
        lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
        hidden = torch.arange(18).reshape(3, 6)
        packed, indices, offsets, longest = bert_padding.unpad_input_for_concatenated_sequences(hidden, lengths)
        assert offsets.tolist() == [0, 2, 5, 8, 10, 16]
        assert packed.tolist() == indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
        assert longest == 6

    def test_names_of_autograd_functions(self) -> None:
        values, indices = torch.arange(6.0).reshape(3, 2), torch.tensor([2, 0])
        assert bert_padding.IndexFirstAxis.apply(values, indices).tolist() == [[4, 5], [0, 1]]
        assert bert_padding.IndexPutFirstAxis.apply(values[:2], indices, 3).tolist() == [[2, 3], [0, 0], [0, 1]]
        gathered, residual = bert_padding.IndexFirstAxisResidual.apply(values.requires_grad_(), indices)
        assert gathered.requires_grad
        assert not residual.requires_grad


Q = torch.randn(1, 4, 2, 8)
OFFSETS = torch.tensor([0, 4], dtype=torch.int32)
TABLE = torch.zeros(1, 1, dtype=torch.int32)
ERRORS = {
    "packed keys": (
        lambda: version3.flash_attn_with_kvcache(Q, Q, Q, cu_seqlens_k_new=OFFSETS, cache_seqlens=0),
        ValueError,
        "k: got None beside cu_seqlens_k_new, need the new keys that it cuts",
    ),
    "rows that do not fit": (
        lambda: version3.flash_attn_with_kvcache(Q, Q, Q, Q, Q, cache_seqlens=1, attention_chunk=2),
        ValueError,
        "cache_seqlens: got 1 for sequence 0 and 4 new keys, need at most 4 rows in all",
    ),
    "paging": (
        lambda: flash_attn.flash_attn_varlen_func(Q[0], Q, Q, OFFSETS, OFFSETS, 4, 4, 0.1, block_table=TABLE),
        NotImplementedError,
        "dropout_p: got 0.1 beside block_table, need 0",
    ),
    "left padding": (
        lambda: lowlevel._flash_attn_varlen_forward(
            Q[0], Q[0], Q[0], OFFSETS, OFFSETS, 4, 4, 0.0, None, False, leftpad_k=OFFSETS
        ),
        NotImplementedError,
        "leftpad_k: got Tensor, need None",
    ),
    "scales": (
        lambda: version3.flash_attn_func(Q, Q, Q, v_descale=torch.ones(1, 2)),
        NotImplementedError,
        "v_descale: got Tensor, need None: flashtile takes scales of 8-bit queries, keys and values alone",
    ),
    "8-bit tensors and qv": (
        lambda: version3.flash_attn_func(*[Q.to(torch.float8_e4m3fn)] * 3, qv=Q),
        NotImplementedError,
        "qv: got one beside 8-bit tensors, need None",
    ),
    "packed": (
        lambda: version3.flash_attn_qkvpacked_func(Q),
        ValueError,
        r"qkv: got shape \(1, 4, 2, 8\), need \(batch, seqlen, 3, heads, headdim\); try num_heads_q",
    ),
    "joined heads": (
        lambda: version3.flash_attn_qkvpacked_func(Q, num_heads_q=1),
        ValueError,
        "num_heads_q: got 1 of 2 heads, need it to leave an even number",
    ),
    "state": (
        lambda: lowlevel._flash_attn_backward(
            Q, Q, Q, Q, Q, Q[..., 0].mT, Q, Q, Q, 0.1, None, False, -1, -1, 0.0, None, False
        ),
        ValueError,
        "rng_state: got None with dropout, need what the forward function returned",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()
