"""The public functions: defaults, results, alignment, packed sequences, explain, the package's names."""

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile import State, attention, attention_varlen, backends, explain, masks, plan
from flashtile.backends import Kernel
from flashtile.plan import Plan
from tests.oracle import assert_close

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TILED = {"window": (100, 100)}
"""Hides nothing at these lengths, yet only the tiled kernel takes it."""


def draw(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed + sum(sizes))).to(dtype)


def qkv(seqlen_q: int = 20, seqlen_kv: int = 30, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (2, seqlen_q, 4, 16), (2, seqlen_kv, 2, 16), (2, seqlen_kv, 2, 16)
    q, k, v = (draw(*shape, dtype=dtype, seed=number) for number, shape in enumerate(shapes))
    return q, k, v


def visible(seqlen_q: int, seqlen_kv: int, **options: Any) -> Tensor:
    """Which keys each query sees, read off the output: equal scores, and values that are the unit vectors."""
    q, k = torch.zeros(1, seqlen_q, 1, 4), torch.zeros(1, seqlen_kv, 1, 4)
    out = attention(q, k, torch.eye(seqlen_kv)[None, :, None], **options)
    return out[0, :, 0] > 0


class TestResults:
    def test_defaults_are_the_documented_ones(self) -> None:
        q, k, v = qkv()
        masking = {"causal": False, "window": None, "alignment": "bottom_right"}
        spelt = {**masking, "softcap": None, "scale": 16**-0.5, "dropout_p": 0.0}
        state = attention(q, k, v, **spelt, out_dtype=torch.float32, return_lse=True, deterministic=False)
        assert torch.equal(state.out, attention(q, k, v))
        assert torch.equal(attention(q, k, v, softcap=0.0, dropout_p=0), attention(q, k, v))

    @pytest.mark.parametrize("function", [attention, attention_varlen, explain])
    def test_options_are_the_same_keywords_everywhere(self, function: Callable[..., Any]) -> None:
        parameters = inspect.signature(function).parameters
        shared = [p for p in inspect.signature(attention).parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert len(shared) == 18
        assert [parameters[p.name] for p in shared] == shared

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("options", [{}, TILED], ids=["aten_flash", "tiled"])
    def test_shapes_dtypes_and_layouts(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        q, k, v = qkv(dtype=dtype)
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
        out = attention(q, k, v, **options)
        state = attention(q, k, v, return_lse=True, **options)
        assert type(out) is Tensor
        assert type(state) is State
        assert len(state) == 2
        assert torch.equal(out, state.out)
        assert (out.shape, out.dtype, out.is_contiguous()) == ((2, 20, 4, 16), dtype, True)
        assert (state.lse.shape, state.lse.is_contiguous()) == ((2, 4, 20), True)
        assert state.lse.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_packed_shapes_and_dtypes(self, dtype: torch.dtype) -> None:
        q, k, v = (t.flatten(0, 1) for t in qkv(dtype=dtype))
        cu = torch.tensor([0, 7, 40]), torch.tensor([0, 25, 60])
        state = attention_varlen(q, k, v[..., :8], *cu, return_lse=True)
        out = attention_varlen(q, k, v[..., :8], *cu)
        assert type(out) is Tensor
        assert type(state) is State
        assert (state.out.shape, state.out.dtype, state.out.is_contiguous()) == ((40, 4, 8), dtype, True)
        assert (state.lse.shape, state.lse.is_contiguous()) == ((4, 40), True)
        assert state.lse.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
        assert torch.equal(out, state.out)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_out_dtype_float32_is_the_result_before_rounding(self, dtype: torch.dtype) -> None:
        q, k, v = qkv(dtype=dtype)
        wide = attention(q, k, v, out_dtype=torch.float32, **TILED)
        same = attention(q, k, v, out_dtype=dtype, **TILED)
        assert wide.dtype is torch.float32
        assert torch.equal(wide, same.float()) == (dtype is torch.float64)
        assert dtype is torch.float64 or torch.equal(wide.to(dtype), same)

    def test_gradients_have_the_dtypes_and_shapes_of_their_tensors(self) -> None:
        q, k, v = (t.requires_grad_() for t in qkv(dtype=torch.bfloat16))
        bias, sinks = draw(4, 1, 30).requires_grad_(), draw(4, dtype=torch.float64).requires_grad_()
        slopes = draw(2, 4, dtype=torch.float16).requires_grad_()
        leaves = (q, k, v, bias, sinks, slopes)
        out = attention(q, k, v, bias=bias, sinks=sinks, alibi_slopes=slopes)
        for leaf, grad in zip(leaves, torch.autograd.grad(out.float().sum(), leaves), strict=True):
            assert (grad.shape, grad.dtype) == (leaf.shape, leaf.dtype)

    def test_scale(self) -> None:
        q, k, v = qkv()
        assert_close(attention(q, k, v, scale=0.5), attention(q * 2, k, v, scale=0.25), 32)
        assert_close(attention(q, k, v, scale=-0.5), attention(-q, k, v, scale=0.5), 32)
        mean = v.mean(1, keepdim=True).repeat_interleave(2, 2).expand(2, 20, 4, 16)
        assert_close(attention(q, k, v, scale=0), mean, 32)
        assert torch.equal(attention(q, k, v, scale=1), attention(q, k, v, scale=1.0))

    def test_meta_tensors_give_shapes(self) -> None:
        q, k, v = (t.to("meta") for t in qkv())
        state = attention(q, k, v, window=(4, 0), return_lse=True)
        assert (state.out.shape, state.lse.shape, state.out.device.type) == ((2, 20, 4, 16), (2, 4, 20), "meta")


class _Seen(Exception):
    """What a function handed on."""


@pytest.mark.parametrize(
    ("function", "where"),
    [
        ("attention", "recall.attention"),
        ("attention_varlen", "recall.attention"),
        ("explain", "api.build"),
        ("warmup", "api.build"),
        ("attention_kvcache", "decoding.attention"),
    ],
)
def test_every_argument_arrives_under_its_name(function: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are handed on by their places."""

    def see(*given: Any) -> None:
        raise _Seen(*given)

    call = getattr(flashtile, function)
    module, name = where.split(".")
    monkeypatch.setattr(f"flashtile.{module}.{name}", see)
    names = [*inspect.signature(call).parameters]
    values = {name: object() for name in names}
    with pytest.raises(_Seen) as caught:
        call(**values)
    arguments, packing = caught.value.args[3], caught.value.args[4] if len(caught.value.args) > 4 else None
    found = {**(packing._asdict() if packing else {}), **arguments._asdict()}
    rest = names[3:]
    assert {name: found[name] for name in rest} == {name: values[name] for name in rest}
    assert set(found) - set(rest) <= {"sharding"}


class TestAlignment:
    def test_the_example_of_the_docstring(self) -> None:
        """Window (2, 0) on five queries and five keys, as it is printed in the documentation."""
        printed = [
            [1, 0, 0, 0, 0],
            [1, 1, 0, 0, 0],
            [1, 1, 1, 0, 0],
            [0, 1, 1, 1, 0],
            [0, 0, 1, 1, 1],
        ]
        assert visible(5, 5, window=(2, 0)).int().tolist() == printed
        assert visible(5, 5, mask=masks.window(2, 0)).int().tolist() == printed

    def test_the_two_diagonals(self) -> None:
        assert visible(2, 4, causal=True).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
        assert visible(2, 4, causal=True, alignment="top_left").int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
        assert visible(4, 2, causal=True).int().tolist() == [[0, 0], [0, 0], [1, 0], [1, 1]]
        assert visible(4, 2, causal=True, alignment="top_left").int().tolist() == [[1, 0], [1, 1], [1, 1], [1, 1]]

    @pytest.mark.parametrize("alignment", ["bottom_right", "top_left"])
    @pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(1, 1), (7, 7), (5, 9), (9, 5), (130, 130), (66, 200)])
    def test_windows(self, seqlen_q: int, seqlen_kv: int, alignment: Any) -> None:
        """Widths 0, 1, 2, S-1 and S on either side, and none."""
        query, key = torch.arange(seqlen_q)[:, None], torch.arange(seqlen_kv)
        diagonal = query + (seqlen_kv - seqlen_q if alignment == "bottom_right" else 0)
        widths = (None, 0, 1, 2, seqlen_kv - 1, seqlen_kv)
        for left in widths:
            for right in widths:
                wanted = torch.ones(seqlen_q, seqlen_kv, dtype=torch.bool)
                wanted &= key >= diagonal - left if left is not None else True
                wanted &= key <= diagonal + right if right is not None else True
                found = visible(seqlen_q, seqlen_kv, window=(left, right), alignment=alignment)
                assert torch.equal(found, wanted), (left, right)

    def test_alibi_measures_from_the_diagonal(self) -> None:
        q, k, v = qkv(3, 5)
        slopes = torch.full((4,), 0.5)
        query, key = torch.arange(3)[:, None], torch.arange(5)
        for alignment, shift in (("bottom_right", 2), ("top_left", 0)):
            bias = -0.5 * (query + shift - key).abs()
            found = attention(q, k, v, alibi_slopes=slopes, alignment=alignment)
            assert_close(found, attention(q, k, v, bias=bias), 32)


def packing(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


class Packed:
    """Random packed tensors with gradients, and the results of a call on them."""

    def __init__(self, lengths_q: tuple[int, ...], lengths_kv: tuple[int, ...], dtype: torch.dtype = torch.float32):
        total_q, total_kv = sum(lengths_q), sum(lengths_kv)
        self.q, self.k = draw(total_q, 4, 16, dtype=dtype), draw(total_kv, 2, 16, dtype=dtype, seed=1)
        self.v, self.grad = draw(total_kv, 2, 16, dtype=dtype, seed=2), draw(total_q, 4, 16, dtype=dtype, seed=3)
        self.grad_lse = draw(4, total_q, seed=4)
        self.cu = packing(*lengths_q), packing(*lengths_kv)

    def results(self, **options: Any) -> dict[str, Tensor]:
        """out, lse, dq, dk, dv; a gradient arrives at the lse too."""
        cu = options.pop("cu", self.cu)

        def call(*tensors: Tensor) -> Any:
            return attention_varlen(*tensors, *cu, return_lse=True, **options)

        return _results(call, self.q, self.k, self.v, self.grad, self.grad_lse)

    def one(self, index: int, **options: Any) -> dict[str, Tensor]:
        """The same for sequence `index` alone, through the dense function."""
        rows, keys = (slice(int(cu[index]), int(cu[index + 1])) for cu in self.cu)
        sequence = (self.q[None, rows], self.k[None, keys], self.v[None, keys], self.grad[None, rows])
        grad_lse = self.grad_lse[None, :, rows]
        found = _results(lambda *t: attention(*t, return_lse=True, **options), *sequence, grad_lse)
        return {name: tensor[0] for name, tensor in found.items()}

    def part(self, results: dict[str, Tensor], index: int) -> dict[str, Tensor]:
        """What `results` say of one sequence."""
        rows, keys = (slice(int(cu[index]), int(cu[index + 1])) for cu in self.cu)
        where = {"out": rows, "lse": (slice(None), rows), "dq": rows, "dk": keys, "dv": keys}
        return {name: results[name][where[name]] for name in results}


def _results(
    call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, grad: Tensor, grad_lse: Tensor
) -> dict[str, Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    out, lse = call(*leaves)
    grads = torch.autograd.grad((out, lse), leaves, (grad, grad_lse))
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Bit for bit, NaN equal to NaN."""
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


LENGTHS = ((5, 0, 130, 3, 1), (9, 4, 130, 0, 70))


class TestVarlen:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(
        "options",
        [{}, {"causal": True}, {"window": (6, 2), "softcap": 2.0, "alignment": "top_left"}, {"sinks": draw(4)}],
        ids=["plain", "causal", "window", "sinks"],
    )
    def test_equals_a_loop_over_sequences(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        call = Packed(*LENGTHS, dtype)
        found = call.results(**options)
        for index in range(len(LENGTHS[0])):
            for name, wanted in call.one(index, **options).items():
                assert_close(call.part(found, index)[name], wanted, 32 if wanted.dtype is torch.float32 else 1)

    @pytest.mark.parametrize("options", [{}, {"causal": True, "window": (6, None)}], ids=["plain", "window"])
    def test_no_token_of_one_segment_reaches_another(self, options: dict[str, Any]) -> None:
        """Users' point 10: bitwise, outputs and gradients, whatever stands in the other segment."""
        call = Packed(*LENGTHS)
        before = call.results(**options)
        rows, keys = slice(5, 135), slice(13, 143)
        for value in (7.0, 1e30, float("nan")):
            call.q[rows], call.k[keys], call.v[keys], call.grad[rows] = value, value, -value, value
            call.grad_lse[:, rows] = value
            after = call.results(**options)
            for index in (0, 1, 3, 4):
                same(call.part(after, index), call.part(before, index))

    @pytest.mark.parametrize("dtypes", [(torch.int32, torch.int64), (torch.int64, torch.int32), (torch.int32,) * 2])
    def test_integer_dtypes(self, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
        call = Packed(*LENGTHS)
        used = torch.tensor([5, 0, 64, 2, 1])
        cu = call.cu[0].to(dtypes[0]), call.cu[1].to(dtypes[1])
        same(call.results(cu=cu, seqused_q=used.to(dtypes[1])), call.results(seqused_q=used))

    def test_max_seqlen_is_a_promise_that_changes_nothing(self) -> None:
        call = Packed(*LENGTHS)
        wanted = call.results(causal=True)
        for longest in (130, 131, 10_000, torch.tensor(130), torch.tensor([1], dtype=torch.int32)):
            same(call.results(causal=True, max_seqlen_q=longest, max_seqlen_k=longest), wanted)

    def test_max_seqlen_counts_the_rows_in_use(self) -> None:
        call = Packed((5, 9), (5, 9))
        used = torch.tensor([5, 3])
        call.results(seqused_q=used, seqused_k=used, max_seqlen_q=5, max_seqlen_k=5)
        with pytest.raises(ValueError, match="max_seqlen_q: got 5, need at least 9"):
            call.results(seqused_k=used, max_seqlen_q=5, max_seqlen_k=5)

    @pytest.mark.parametrize(
        "lengths",
        [((0, 0), (0, 0)), ((0, 0), (3, 4)), ((3, 4), (0, 0)), ((), ()), ((1, 0, 0, 0), (2, 1, 0, 5)), ((0,), (0,))],
        ids=["all_empty", "no_queries", "no_keys", "no_sequences", "total_q_below_batch", "one_empty"],
    )
    @pytest.mark.parametrize("options", [{}, {"causal": True, "window": (3, 0), "softcap": 5.0}], ids=["plain", "more"])
    def test_empty_sequences(self, lengths: tuple[tuple[int, ...], tuple[int, ...]], options: dict[str, Any]) -> None:
        """Users' point 4: they run in both directions; a query without keys has out 0, lse -inf, gradient 0."""
        call = Packed(*lengths)
        found = call.results(**options)
        assert found["out"].shape == call.q.shape
        assert found["lse"].shape == (4, len(call.q))
        for index, (queries, keys) in enumerate(zip(*lengths, strict=True)):
            part = call.part(found, index)
            if not keys:
                assert not part["out"].any()
                assert bool((part["lse"] == -torch.inf).all())
                assert not part["dq"].any()
            if not queries:
                assert not part["dk"].any()
                assert not part["dv"].any()
            if queries and keys:
                assert bool(part["out"].isfinite().all())
                assert part["out"].any()

    @pytest.mark.parametrize("options", [{}, {"window": (3, 1)}], ids=["plain", "window"])
    def test_padding_between_sequences(self, options: dict[str, Any]) -> None:
        """Users' point 10: rows beyond seqused are never read, written 0 and -inf, and pass no gradient."""
        lengths, used = ((4, 70, 3), (6, 80, 5)), ((3, 66, 0), (6, 1, 2))
        padded = Packed(*lengths)
        tight = Packed(*used)
        for side, names in ((0, ("q", "grad", "grad_lse")), (1, ("k", "v"))):
            begin_tight = 0
            for begin, length, count in zip(padded.cu[side].tolist(), lengths[side], used[side], strict=False):
                for name in names:
                    source, tensor = (getattr(call, name) for call in (tight, padded))
                    if name == "grad_lse":
                        source, tensor = source.T, tensor.T
                    tensor[begin : begin + count] = source[begin_tight : begin_tight + count]
                    tensor[begin + count : begin + length] = float("nan")
                begin_tight += count
        given = {"seqused_q": torch.tensor(used[0]), "seqused_k": torch.tensor(used[1])}
        found, wanted = padded.results(**given, **options), tight.results(**options)
        for index in range(3):
            part, one = padded.part(found, index), tight.part(wanted, index)
            rows, keys = used[0][index], used[1][index]
            assert_close(part["out"][:rows], one["out"], 32)
            assert_close(part["lse"][:, :rows], one["lse"], 32)
            assert_close(part["dq"][:rows], one["dq"], 32)
            assert_close(part["dk"][:keys], one["dk"], 32)
            assert_close(part["dv"][:keys], one["dv"], 32)
            assert not part["out"][rows:].any()
            assert bool((part["lse"][:, rows:] == -torch.inf).all())
            assert not part["dq"][rows:].any()
            assert not part["dk"][keys:].any()
            assert not part["dv"][keys:].any()

    def test_gaps_before_and_after_all_sequences(self) -> None:
        """cu_seqlens may start above 0 and end before the last token; what lies outside is padding."""
        call = Packed((4, 5), (4, 5))
        for tensor in (call.q, call.k, call.v, call.grad):
            tensor[0] = tensor[8:] = float("nan")
        cu = torch.tensor([1, 4, 8])
        found = call.results(cu=(cu, cu))
        assert not found["out"][[0, 8]].any()
        assert bool((found["lse"][:, [0, 8]] == -torch.inf).all())
        assert not any(bool(found[name][[0, 8]].any()) for name in ("dq", "dk", "dv"))
        assert all(bool(found[name].isfinite().all()) for name in ("out", "dq", "dk", "dv"))

    def test_tables_are_shared_and_lengths_are_per_sequence(self) -> None:
        lengths = ((6, 3), (6, 9))
        call = Packed(*lengths)
        ids, bias, kept = torch.arange(9) // 4, draw(2, 4, 6, 9), torch.tensor([2, 7])
        mask = masks.document(ids) & masks.prefix(kept)
        found = call.results(mask=mask, bias=bias, alignment="top_left")
        for index, (rows, keys) in enumerate(zip(*lengths, strict=True)):
            own = masks.document(ids[:rows], ids[:keys]) & masks.prefix(kept[index : index + 1])
            table = bias[index : index + 1, :, :rows, :keys]
            for name, wanted in call.one(index, mask=own, bias=table, alignment="top_left").items():
                assert_close(call.part(found, index)[name], wanted, 32)

    def test_three_ways_to_say_packed(self) -> None:
        """Users' point 10: cu_seqlens, document ids and a loop agree."""
        lengths = (5, 1, 60, 34)
        call = Packed(lengths, lengths)
        ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
        packed = call.results(causal=True)
        tensors = (t[None] for t in (call.q, call.k, call.v, call.grad, call.grad_lse))
        documents = _results(lambda *t: attention(*t, causal=True, mask=masks.document(ids), return_lse=True), *tensors)
        for name, wanted in documents.items():
            assert_close(packed[name], wanted[0], 32)


class Recorder:
    """A backend that takes nothing, put in front of the real ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, missing: str | None = None) -> None:
        module = ModuleType("flashtile.backends.picky")
        refuse = Kernel("only_squares", lambda problem: "it takes squares", None, None, None)  # type: ignore[arg-type]
        module.unavailable = lambda: missing  # type: ignore[attr-defined]
        module.KERNELS = (refuse,)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(backends, "ORDER", ("picky", *backends.ORDER))


@pytest.fixture
def fresh_plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plan is known, and only the backend that runs everywhere is there."""
    monkeypatch.setattr(backends, "ORDER", ("pytorch",))
    clear = plan.choose.cache_clear
    clear()
    yield
    clear()


def test_explain_says_why_the_gpu_backend_does_not_run() -> None:
    """A machine without a GPU, or tensors that are not on it."""
    rejected = explain(*qkv()).rejected
    assert [name.split("/")[0] for name, _ in rejected[:2]] == ["hopper", "portable"]
    reason = rejected[1][1]
    expected = (
        "there is no GPU that PyTorch sees",
        "is built for the CPU alone",
        "it runs on cuda, the tensors are on cpu",
    )
    assert any(part in reason for part in expected)


@pytest.mark.usefixtures("fresh_plans")
class TestExplain:
    def test_it_prints_and_returns_the_plan(self, capsys: pytest.CaptureFixture[str]) -> None:
        q, k, v = qkv()
        chosen = explain(q, k, v)
        assert isinstance(chosen, Plan)
        assert (chosen.backend, chosen.kernel, chosen.rejected) == ("pytorch", "aten_flash", ())
        assert capsys.readouterr().out == f"{chosen}\n"
        text = str(chosen)
        for part in ("batch 2", "seqlen 20x30", "heads 4/2", "headdim 16", "float32 on cpu", "pytorch/aten_flash"):
            assert part in text
        for name, value in chosen.config._asdict().items():
            assert f"{name}={value}" in text

    def test_it_tells_of_the_backward_pass_where_there_is_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        q, k, v = qkv()
        assert explain(q, k, v).backward is None
        chosen = explain(q, k.requires_grad_(), v, softcap=3.0)
        assert chosen.backward is not None
        assert chosen.backward.problem.backward
        assert chosen.backward.kernel == "tiled"
        assert "backward pass of attention" in capsys.readouterr().out

    def test_it_names_features_and_reasons(self) -> None:
        q, k, v = qkv()
        chosen = explain(q, k, v[..., :8], causal=True, softcap=3.0, sinks=draw(4), dropout_p=0.1)
        assert chosen.kernel == "tiled"
        (name, reason), *others = chosen.rejected
        assert (name, others) == ("pytorch/aten_flash", [])
        assert all(feature in reason for feature in ("softcap", "sinks", "dropout_p"))
        for part in ("headdim 16/8", "causal", "softcap, sinks, dropout_p", f"refused  {name}: {reason}"):
            assert part in str(chosen)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"causal": True}, "seqlen_q, seqlen_kv are (20, 30)"),
            ({"window": (3, 0)}, "the mask is"),
            ({"bias": torch.zeros(20, 30)}, "bias"),
            ({"alibi_slopes": torch.zeros(4)}, "alibi_slopes"),
            (
                {"mask": masks.document(torch.zeros(20, dtype=torch.int64), torch.zeros(30, dtype=torch.int64))},
                "document",
            ),
        ],
    )
    def test_reasons(self, options: dict[str, Any], reason: str) -> None:
        ((_, said),) = explain(*qkv(), **options).rejected
        assert reason in said

    def test_out_dtype_is_a_reason(self) -> None:
        ((_, said),) = explain(*qkv(dtype=torch.bfloat16), out_dtype=torch.float32).rejected
        assert "output is wanted in torch.float32" in said

    def test_packed_calls(self) -> None:
        call = Packed(*LENGTHS)
        cu = {"cu_seqlens_q": call.cu[0], "cu_seqlens_k": call.cu[1]}
        used = {"seqused_q": torch.ones(5, dtype=torch.int32), "seqused_k": torch.ones(5, dtype=torch.int32)}
        chosen = explain(call.q, call.k, call.v, **cu, **used, max_seqlen_q=130, max_seqlen_k=torch.tensor(130))
        assert chosen.problem.varlen
        assert chosen.problem.batch == 5
        assert "(packed)" in str(chosen)

    def test_it_runs_nothing(self) -> None:
        """On meta tensors there is nothing that could run."""
        q, k, v = (t.to("meta") for t in qkv())
        assert explain(q, k, v, window=(3, 0)).kernel == "tiled"

    def test_automatic_choice_falls_back_and_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Recorder(monkeypatch)
        chosen = explain(*qkv())
        assert chosen.backend == "pytorch"
        assert chosen.rejected == (("picky/only_squares", "it takes squares"),)
        assert attention(*qkv()).shape == (2, 20, 4, 16)

    def test_unavailable_backends_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Recorder(monkeypatch, missing="no such device here")
        assert explain(*qkv()).rejected == (("picky", "no such device here"),)
        with pytest.raises(NotImplementedError, match=r"picky: no such device here.*'backend'"):
            attention(*qkv(), backend="picky")

    def test_an_explicit_backend_never_falls_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Users' point 2: backend="x" never runs anything but x."""
        Recorder(monkeypatch)
        for call in (attention, explain):
            with pytest.raises(NotImplementedError, match="picky/only_squares: it takes squares"):
                call(*qkv(), backend="picky")
        chosen = explain(*qkv(), backend="pytorch")
        assert (chosen.backend, chosen.rejected) == ("pytorch", ())

    def test_the_backward_pass_keeps_to_the_backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And is planned at once, so that a refusal does not wait for the backward pass."""
        q, k, v = (t.requires_grad_() for t in qkv())
        asked: list[tuple[bool, str | None]] = []
        choose = plan.choose.__wrapped__

        def spy(problem: Any, backend: str | None = None) -> Plan:
            asked.append((problem.backward, backend))
            return choose(problem, backend)

        monkeypatch.setattr(plan, "choose", spy)
        out = attention(q, k, v, backend="pytorch")
        assert asked == [(False, "pytorch"), (True, "pytorch")]
        out.sum().backward()
        assert asked[2:] == []

    def test_a_refusal_is_logged_once_per_problem(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, logger="flashtile"):
            for _ in range(3):
                attention(*qkv(), window=(3, 0))
            (record,) = caplog.records
            assert "refused  pytorch/aten_flash: the mask is" in record.getMessage()
            assert (record.name, record.levelno) == ("flashtile", logging.INFO)
            attention(*qkv(21), window=(3, 0))
            assert len(caplog.records) == 2
            attention(*qkv())
            assert len(caplog.records) == 2


class TestPackage:
    def test_public_names(self) -> None:
        assert set(flashtile.__all__) <= set(dir(flashtile))
        assert {"__version__", "attention"} <= set(dir(flashtile))
        assert dir(flashtile) == sorted(set(dir(flashtile)))
        for name in flashtile.__all__:
            assert getattr(flashtile, name) is not None
        assert set(flashtile.__all__) == set(flashtile._HOMES)

    def test_star_import(self) -> None:
        names: dict[str, Any] = {}
        exec("from flashtile import *", names)
        assert set(flashtile.__all__) <= set(names)

    def test_unknown_names_list_the_known_ones(self) -> None:
        with pytest.raises(AttributeError, match=r"'flashtile' has no attribute 'flash_attn'; .*attention_varlen"):
            flashtile.flash_attn  # noqa: B018
        assert not hasattr(flashtile, "atention")

    @pytest.mark.parametrize("name", sorted({*flashtile.__all__} - {"masks", "reference"}))
    def test_public_names_are_documented(self, name: str) -> None:
        assert inspect.getdoc(getattr(flashtile, name))
