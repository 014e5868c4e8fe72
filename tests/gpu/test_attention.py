"""The GPU backends on a GPU: every problem, races, large tensors, compilation, graphs, streams.

Most of the time goes into compiling kernels: `python -m pytest tests/gpu -n 14` does that in 14 processes.
"""

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flashtile
from flashtile import masks, plan
from flashtile.kernels import visits
from flashtile.problem import Inputs, Options, describe
from flashtile.tuning.portable import portable_config
from tests import conformance, kept, shifted
from tests.gpu.graphs import captured
from tests.integrations.rule import assert_close
from tests.oracle import assert_equal_bits
from tests.problems import CASES, Case, dense

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TAKEN = (torch.float32, torch.float16, torch.bfloat16)
REFUSED = {"portable": {"headdim_576_v_512"}, "hopper": conformance.HOPPER_REFUSES}
BACKENDS = [name for name, missing in plan.available() if missing is None and name in REFUSED]
IN_ANY_ORDER = {"hopper": "q"}
"""Whose gradient a backend adds up in any order."""

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def _cases() -> list[object]:
    chosen = [
        (backend, case, dtype)
        for backend in BACKENDS
        for case in CASES
        for dtype in case.dtypes
        if dtype in (conformance.HALF if backend == "hopper" else TAKEN)
    ]
    return [pytest.param(*each, id=f"{each[0]}-{each[1].name}-{each[2]}") for each in chosen]


@pytest.mark.parametrize(("backend", "case", "dtype"), _cases())
def test_matches_reference(backend: str, case: Case, dtype: torch.dtype) -> None:
    if case.name in REFUSED[backend]:
        with pytest.raises(NotImplementedError):
            conformance.check_case(case, dtype, backend, "cuda")
        return
    conformance.check_case(case, dtype, backend, "cuda")


@each_backend
@pytest.mark.parametrize("first", range(1, 261, 65))
def test_lengths_from_1_to_260_with_shifted_logits(backend: str, first: int) -> None:
    """With a mask, a bias and causality together; every other length is shifted down."""
    for part, shift in enumerate((-120.0, 120.0)):
        shapes = [dense(1, length, length, 1, 1, 8) for length in range(first + part, first + 65, 2)]
        shifted.check(shapes, torch.bfloat16, shift, "cuda", backend)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_what_the_mask_says(backend: str, size: int) -> None:
    kept.check(backend, "cuda", size)


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)


def _results(backend: str, tensors: list[Tensor], **options: object) -> list[Tensor]:
    """out, lse, dK, dV and dQ."""
    q, k, v = leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    state = flashtile.attention(*leaves, return_lse=True, backend=backend, **options)
    return [state.out, state.lse, *torch.autograd.grad(state.out.float().square().sum(), (k, v, q))]


def _assert_equal(backend: str, found: list[Tensor], wanted: list[Tensor]) -> None:
    """Bit for bit, but for a dQ that is added up in any order; it comes last."""
    ordered = len(found) - (backend in IN_ANY_ORDER)
    assert_equal_bits(found[:ordered], wanted[:ordered])
    for ours, expected in zip(found[ordered:], wanted[ordered:], strict=True):
        torch.testing.assert_close(ours, expected, rtol=2**-7, atol=2**-7)


def test_the_planner_takes_the_fastest() -> None:
    q = _random(1, 300, 4, 128)
    assert flashtile.explain(q, q, q, causal=True).backend == BACKENDS[0]


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (100, 20)}, {"softcap": 5.0, "causal": True}])
@pytest.mark.parametrize(
    ("backend", "headdim"),
    [(backend, d) for backend in BACKENDS for d in (64, 128, 256) if backend != "hopper" or d < 256],
)
def test_ten_runs_are_equal(backend: str, headdim: int, options: dict[str, object]) -> None:
    if backend == "hopper" and headdim > 128:
        pytest.skip("its backward pass takes up to headdim 128")
    tensors = [_random(2, 1111, heads, headdim, seed=heads) for heads in (8, 2, 2)]
    first = _results(backend, tensors, **options)
    for _ in range(9):
        _assert_equal(backend, _results(backend, tensors, **options), first)


