"""What users of attention libraries ask for, point by point: each test cites the demand that it holds us to.

The points are those of the project's survey of complaints about other libraries; a class is a point. Demands that
other files test as a whole (merging, dropout's bits, tracing, packed sequences) appear here only where they combine.
"""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import flashtile
from flashtile import attention, attention_varlen, dropout_mask, explain, mask_nodes, masks, merge, plan, reference
from flashtile.spans import Layout, Spans, Tiling
from flashtile.tuning import cpu
from tests import oracle, shifted
from tests.oracle import assert_close
from tests.problems import dense, make

HALVES = (torch.bfloat16, torch.float16)
TILED = {"window": (10_000, 10_000)}
"""Hides nothing, yet only the tiled kernel takes it."""
BOTH_KERNELS = pytest.mark.parametrize("options", [{}, TILED], ids=["aten_flash", "tiled"])


def draw(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed + sum(sizes))).to(dtype)


def qkv(seqlen_q: int, seqlen_kv: int, heads: int = 4, heads_kv: int = 2, headdim: int = 16, batch: int = 1) -> Any:
    """q, k and v with gradients."""
    shapes = (batch, seqlen_q, heads, headdim), *((batch, seqlen_kv, heads_kv, headdim),) * 2
    return tuple(draw(*shape, seed=number).requires_grad_() for number, shape in enumerate(shapes))


def results(call: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad: Tensor | None = None) -> list[Tensor]:
    """out and the gradient of each leaf."""
    out = call(*leaves)
    grad = draw(*out.shape, dtype=out.dtype, seed=9) if grad is None else grad
    return [out.detach(), *torch.autograd.grad(out, leaves, grad, retain_graph=True)]


def same_bits(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


class TestPoint2SilentSubstitution:
    """Every option is honoured or refused."""

    OPTIONS: tuple[dict[str, Any], ...] = (
        {"causal": True},
        {"causal": True, "alignment": "top_left"},
        {"window": (3, 1)},
        {"mask": masks.chunk(5)},
        {"mask": torch.arange(20) % 3 > 0},
        {"mask": lambda b, h, q_idx, kv_idx: (q_idx + h) % 2 == kv_idx % 2},
        {"score_mod": lambda score, b, h, q_idx, kv_idx: score * 0.5 + h},
        {"bias": draw(14, 20)},
        {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
        {"softcap": 0.7},
        {"sinks": draw(4)},
        {"scale": 0.7},
        {"dropout_p": 0.4, "seed": 3},
    )

    @pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "_".join(options))
    def test_each_option_does_what_the_reference_does(self, options: dict[str, Any]) -> None:
        q, k, v = qkv(14, 20)
        found, wanted = attention(q, k, v, **options), reference.attention(q, k, v, **options).out
        assert_close(found, wanted)
        assert float((found - attention(q, k, v)).abs().max()) > 1e-3, "the option changed nothing"

    @pytest.mark.parametrize("name", ["attention", "attention_varlen", "explain", "merge", "dropout_mask"])
    def test_no_public_function_takes_arbitrary_keywords(self, name: str) -> None:
        kinds = {p.kind for p in inspect.signature(getattr(flashtile, name)).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


LENGTH_GROUPS = [*(range(first, min(first + 20, 261)) for first in range(1, 261, 20))]
BORDER_LENGTHS = [[128 * k + rest for rest in (1, 63, 64, 65, 127)] for k in (2, 3, 5, 8)]
ALL_LENGTHS = pytest.mark.parametrize(
    "lengths", [*LENGTH_GROUPS, *BORDER_LENGTHS], ids=lambda group: f"{group[0]}_to_{group[-1]}"
)


class TestPoint3OddLengths:
    """Mask, bias and causal combined, logits shifted by -120 and +120: finite and right, gradients too."""

    @pytest.mark.parametrize("shift", [-120.0, 120.0])
    @ALL_LENGTHS
    def test_float32(self, lengths: Sequence[int], shift: float) -> None:
        shifted.check([dense(1, seqlen, seqlen, 1, 1, 8) for seqlen in lengths], torch.float32, shift)

    @ALL_LENGTHS
    def test_half_precision(self, lengths: Sequence[int]) -> None:
        """Each length in one of the two dtypes and with one of the two shifts."""
        for index, dtype in enumerate(HALVES):
            for part, shift in enumerate((-120.0, 120.0)):
                shapes = [dense(1, seqlen, seqlen, 1, 1, 8) for seqlen in lengths[2 * index + part :: 4]]
                shifted.check(shapes, dtype, shift)

    @pytest.mark.parametrize("shift", [-120.0, 120.0])
    def test_lengths_that_differ(self, shift: float) -> None:
        lengths = (1, 63, 64, 65, 127, 129, 200)
        pairs = [pair for n in lengths for pair in ((n, 1), (1, n), (n, 100), (100, n))]
        shifted.check([dense(1, *pair, 2, 1, 8) for pair in pairs], torch.float32, shift)

    @pytest.mark.parametrize("options", [{"causal": True}, {"window": (3, 0)}], ids=["aten_flash", "tiled"])
    def test_nan_in_a_key_reaches_those_who_see_it_and_no_others(self, options: dict[str, Any]) -> None:
        """NaN is never hidden: rows that see it are NaN in out and lse. Rows that do not are finite."""
        q, k, v = (t.detach() for t in qkv(70, 70))
        k[0, 40, 1] = math.nan
        out, lse = attention(q, k, v, return_lse=True, **options)
        sees = torch.zeros(70, dtype=torch.bool)
        sees[40 : 44 if "window" in options else 70] = True
        assert torch.equal(lse[0, 2].isnan(), sees)
        assert torch.equal(out[0, :, 3].isnan(), sees[:, None].expand(70, 16))
        assert bool(out[0, :, :2].isfinite().all())
        assert bool(lse[0, :2].isfinite().all())

    @BOTH_KERNELS
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_nan_in_a_query_stays_in_its_row(self, value: float, options: dict[str, Any]) -> None:
        q, k, v = (t.detach() for t in qkv(70, 90))
        q[0, 5, 2] = value
        out, lse = attention(q, k, v, return_lse=True, **options)
        wanted = torch.zeros(70, 4, dtype=torch.bool)
        wanted[5, 2] = True
        assert torch.equal(out[0].isnan().all(-1), wanted)
        assert torch.equal(out[0].isnan().any(-1), wanted)
        assert torch.equal(lse[0].isnan().T, wanted)

    @BOTH_KERNELS
    def test_nan_in_a_value_is_not_hidden(self, options: dict[str, Any]) -> None:
        q, k, v = (t.detach() for t in qkv(70, 90))
        v[0, 33, 1, 7] = math.nan
        out, lse = attention(q, k, v, return_lse=True, **options)
        wanted = torch.zeros(70, 4, 16, dtype=torch.bool)
        wanted[:, 2:, 7] = True
        assert torch.equal(out[0].isnan(), wanted)
        assert bool(lse.isfinite().all())


class TestPoint4EmptyRows:
    """A row with no visible key: output 0, lse -inf, and no gradient to q, k, v and bias. (Packed: `test_api`.)"""

    MASKS: tuple[dict[str, Any], ...] = (
        {"mask": torch.zeros(1, dtype=torch.bool)},
        {"mask": masks.prefix(0)},
        {"mask": masks.prefix(torch.zeros(2, dtype=torch.int32))},
        {"mask": lambda b, h, q_idx, kv_idx: kv_idx < 0},
        {"mask": masks.document(torch.zeros(5, dtype=torch.int64), torch.ones(7, dtype=torch.int64))},
        {"mask": masks.block(torch.zeros(1, 1, 1, 1, dtype=torch.int8), (5, 7))},
        {"mask": masks.window(None, 0) & masks.window(0, None) & masks.chunk(1) & masks.prefix(0)},
    )

    @pytest.mark.parametrize("options", MASKS, ids=range(len(MASKS)))
    def test_everything_masked(self, options: dict[str, Any]) -> None:
        leaves = (*qkv(5, 7, batch=2), draw(4, 5, 7).requires_grad_())
        out, lse = attention(*leaves[:3], bias=leaves[3], return_lse=True, **options)
        assert not out.any()
        assert bool((lse == -torch.inf).all())
        for grad in torch.autograd.grad((out.sum(), lse.sum()), leaves):
            assert not grad.any()

    def test_rows_masked_by_an_infinite_bias(self) -> None:
        q, k, v = qkv(5, 7)
        bias = torch.zeros(5, 7)
        bias[2] = bias[4] = -torch.inf
        bias.requires_grad_()
        out, lse = attention(q, k, v, bias=bias, return_lse=True)
        empty = torch.tensor([False, False, True, False, True])
        assert torch.equal((out == 0).all(-1)[0], empty[:, None].expand(5, 4))
        assert torch.equal(lse[0, 0] == -torch.inf, empty)
        dq, dk, dv, dbias = torch.autograd.grad((out.sum(), lse[lse.isfinite()].sum()), (q, k, v, bias))
        assert all(bool(grad.isfinite().all()) for grad in (dq, dk, dv, dbias))
        assert not dq[0, empty].any()
        assert not dbias[empty].any()
        assert dq[0, ~empty].any()

    def test_a_sink_is_something_to_see(self) -> None:
        sinks = draw(4).requires_grad_()
        out, lse = attention(*qkv(5, 7), sinks=sinks, mask=masks.prefix(0), return_lse=True)
        assert not out.any()
        assert torch.equal(lse, sinks.view(1, 4, 1).expand(1, 4, 5))
        (grad,) = torch.autograd.grad(lse.sum(), sinks)
        assert torch.equal(grad, torch.full((4,), 5.0))

    @pytest.mark.parametrize(
        ("batch", "seqlen_q", "seqlen_kv"), [(2, 0, 5), (2, 5, 0), (0, 5, 5), (2, 0, 0), (0, 0, 0)]
    )
    @pytest.mark.parametrize("more", [{}, {"causal": True, "softcap": 2.0, "window": (2, 0)}], ids=["plain", "more"])
    def test_no_queries_no_keys_no_batch(self, batch: int, seqlen_q: int, seqlen_kv: int, more: dict[str, Any]) -> None:
        leaves = qkv(seqlen_q, seqlen_kv, batch=batch)
        out, lse = attention(*leaves, return_lse=True, **more)
        assert (out.shape, lse.shape) == ((batch, seqlen_q, 4, 16), (batch, 4, seqlen_q))
        assert not out.any()
        assert bool((lse == -torch.inf).all())
        for leaf, grad in zip(leaves, torch.autograd.grad(out.sum() + lse.sum(), leaves), strict=True):
            assert grad.shape == leaf.shape
            assert not grad.any()

    @pytest.mark.parametrize(("batch", "seqlen_q", "seqlen_kv"), [(2, 0, 5), (2, 5, 0), (0, 5, 5), (2, 0, 0)])
    def test_nothing_under_every_mask(self, batch: int, seqlen_q: int, seqlen_kv: int) -> None:
        ids = torch.arange(seqlen_q), torch.arange(seqlen_kv)
        blocks = torch.ones(1, 1, -(-seqlen_q // 4), -(-seqlen_kv // 4), dtype=torch.int8)
        for mask in (
            masks.window(2, 1),
            masks.chunk(3),
            masks.prefix(3),
            masks.prefix(torch.ones(batch, dtype=torch.int64)),
            masks.document(*ids),
            masks.document(*(-part.expand(batch, -1) for part in ids)),
            masks.dense(torch.ones(batch, 1, seqlen_q, seqlen_kv, dtype=torch.bool)),
            masks.block(blocks, (4, 4), masks.causal()),
            masks.custom(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx),
            masks.causal() & masks.document(*ids) | masks.prefix(1),
        ):
            leaves = qkv(seqlen_q, seqlen_kv, batch=batch)
            out, lse = attention(*leaves, mask=mask, return_lse=True)
            assert not out.any()
            assert bool((lse == -torch.inf).all())
            assert not any(grad.any() for grad in torch.autograd.grad(out.sum() + lse.sum(), leaves))


BIAS_SHAPES = [(), (1,), (70,), (50, 70), (50, 1), (4, 1, 1), (4, 50, 70), (1, 4, 1, 70), (2, 1, 50, 1), (2, 4, 50, 70)]


class TestPoint5Bias:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
    def test_any_broadcast_shape_with_its_gradient(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """A float32 bias with q, k, v of any dtype; the gradient in the bias's own shape and dtype."""
        leaves = (*(t.detach().to(dtype).requires_grad_() for t in qkv(50, 70, batch=2)), draw(*shape).requires_grad_())
        wide = tuple(t.detach().double().requires_grad_() for t in leaves)
        errors = []
        # The gradient of a scalar is one throw of the dice: several incoming gradients.
        for seed in range(4):
            grad = draw(2, 50, 4, 16, dtype=dtype, seed=seed)
            ours = results(lambda *t: attention(*t[:3], bias=t[3]), leaves, grad)
            textbook = results(lambda *t: reference.attention(*t[:3], bias=t[3], dtype=None).out, leaves, grad)
            truth = results(lambda *t: reference.attention(*t[:3], bias=t[3]).out, wide, grad.double())
            assert (ours[-1].shape, ours[-1].dtype) == (shape, torch.float32)
            rows = zip(ours, textbook, truth, strict=True)
            errors.append([[float(x.double().abs().max()) for x in (a - t, b - t, t)] for a, b, t in rows])
        worst = torch.tensor(errors).amax(dim=0)
        eps = torch.tensor([*(torch.finfo(dtype).eps,) * 4, torch.finfo(torch.float32).eps])
        tiny = eps * worst[:, 2] + 8 * torch.finfo(torch.float32).eps * worst[:, 2].clamp(min=4)
        assert bool((worst[:, 0] <= 2 * worst[:, 1] + tiny).all()), worst

    @pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced", "flipped"])
    def test_any_strides(self, layout: str) -> None:
        base = {
            "transposed": lambda: draw(70, 50).T,
            "expanded": lambda: draw(4, 1, 70).expand(4, 50, 70),
            "sliced": lambda: draw(4, 100, 210)[:, ::2, 1::3],
            "flipped": lambda: draw(50, 70, 4).permute(2, 0, 1),
        }[layout]()
        assert not base.is_contiguous()
        leaves = qkv(50, 70)
        found, wanted = (
            results(lambda *t: attention(*t[:3], bias=t[3]), (*leaves, bias.detach().requires_grad_()))
            for bias in (base, base.contiguous())
        )
        assert same_bits(found, wanted)

    @pytest.mark.parametrize("shape", BIAS_SHAPES[2:8], ids=str)
    def test_the_gradient_repeats_bit_for_bit(self, shape: tuple[int, ...]) -> None:
        leaves = (*qkv(50, 70), draw(*shape).requires_grad_())
        runs = [results(lambda *t: attention(*t[:3], bias=t[3], deterministic=True), leaves) for _ in range(5)]
        assert all(same_bits(run, runs[0]) for run in runs)


@dataclass
class Memory:
    """Bytes that a call allocates: at most at one time, in one piece, and what it leaves behind (its results)."""

    peak: int
    largest: int
    kept: int


def memory(call: Callable[[], Any]) -> Memory:
    """Read off the profiler's record of every allocation."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        held = call()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now, peak, largest = 0, 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now, largest = now + event.nbytes(), max(largest, event.nbytes())
        peak = max(peak, now)
    assert peak > 0, "the profiler recorded nothing"
    del held
    return Memory(peak, largest, now)


@pytest.fixture
def few_scores(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Tiles of 64 x 64 of two heads at a time: bytes of one such tile of scores in float32."""
    monkeypatch.setattr(cpu, "TILES", ((2**62, 64, 64, 64),))
    monkeypatch.setattr(cpu, "SCORES_HELD", 2 * 64 * 64)
    plan.choose.cache_clear()
    yield 2 * 64 * 64 * 4
    monkeypatch.undo()
    plan.choose.cache_clear()


def bytes_of(*tensors: Tensor, dtype: torch.dtype | None = None) -> int:
    return sum(t.numel() * (dtype or t.dtype).itemsize for t in tensors)


class TestPoint21Memory:
    """The published formula, besides the results themselves, with `tile` one pass's scores in float32:

    forward:  float32 copies of k and v + 6 tiles + 64 kB
    backward: float32 copies of k, v, dk and dv, float32 gradients of what broadcasts + 10 tiles + 64 kB
    """

    HEADS, HEADDIM, SLACK = 8, 32, 2**16

    FEATURES: tuple[dict[str, Any], ...] = (
        {"window": (None, 0)},
        {"bias": torch.zeros(1, 1, 1, 384)},
        {"bias": torch.zeros(8, 384, 1), "softcap": 3.0},
        {"mask": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 3 == 0},
        {"mask": masks.causal() & masks.document(torch.arange(384) // 150), "sinks": torch.zeros(8)},
    )

    @pytest.mark.parametrize("heads_kv", [1, 8])
    @pytest.mark.parametrize("options", FEATURES, ids=lambda options: "_".join(options))
    def test_the_formula(self, few_scores: int, options: dict[str, Any], heads_kv: int) -> None:
        """Points 5, 14 and 21: no S x S temporary, no key or value at query-head count, whatever the option."""
        leaves = tuple(
            t.detach().bfloat16().requires_grad_() for t in qkv(384, 384, self.HEADS, heads_kv, self.HEADDIM)
        )
        bias = options.get("bias")
        if bias is not None:
            options = {**options, "bias": bias.requires_grad_()}
        wanted = leaves if bias is None else (*leaves, bias)
        copies = bytes_of(*leaves[1:], dtype=torch.float32)
        assert explain(*leaves, **options).kernel == "tiled"

        forward = memory(lambda: attention(*leaves, return_lse=True, **options))
        assert forward.peak - forward.kept <= copies + 6 * few_scores + self.SLACK
        out, lse = attention(*leaves, return_lse=True, **options)
        assert forward.kept <= bytes_of(out, lse) + self.SLACK

        grad = torch.ones_like(out)
        backward = memory(lambda: torch.autograd.grad(out, wanted, grad, retain_graph=True))
        extra = 0 if bias is None else bytes_of(bias, dtype=torch.float32)
        assert backward.peak - backward.kept <= 2 * copies + extra + 10 * few_scores + self.SLACK
        largest = max(bytes_of(leaves[1], dtype=torch.float32), bytes_of(out), 2 * few_scores)
        assert max(forward.largest, backward.largest) <= largest < 384 * 384 * 4

    def test_memory_grows_linearly(self, few_scores: int) -> None:
        """Twice the length takes at most twice the memory."""
        peaks = []
        for seqlen in (256, 512):
            q, k, v = qkv(seqlen, seqlen, 2, 1)
            peaks.append(memory(partial(attention, q, k, v, window=(None, 0))).peak)
        assert peaks[1] <= 2 * peaks[0]


class TestPoint6HeadDimensions:
    PAIRS = (
        (1, 1),
        (3, 5),
        (17, 31),
        (80, 80),
        (96, 96),
        (160, 160),
        (192, 128),
        (128, 192),
        (512, 512),
        (576, 512),
        (1, 512),
    )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("headdim", "headdim_v"), PAIRS)
    def test_any_pair(self, headdim: int, headdim_v: int, dtype: torch.dtype) -> None:
        shape = dense(1, 33, 47, 2, 1, headdim, headdim_v)
        oracle.check(make(f"headdim {headdim} {headdim_v}", shape, ("causal",), dtype))
        oracle.check(make(f"headdim {headdim} {headdim_v}", shape, (), dtype))


class TestPoint9Compile:
    def test_both_functions_compile_whole_in_both_directions(self) -> None:
        """fullgraph=True, dense and packed, without max_seqlen; the same bits as eager."""
        cu = torch.tensor([0, 5, 5, 20], dtype=torch.int32)

        def both(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
            batched = attention(q, k, v, window=(4, 0), softcap=3.0)
            packed = attention_varlen(q[0], k[0], v[0], cu, cu, causal=True)
            return batched + packed

        torch._dynamo.reset()
        compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
        leaves = qkv(20, 20)
        found, wanted = (results(lambda *t, f=f: f(*t, cu), leaves) for f in (compiled, both))
        assert same_bits(found, wanted)

    def test_many_lengths_compile_a_constant_number_of_times(self) -> None:
        """50 lengths, two compilations: the first length, and then all lengths."""
        counter = torch._dynamo.testing.CompileCounter()
        torch._dynamo.reset()
        compiled = torch.compile(lambda q, k, v: attention(q, k, v, causal=True), fullgraph=True, backend=counter)
        for seqlen in range(10, 60):
            q, k, v = (t.detach() for t in qkv(seqlen, seqlen))
            assert_close(compiled(q, k, v), attention(q, k, v, causal=True))
        assert counter.frame_count <= 2


class TestPoint11LargeGrids:
    @pytest.mark.parametrize("shape", [(70_000, 2, 1, 4), (1, 2, 70_000, 4)], ids=["batch", "heads"])
    def test_seventy_thousand_pairs(self, shape: tuple[int, int, int, int]) -> None:
        q, k, v = (draw(*shape, seed=seed).requires_grad_() for seed in range(3))
        found = results(lambda *t: attention(*t, window=(0, 0)), (q, k, v))
        assert torch.equal(found[0], v)
        assert torch.equal(found[3], draw(*shape, seed=9))

    def test_many_documents(self) -> None:
        """More sequences than a grid dimension holds, each with one key; most have no query, which is fast."""
        count = 70_000
        cu_q = torch.arange(count + 1) // 100
        q, k, v = draw(int(cu_q[-1]), 1, 4), draw(count, 1, 4, seed=1), draw(count, 1, 4, seed=2)
        assert torch.equal(attention_varlen(q, k, v, cu_q, torch.arange(count + 1)), v[99::100])


class TestPoint12Reproducibility:
    @pytest.mark.parametrize("options", [{"causal": True}, {"window": (30, 3)}], ids=["aten_flash", "tiled"])
    def test_thirty_runs(self, options: dict[str, Any]) -> None:
        leaves = qkv(150, 150)
        runs = [results(lambda *t: attention(*t, deterministic=True, **options), leaves) for _ in range(30)]
        assert all(same_bits(run, runs[0]) for run in runs)

    def test_thirty_runs_with_everything_that_has_a_gradient(self) -> None:
        table = draw(4, 21).requires_grad_()
        leaves = (*qkv(150, 150), draw(4, 1, 150).requires_grad_(), draw(4).requires_grad_(), draw(4).requires_grad_())

        def relative(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return score + table[h, (q_idx - kv_idx).clamp(-10, 10) + 10]

        def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor, slopes: Tensor, _: Tensor) -> Tensor:
            named = {"bias": bias, "sinks": sinks, "alibi_slopes": slopes, "score_mod": relative}
            return attention(q, k, v, **named, dropout_p=0.1, seed=5, deterministic=True)

        runs = [results(call, (*leaves, table)) for _ in range(30)]
        assert all(same_bits(run, runs[0]) for run in runs)
        assert all(bool(grad.any()) for grad in runs[0])

    def test_the_global_switch_is_honoured(self) -> None:
        leaves = qkv(5, 5)
        assert not explain(*leaves).problem.deterministic
        torch.use_deterministic_algorithms(True)
        try:
            assert explain(*leaves).problem.deterministic
            assert not explain(*leaves, deterministic=False).problem.deterministic
            results(lambda *t: attention(*t, bias=torch.zeros(5, 5), sinks=torch.zeros(4)), leaves)
        finally:
            torch.use_deterministic_algorithms(False)


def rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


class TestPoint13Accuracy:
    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("options", [{}, {"causal": True}, TILED], ids=["plain", "causal", "tiled"])
    def test_error_is_at_most_that_of_standard_attention(self, options: dict[str, Any], dtype: torch.dtype) -> None:
        """Per tensor: 1.5 times the error of the textbook formula in the same dtype, in the root mean square; one unit
        in the last place of the largest value more for the largest error."""
        inputs = [draw(1, 400, 2, 64, dtype=dtype, seed=seed) for seed in range(3)]
        grad = draw(1, 400, 2, 64, dtype=dtype, seed=3)

        def run(function: Callable[..., Tensor], wide: bool) -> list[Tensor]:
            leaves = tuple((t.double() if wide else t.clone()).requires_grad_() for t in inputs)
            return results(lambda *t: function(*t, **options), leaves, grad.double() if wide else grad)

        truth = run(lambda *t, **o: reference.attention(*t, **o).out, True)
        textbook = run(lambda *t, **o: reference.attention(*t, dtype=None, **o).out, False)
        for exact, plain, ours in zip(truth, textbook, run(attention, False), strict=True):
            error, allowed = ours.double() - exact, plain.double() - exact
            assert rms(error) <= 1.5 * rms(allowed)
            unit = torch.finfo(dtype).eps * float(exact.abs().max())
            assert float(error.abs().max()) <= 1.5 * float(allowed.abs().max()) + unit

    @pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
    @pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
    @BOTH_KERNELS
    def test_weights_sum_to_one_without_bias(self, dtype: torch.dtype, spread: float, options: dict[str, Any]) -> None:
        """With V = 1 the mean signed error stays below an eighth of a rounding, and below 5e-7 in float32."""
        q, k = draw(2, 300, 2, 64, dtype=dtype), (spread * draw(2, 300, 2, 64, seed=1)).to(dtype)
        out = attention(q, k, torch.ones_like(k), **options)
        assert abs(float((out.double() - 1).mean())) <= max(5e-7, torch.finfo(dtype).eps / 8)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_a_stack_of_24_layers_drifts_no_more_than_pytorchs(self, dtype: torch.dtype) -> None:
        weights = [draw(128, 384, seed=layer) / 128**0.5 for layer in range(24)]
        start = draw(1, 200, 128)

        def stack(function: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
            x = start.to(dtype)
            for weight in weights:
                hidden = torch.nn.functional.rms_norm(x, (128,)) @ weight.to(dtype)
                q, k, v = hidden.view(1, 200, 4, 96).chunk(3, dim=-1)
                x = x + function(q, k, v).flatten(2)
            return x.double()

        def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

        truth = stack(lambda *t: reference.attention(*t, causal=True).out, torch.float64)
        theirs = rms(stack(torchs, dtype) - truth)
        for options in ({"causal": True}, {"window": (None, 0)}):
            assert rms(stack(lambda *t, o=options: attention(*t, **o), dtype) - truth) <= 1.1 * theirs


class TestPoint14MaskFunctions:
    def test_a_long_packed_mask_is_built_in_5_ms(self) -> None:
        """128k tokens in documents, causal: the mask and its tiles, in processor time of one thread."""
        seqlen = 131_072
        ids = torch.arange(seqlen) // 5000
        threads, best = torch.get_num_threads(), math.inf
        torch.set_num_threads(1)
        try:
            for _ in range(5):
                start = time.thread_time()
                mask = masks.causal() & masks.document(ids)
                lowered = mask_nodes.parse(mask.token).lower(Tiling(seqlen, seqlen, 128, 128), mask.tensors)
                best = min(best, time.thread_time() - start)
        finally:
            torch.set_num_threads(threads)
        assert isinstance(lowered, Spans)
        assert best < 5e-3

    @pytest.mark.parametrize(
        "mask",
        [
            masks.causal(),
            masks.window(64, 3),
            masks.chunk(100),
            masks.prefix(70),
            masks.document(torch.arange(1000) // 300),
            masks.causal() & masks.document(torch.arange(1000) // 300) & masks.window(200, None),
            masks.causal() | masks.prefix(70),
        ],
        ids=["causal", "window", "chunk", "prefix", "document", "and", "or"],
    )
    def test_common_masks_need_no_list_of_blocks(self, mask: masks.Mask) -> None:
        lowered = mask_nodes.parse(mask.token).lower(Tiling(1000, 1000, 64, 64), mask.tensors)
        assert isinstance(lowered, Spans)
        assert not isinstance(lowered, Layout)

    def test_a_mask_at_another_length_is_right_or_refused(self) -> None:
        mod = masks.custom(lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() < 9)
        for mask in (masks.causal(), masks.window(3, 1) | masks.prefix(4), masks.chunk(8), mod):
            for seqlen in (10, 40, 150):
                q, k, v = qkv(seqlen, seqlen)
                assert_close(attention(q, k, v, mask=mask), reference.attention(q, k, v, mask=mask).out)
        with pytest.raises(ValueError, match=r"mask: got document query ids of shape \(10,\)"):
            attention(*qkv(11, 11), mask=masks.document(torch.zeros(10, dtype=torch.int64)))


class TestPoint15Conventions:
    """Windows and alignment: `test_api`."""

    @BOTH_KERNELS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lse_is_the_natural_logarithm_in_float32(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        q, k, v = (t.detach().to(dtype) for t in qkv(20, 30, heads_kv=4))
        lse = attention(q, k, v, return_lse=True, **options)[1]
        scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / 4
        assert (lse.shape, lse.dtype) == ((1, 4, 20), torch.float32)
        # The weights exp(score - lse) are rounded to q's dtype; a sixteenth of that is the oracle's allowance too.
        roundings = 8 if dtype is torch.float32 else oracle.LSE_SHARE * 2**16
        assert_close(lse, torch.logsumexp(scores, -1).float(), roundings)


class TestPoint16PartialResults:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_parts_in_float32_merge_to_the_whole_in_both_directions(self, dtype: torch.dtype) -> None:
        """Uneven parts, one of them invisible to some rows and one to all; gradients flow through out and lse."""
        leaves = tuple(t.detach().to(dtype).requires_grad_() for t in qkv(60, 100))
        allowed = masks.document(torch.arange(60) // 25, torch.arange(100) // 40)
        ids = torch.arange(60) // 25, torch.arange(100) // 40

        def parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            states = []
            for begin, end in ((0, 33), (33, 34), (34, 34), (34, 100)):
                own = masks.document(ids[0], ids[1][begin:end])
                piece = (q, k[:, begin:end], v[:, begin:end])
                states.append(attention(*piece, mask=own, out_dtype=torch.float32, return_lse=True))
            return merge(states).out

        found = results(parts, leaves)
        wanted = results(lambda *t: attention(*t, mask=allowed, out_dtype=torch.float32), leaves)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other, 32 if one.dtype is torch.float32 else 2)

    @pytest.mark.parametrize("gap", [0.0, 50.0, 200.0, 1e4, 1e30])
    def test_any_gap_between_log_sum_exps(self, gap: float) -> None:
        outs = draw(1, 3, 2, 4), draw(1, 3, 2, 4, seed=1)
        low = torch.zeros(1, 2, 3)
        out, lse = merge([(outs[0], low), (outs[1], low + gap)])
        share = 1 / (1 + math.exp(-gap)) if gap < 700 else 1.0
        assert_close(out, (1 - share) * outs[0] + share * outs[1])
        assert_close(lse, low + (gap + math.log1p(math.exp(-gap)) if gap < 700 else gap))

    @BOTH_KERNELS
    def test_the_gradient_of_the_lse(self, options: dict[str, Any]) -> None:
        """Alone, without any gradient at out."""
        leaves = qkv(20, 30)
        truth = tuple(t.detach().double().requires_grad_() for t in leaves)
        found = torch.autograd.grad(attention(*leaves, return_lse=True, **options)[1].sin().sum(), leaves)
        lse = reference.attention(*truth, **options).lse
        wanted = torch.autograd.grad(lse.sin().sum(), truth, allow_unused=True)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, torch.zeros_like(one) if other is None else other, 32)


class TestPoint17EverythingAtOnce:
    FEATURES = ("sinks", "softcap", "alibi", "window", "gqa", "dropout")

    @pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
    @pytest.mark.parametrize("more", [(), ("varlen",), ("causal", "bias_heads", "score_mod", "headdim_v")], ids=str)
    def test_gradients_in_one_call(self, more: tuple[str, ...], dtype: torch.dtype) -> None:
        """Sinks, softcap and slopes with window, GQA, packed sequences and dropout."""
        oracle.check(make("at once", dense(2, 70, 90, 4, 4, 32), (*self.FEATURES, *more), dtype))


class TestPoint18Dropout:
    P = 0.3

    def weights_kept(self, seed: int) -> tuple[Tensor, Tensor]:
        """Which weights the forward pass and the backward pass kept: read off unit values and unit gradients."""
        q, k = torch.zeros(1, 40, 2, 4), torch.zeros(1, 50, 2, 4)
        v = torch.eye(50)[None, :, None].expand(1, 50, 2, 50).clone().requires_grad_()
        out = attention(q, k, v, dropout_p=self.P, seed=seed)
        columns = [torch.autograd.grad(out[0, i].sum(), v, retain_graph=True)[0][0, :, :, 0] for i in range(40)]
        return (out > 0).permute(0, 2, 1, 3), (torch.stack(columns) > 0).permute(2, 0, 1)[None]

    @pytest.mark.parametrize("seed", [0, 12345, -1])
    def test_forward_backward_and_helper_agree(self, seed: int) -> None:
        wanted = dropout_mask(seed, self.P, 1, 2, 40, 50)
        for kept in self.weights_kept(seed):
            assert torch.equal(kept, wanted)

    @pytest.mark.usefixtures("small_tiles")
    def test_whatever_the_tiles(self) -> None:
        wanted = dropout_mask(7, self.P, 1, 2, 40, 50)
        for kept in self.weights_kept(7):
            assert torch.equal(kept, wanted)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_recomputes_the_same(self, use_reentrant: bool) -> None:
        leaves = qkv(40, 50)

        def call(*tensors: Tensor) -> Tensor:
            return attention(*tensors, dropout_p=self.P, softcap=5.0)

        torch.manual_seed(3)
        plain = [t.clone() for t in leaves]
        out = call(*plain)
        wanted = torch.autograd.grad(out.square().sum(), plain)
        torch.manual_seed(3)
        recomputed = checkpoint(call, *leaves, use_reentrant=use_reentrant)
        recomputed.square().sum().backward()
        assert torch.equal(recomputed, out)
        assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, wanted, strict=True))

    @pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
    def test_the_rate_is_within_three_sigma(self, p: float) -> None:
        kept = dropout_mask(42, p, 2, 4, 300, 500)
        sigma = math.sqrt(p * (1 - p) / kept.numel())
        assert abs(float(kept.double().mean()) - (1 - p)) <= 3 * sigma

    def test_unseeded_calls_follow_pytorchs_generator(self) -> None:
        leaves = qkv(40, 50)
        torch.manual_seed(1)
        first, second = (attention(*leaves, dropout_p=self.P) for _ in range(2))
        torch.manual_seed(1)
        assert torch.equal(attention(*leaves, dropout_p=self.P), first)
        assert not torch.equal(first, second)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(tensor: Tensor) -> Tensor:
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), math.nan, dtype=tensor.dtype)
    wide[..., 3:-2] = tensor
    return wide[..., 3:-2]


def strided(tensor: Tensor) -> Tensor:
    """The last dimension is not contiguous."""
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), math.nan, dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def columns_first(tensor: Tensor) -> Tensor:
    return tensor.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


class TestPoint19Strides:
    @pytest.mark.parametrize("layout", [transposed, sliced, strided, columns_first])
    @BOTH_KERNELS
    def test_views_give_the_contiguous_answer(
        self, layout: Callable[[Tensor], Tensor], options: dict[str, Any]
    ) -> None:
        """q, k, v and the gradient that arrives."""
        leaves, grad = qkv(50, 70, batch=2), draw(2, 50, 4, 16)
        wanted = results(lambda *t: attention(*t, **options), leaves, grad)
        views = tuple(layout(t.detach()).requires_grad_() for t in leaves)
        assert not any(t.is_contiguous() for t in views)
        for one, other in zip(results(lambda *t: attention(*t, **options), views, layout(grad)), wanted, strict=True):
            assert_close(one, other, 32)

    @BOTH_KERNELS
    def test_expanded_inputs_and_gradients(self, options: dict[str, Any]) -> None:
        """Stride 0: one batch of keys for all, and plain out.sum().backward()."""
        q, k, v = qkv(50, 70, batch=2)
        once = k[:1].detach().requires_grad_(), v[:1].detach().requires_grad_()
        found = torch.autograd.grad(attention(q, *(t.expand(2, -1, -1, -1) for t in once), **options).sum(), (q, *once))
        copied = attention(q, *(t.repeat(2, 1, 1, 1) for t in once), **options)
        wanted = torch.autograd.grad(copied, (q, *once), torch.ones_like(copied))
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other, 32)

    def test_expanded_gradient_of_the_lse(self) -> None:
        leaves = qkv(50, 70)
        lse = attention(*leaves, return_lse=True)[1]
        found, wanted = (
            torch.autograd.grad(lse, leaves, grad, retain_graph=True)
            for grad in (torch.ones(()).expand(lse.shape), torch.ones(lse.shape))
        )
        assert same_bits(list(found), list(wanted))


class TestPoint20Everywhere:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
    @BOTH_KERNELS
    def test_dtypes(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        features = ("causal_top_left",) if not options else ("causal_top_left", "window", "sinks")
        oracle.check(make(f"dtype {dtype}", dense(2, 60, 80, 4, 2, 32), features, dtype))

    @BOTH_KERNELS
    def test_autocast(self, options: dict[str, Any]) -> None:
        """As PyTorch's own attention: computed in its dtype, gradients in the inputs' own, mixed inputs taken."""
        leaves = qkv(40, 50)
        grad = draw(1, 40, 4, 16, dtype=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = results(lambda *t: attention(*t, **options), leaves, grad)
            mixed = attention(leaves[0], leaves[1].bfloat16(), leaves[2].half().float(), **options)
        cast = results(lambda *t: attention(*(x.bfloat16() for x in t), **options), leaves, grad)
        assert found[0].dtype is mixed.dtype is torch.bfloat16
        assert all(t.dtype is torch.float32 for t in found[1:])
        assert same_bits(found, cast)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            doubles = tuple(t.double() for t in leaves)
            assert attention(*doubles, **options).dtype is torch.float64

    @BOTH_KERNELS
    def test_threads_of_the_library(self, options: dict[str, Any]) -> None:
        leaves, threads = qkv(200, 200), torch.get_num_threads()
        runs = []
        try:
            for count in (1, 2, 4):
                torch.set_num_threads(count)
                runs.append(results(lambda *t: attention(*t, **options), leaves))
        finally:
            torch.set_num_threads(threads)
        for run in runs[1:]:
            for one, other in zip(run, runs[0], strict=True):
                assert_close(one, other)

    def test_threads_of_the_user(self) -> None:
        """Calls from several Python threads, among them first calls of new problems, do not disturb each other."""

        def call(seqlen: int) -> list[Tensor]:
            table = draw(seqlen)
            leaves = (*qkv(seqlen, seqlen), draw(4).requires_grad_())
            return results(
                lambda q, k, v, sinks: attention(
                    q, k, v, sinks=sinks, score_mod=lambda score, b, h, q_idx, kv_idx: score + table[kv_idx]
                ),
                leaves,
            )

        lengths = [30 + number % 6 for number in range(24)]
        plan.choose.cache_clear()
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(call, lengths))
        for seqlen, one in zip(lengths, found, strict=True):
            assert same_bits(one, call(seqlen))


class TestPoint24Smaller:
    def test_return_types_are_fixed(self) -> None:
        """A tensor, or a State of two; no option adds a third."""
        leaves = qkv(5, 7)
        for options in ({}, {"dropout_p": 0.1}, {"sinks": torch.zeros(4)}, {"deterministic": True}):
            assert type(attention(*leaves, **options)) is Tensor
            assert len(attention(*leaves, return_lse=True, **options)) == 2

    def test_second_derivatives_are_refused_not_dropped(self) -> None:
        """A gradient penalty is an error, eager and compiled; the gradient of something else beside it is not."""
        leaves = qkv(5, 7)
        torch._dynamo.reset()
        for function in (attention, torch.compile(attention, backend="eager", fullgraph=True)):
            out = function(*leaves, causal=True)
            (first,) = torch.autograd.grad(out.sum(), leaves[:1], create_graph=True)
            with pytest.raises(
                RuntimeError, match=r"attention has no second derivative|no autograd formula was registered"
            ):
                (out.sum() + first.square().sum()).backward()
        plain = torch.ones((), requires_grad=True)
        (first,) = torch.autograd.grad(attention(*leaves).sum() + plain**3, (plain,), create_graph=True)
        assert float(torch.autograd.grad(first, (plain,))[0]) == 6

    def test_inference_and_no_grad(self) -> None:
        leaves = qkv(5, 7)
        wanted = attention(*leaves)
        with torch.no_grad():
            assert not attention(*leaves).requires_grad
        with torch.inference_mode():
            assert torch.equal(attention(*leaves, window=(9, 9)), attention(*leaves, window=(9, 9)))
            assert torch.equal(attention(*leaves), wanted)