@each_backend
def test_poisoned_memory_is_never_read(backend: str) -> None:
    """Fresh outputs and scratch hold NaN: what is not written would show."""
    tensors = [_random(1, 777, 4, 64, seed=seed) for seed in range(3)]
    first = _results(backend, tensors, causal=True)
    junk = [torch.full((64, 2**20), torch.nan, device="cuda") for _ in range(8)]
    del junk
    _assert_equal(backend, _results(backend, tensors, causal=True), first)


@each_backend
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    """Each sample equals a run by itself, in a tensor whose offsets do not fit into 32 bits."""
    shape = (3, 24000, 16, 1920)
    base = torch.randn(*shape[:3], 1, device="cuda", dtype=torch.bfloat16).expand(shape)
    tensors = [base.contiguous()[..., 1856 * step : 1856 * step + 64] for step in (0, 1)]
    q, k = tensors
    assert (shape[0] - 1) * q.stride(0) + shape[1] * q.stride(1) > 2**31
    with torch.no_grad():
        found = flashtile.attention(q, k, q, causal=True, backend=backend)
        alone = flashtile.attention(*(t[2:].contiguous() for t in (q, k, q)), causal=True, backend=backend)
    assert torch.equal(found[2:], alone)


@each_backend
def test_seventy_thousand_heads_and_documents(backend: str) -> None:
    tensors = [_random(70_000, 17, 1, 16, seed=seed) for seed in range(3)]
    found = _results(backend, tensors, causal=True)
    chosen = slice(69_990, 70_000)
    wanted = _results(backend, [tensor[chosen].contiguous() for tensor in tensors], causal=True)
    assert torch.equal(found[0][chosen], wanted[0])
    assert torch.equal(found[2][chosen], wanted[2])
    packed = [tensor.flatten(0, 1) for tensor in tensors]
    offsets = torch.arange(70_001, device="cuda", dtype=torch.int32) * 17
    out = flashtile.attention_varlen(*packed, offsets, offsets, causal=True, backend=backend)
    assert torch.equal(out.view_as(found[0]), found[0])


@each_backend
def test_compiles_whole_with_changing_lengths(backend: str) -> None:
    slopes = torch.rand(4, device="cuda")

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashtile.attention(q, k, v, causal=True, alibi_slopes=slopes, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for length in (100, 257, 300):
        tensors = [_random(1, length, 4, 64, seed=seed) for seed in range(3)]
        leaves = [tensor.requires_grad_() for tensor in tensors]
        found, wanted = compiled(*leaves), step(*leaves)
        grads = [torch.autograd.grad(out.float().sum(), leaves[::-1]) for out in (found, wanted)]
        _assert_equal(backend, [found, *grads[0]], [wanted, *grads[1]])


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"mask": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 3 == 0}],
    ids=["causal", "mask_mod"],
)
@each_backend
def test_cuda_graph_replays(backend: str, options: dict[str, object]) -> None:
    tensors = [_random(2, 300, 4, 64, seed=seed).requires_grad_() for seed in range(3)]
    out_grad = _random(2, 300, 4, 64, seed=9)

    def step() -> list[Tensor]:
        out = flashtile.attention(*tensors, backend=backend, **options)
        return [out, *torch.autograd.grad(out, tensors, out_grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    with captured() as graph:
        held = step()
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    torch.cuda.synchronize()
    for found, wanted in zip(held, step(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


@each_backend
def test_a_captured_mask_follows_its_tensor(backend: str) -> None:
    """Nothing was called before: the kernels are built inside of the capture."""
    tensors = [_random(2, 300, 4, 64, seed=seed) for seed in range(3)]
    strides = torch.full((1,), 3, dtype=torch.int32, device="cuda")

    def step() -> Tensor:
        return flashtile.attention(
            *tensors, mask=lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % strides[0] == 0, backend=backend
        )

    with captured() as graph:
        held = step()
    for stride in (3, 5):
        strides.fill_(stride)
        graph.replay()
        torch.testing.assert_close(held, step(), rtol=2e-2, atol=2e-2)


@each_backend
def test_packed_calls_ask_the_device_for_nothing(backend: str) -> None:
    q = _random(500, 4, 64)
    offsets = torch.tensor([0, 100, 100, 350, 500], device="cuda", dtype=torch.int64)
    flashtile.attention_varlen(q, q, q, offsets, offsets, causal=True, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        flashtile.attention_varlen(q, q, q, offsets, offsets, causal=True, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_backend
def test_streams_and_threads(backend: str) -> None:
    tensors = [_random(1, 512, 4, 64, seed=seed) for seed in range(3)]
    wanted = _results(backend, tensors, causal=True)
    torch.cuda.synchronize()
    found: list[list[Tensor]] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(_results(backend, tensors, causal=True))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(found) == 4
    for results in found:
        _assert_equal(backend, results, wanted)


@each_backend
def test_block_mask_lists_follow_their_tensors(backend: str) -> None:
    """Lists of tiles are kept while a mask's tensor is unchanged, and made anew when it changes in place."""
    q = _random(1, 512, 2, 64)
    ids = torch.arange(512, device="cuda") // 100
    for _ in range(2):
        found = flashtile.attention(q, q, q, mask=masks.document(ids), backend=backend)
        wanted = flashtile.attention(q, q, q, mask=masks.document(ids), backend="pytorch")
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
        ids += torch.arange(512, device="cuda") // 256


@each_backend
@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "softcap": 4.0}], ids=["causal", "softcap"])
def test_nothing_is_built_after_warming_up(backend: str, options: dict[str, Any]) -> None:
    """Whatever the length: some take other kernels backward."""
    tensors = [_random(1, 64, 4, 56, seed=seed).requires_grad_() for seed in range(3)]
    assert flashtile.warmup(*tensors, backend=backend, **options) > 0
    assert all(tensor.grad is None for tensor in tensors)
    built = flashtile.builds()
    for batch, length in ((1, 1), (2, 17), (1, 128), (3, 500), (1, 1024)):
        _results(backend, [_random(batch, length, 4, 56, seed=seed) for seed in range(3)], **options)
    assert flashtile.builds() == built


def test_the_lists_of_a_mask_of_128k_tokens_are_made_in_5_ms() -> None:
    tokens = 131072
    ids = torch.arange(tokens, device="cuda") // 3000
    mask = masks.causal() & masks.document(ids)
    inputs = Inputs(*(torch.empty(1, tokens, 1, 64, device="cuda", dtype=torch.bfloat16),) * 3, mask=mask.tensors)
    problem = describe(inputs, Options(mask=mask.token, scale=0.1, out_dtype=torch.bfloat16))
    times = []
    # The least of many, for other processes may use the GPU too.
    for _ in range(50):
        torch.cuda.synchronize()
        start = time.perf_counter()
        visits._lists(inputs, problem, *portable_config(64, "masked").forward[:2], False)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3, times


@each_backend
def test_what_a_mask_hides_may_be_nan(backend: str) -> None:
    """Padding of keys and values, whose first rows share a tile with what is seen."""
    used = torch.tensor([700], device="cuda")
    q, k, v = (_random(1, 1000, 2, 64, seed=seed) for seed in range(3))
    k[:, 700:], v[:, 700:] = 0.0, 0.0
    options = {"mask": lambda b, h, q_idx, kv_idx: kv_idx < used[b]}
    clean = _results(backend, [q, k, v], **options)
    k[:, 700:], v[:, 700:] = torch.nan, torch.nan
    for ours, expected in zip(_results(backend, [q, k, v], **options), clean, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2**-6, atol=2**-6)


@each_backend
def test_recalled_calls_use_the_memory_they_are_given(backend: str) -> None:
    """The same shapes at new addresses, in memory that was freed and used again."""
    for seed in range(6):
        tensors = [_random(1, 333, 2, 64, seed=seed + 10 * i) for i in range(3)]
        found = _results(backend, tensors, causal=True)
        wanted = _results("pytorch", tensors, causal=True)
        for ours, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, expected, rtol=3e-2, atol=3e-2)


@each_backend
@pytest.mark.parametrize("kind", ["twins", "saved turned", "sum"])
def test_recalled_calls_see_which_tensors_and_layouts_they_get(backend: str, kind: str) -> None:
    """One tensor in several places, saved tensors that come back with other strides, a gradient that is one number."""

    def turned(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.ndim == 4 else tensor.clone()

    def results(which: str, tensors: list[Tensor], odd: bool) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        used = leaves[:1] * 3 if odd and kind == "twins" else leaves
        pack = turned if odd and kind == "saved turned" else lambda tensor: tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = flashtile.attention(*used, causal=True, backend=which)
        grad = (
            torch.ones((), device="cuda", dtype=out.dtype).expand(out.shape) if odd and kind == "sum" else out.detach()
        )
        return [out, *torch.autograd.grad(out, leaves[: len({*map(id, used)})], grad)]

    for seed in range(10):
        tensors = [_random(1, 333, 2, 64, seed=seed + 10 * i) for i in range(3)]
        odd = seed % 5 in (1, 2, 3)
        for ours, expected in zip(results(backend, tensors, odd), results("pytorch", tensors, odd), strict=True):
            torch.testing.assert_close(ours, expected, rtol=3e-2, atol=3e-2)


@each_backend
def test_block_masks_are_recalled(backend: str) -> None:
    """What was made of the lists of one is used again, and not for another."""
    for reach in (40, 400):
        near = create_block_mask(lambda b, h, q, k, reach=reach: q - k < reach, None, None, 384, 384, device="cuda")
        for seed in range(4):
            tensors = [_random(1, 384, 2, 64, seed=seed + 10 * i) for i in range(3)]
            found = _results(backend, tensors, block_mask=near)
            wanted = _results("pytorch", tensors, block_mask=near)
            for ours, expected in zip(found, wanted, strict=True):
                torch.testing.assert_close(ours, expected, rtol=3e-2, atol=3e-2)


def _adding(table: Tensor) -> Any:
    return lambda score, b, h, q_idx, kv_idx: score + table[b, kv_idx]


@each_backend
def test_functions_that_capture_are_recalled(backend: str) -> None:
    """What they capture is new each time, and wants no gradient."""
    for seed in range(5):
        tensors = [_random(2, 333, 2, 64, seed=seed + 10 * i) for i in range(3)]
        table = _random(2, 333, seed=seed + 30)
        found = _results(backend, tensors, causal=True, score_mod=_adding(table))
        rounded = _results("pytorch", tensors, causal=True, score_mod=_adding(table))
        exact = _results("pytorch", [x.double() for x in tensors], causal=True, score_mod=_adding(table.double()))
        for name, ours, textbook, truth in zip(("out", "lse", "dk", "dv", "dq"), found, rounded, exact, strict=True):
            assert_close(ours, textbook, truth, name, torch.bfloat16 if name == "lse" else None)


@each_backend
@pytest.mark.parametrize("length", [256, 200])
def test_gradients_of_a_bias_are_recalled(backend: str, length: int) -> None:
    """Sixteen entries share it, summed up in two parts; a captured table beside it, as protein folding has both. Where
    rows of statistics are none that its kernel reads whole, only the other kernels are on the tape."""
    for seed in range(5):
        tensors = [_random(16, length, 2, 32, seed=seed + 10 * i) for i in range(3)]
        bias, over_keys = _random(1, 2, length, length, seed=seed + 40), _random(16, length, seed=seed + 50)
        results = []
        for which in (backend, "pytorch"):
            leaves = [tensor.detach().requires_grad_() for tensor in (*tensors, bias)]
            out = flashtile.attention(*leaves[:3], bias=leaves[3], score_mod=_adding(over_keys), backend=which)
            results.append([out, *torch.autograd.grad(out, leaves, out.detach())])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=3e-2, atol=3e-2)


def test_dropout_is_recalled() -> None:
    for seed in range(4):
        tensors = [_random(1, 200, 2, 64, seed=seed + 10 * i) for i in range(3)]
        found = _results("portable", tensors, dropout_p=0.3, seed=seed)
        wanted = _results("pytorch", tensors, dropout_p=0.3, seed=seed)
        for ours, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, expected, rtol=3e-2, atol=3e-2)
    drawn = [flashtile.attention(*tensors, dropout_p=0.3) for _ in range(4)]
    assert not any(torch.equal(drawn[0], other) for other in drawn[1:])


@each_backend
@pytest.mark.parametrize("options", [{"causal": True}, {"mask": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 3 == 0}])
def test_compiled_functions_become_cuda_graphs(backend: str, options: dict[str, object]) -> None:
    """What the library keeps, counters and lists of tiles, does not lie in the graphs' memory."""
    tensors = [_random(2, 300, 4, 64, seed=seed).requires_grad_() for seed in range(3)]
    out_grad = _random(2, 300, 4, 64, seed=9)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashtile.attention(q, k, v, backend=backend, **options) * 2.0

    expected = step(*tensors)
    grads = torch.autograd.grad(expected, tensors, out_grad)
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(*tensors)
        found_grads = torch.autograd.grad(found, tensors, out_grad)
        for one, other in zip((found, *found_grads), (expected, *grads), strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
