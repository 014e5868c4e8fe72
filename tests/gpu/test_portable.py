"""The portable backend on a GPU: every problem, races, large tensors, compilation, graphs, streams."""

import threading
import time

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile import masks
from flashtile.kernels import visits
from flashtile.problem import Inputs, Options, describe
from flashtile.tuning.portable import portable_config
from tests import conformance
from tests.oracle import assert_equal_bits
from tests.problems import CASES, Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TAKEN = (torch.float32, torch.float16, torch.bfloat16)
REFUSED = {"headdim_576_v_512"}


def _cases() -> list[object]:
    chosen = [(case, dtype) for case in CASES for dtype in case.dtypes if dtype in TAKEN]
    return [pytest.param(case, dtype, id=f"{case.name}-{dtype}") for case, dtype in chosen]


@pytest.mark.parametrize(("case", "dtype"), _cases())
def test_matches_reference(case: Case, dtype: torch.dtype) -> None:
    if case.name in REFUSED:
        with pytest.raises(NotImplementedError):
            conformance.check_case(case, dtype, "portable", "cuda")
        return
    conformance.check_case(case, dtype, "portable", "cuda")


def _random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)


def _results(tensors: list[Tensor], **options: object) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    state = flashtile.attention(*leaves, return_lse=True, backend="portable", **options)
    return [state.out, state.lse, *torch.autograd.grad(state.out.float().square().sum(), leaves)]


@pytest.mark.parametrize("options", [{"causal": True}, {"window": (100, 20)}, {"softcap": 5.0, "causal": True}])
@pytest.mark.parametrize("headdim", [64, 128, 256])
def test_ten_runs_are_equal(options: dict[str, object], headdim: int) -> None:
    tensors = [_random(2, 1111, heads, headdim, seed=heads) for heads in (8, 2, 2)]
    first = _results(tensors, **options)
    for _ in range(9):
        assert_equal_bits(_results(tensors, **options), first)


def test_poisoned_memory_is_never_read() -> None:
    """Fresh outputs and scratch hold NaN: what is not written would show."""
    tensors = [_random(1, 777, 4, 64, seed=seed) for seed in range(3)]
    first = _results(tensors, causal=True)
    junk = [torch.full((64, 2**20), torch.nan, device="cuda") for _ in range(8)]
    del junk
    assert_equal_bits(_results(tensors, causal=True), first)


def test_more_than_two_to_the_31_elements() -> None:
    """Each sample equals a run by itself, in a tensor whose offsets do not fit into 32 bits."""
    shape = (3, 24000, 16, 1920)
    base = torch.randn(*shape[:3], 1, device="cuda", dtype=torch.bfloat16).expand(shape)
    tensors = [base.contiguous()[..., 1856 * step : 1856 * step + 64] for step in (0, 1)]
    q, k = tensors
    assert (shape[0] - 1) * q.stride(0) + shape[1] * q.stride(1) > 2**31
    with torch.no_grad():
        found = flashtile.attention(q, k, q, causal=True, backend="portable")
        alone = flashtile.attention(*(t[2:].contiguous() for t in (q, k, q)), causal=True, backend="portable")
    assert torch.equal(found[2:], alone)


def test_seventy_thousand_heads_and_documents() -> None:
    tensors = [_random(70_000, 17, 1, 16, seed=seed) for seed in range(3)]
    found = _results(tensors, causal=True)
    chosen = slice(69_990, 70_000)
    wanted = _results([tensor[chosen].contiguous() for tensor in tensors], causal=True)
    assert torch.equal(found[0][chosen], wanted[0])
    assert torch.equal(found[2][chosen], wanted[2])
    packed = [tensor.flatten(0, 1) for tensor in tensors]
    offsets = torch.arange(70_001, device="cuda", dtype=torch.int32) * 17
    out = flashtile.attention_varlen(*packed, offsets, offsets, causal=True, backend="portable")
    assert torch.equal(out.view_as(found[0]), found[0])


def test_compiles_whole_with_changing_lengths() -> None:
    slopes = torch.rand(4, device="cuda")

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashtile.attention(q, k, v, causal=True, alibi_slopes=slopes, backend="portable")

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for length in (100, 257, 300):
        tensors = [_random(1, length, 4, 64, seed=seed) for seed in range(3)]
        leaves = [tensor.requires_grad_() for tensor in tensors]
        found, wanted = compiled(*leaves), step(*leaves)
        assert torch.equal(found, wanted)
        grads = [torch.autograd.grad(out.float().sum(), leaves) for out in (found, wanted)]
        assert_equal_bits(*grads)


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"mask": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 3 == 0}],
    ids=["causal", "mask_mod"],
)
def test_cuda_graph_replays(options: dict[str, object]) -> None:
    tensors = [_random(2, 300, 4, 64, seed=seed).requires_grad_() for seed in range(3)]
    out_grad = _random(2, 300, 4, 64, seed=9)

    def step() -> list[Tensor]:
        out = flashtile.attention(*tensors, backend="portable", **options)
        return [out, *torch.autograd.grad(out, tensors, out_grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    torch.cuda.synchronize()
    for found, wanted in zip(held, step(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_packed_calls_ask_the_device_for_nothing() -> None:
    q = _random(500, 4, 64)
    offsets = torch.tensor([0, 100, 100, 350, 500], device="cuda", dtype=torch.int64)
    flashtile.attention_varlen(q, q, q, offsets, offsets, causal=True, backend="portable")
    torch.cuda.set_sync_debug_mode("error")
    try:
        flashtile.attention_varlen(q, q, q, offsets, offsets, causal=True, backend="portable")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_and_threads() -> None:
    tensors = [_random(1, 512, 4, 64, seed=seed) for seed in range(3)]
    wanted = _results(tensors, causal=True)
    torch.cuda.synchronize()
    found: list[list[Tensor]] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(_results(tensors, causal=True))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(found) == 4
    for results in found:
        assert_equal_bits(results, wanted)


def test_block_mask_lists_follow_their_tensors() -> None:
    """Lists of tiles are kept while a mask's tensor is unchanged, and made anew when it changes in place."""
    q = _random(1, 512, 2, 64)
    ids = torch.arange(512, device="cuda") // 100
    for _ in range(2):
        found = flashtile.attention(q, q, q, mask=masks.document(ids), backend="portable")
        wanted = flashtile.attention(q, q, q, mask=masks.document(ids), backend="pytorch")
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
        ids += torch.arange(512, device="cuda") // 256


def test_nothing_is_built_after_warming_up() -> None:
    options = {"causal": True, "softcap": 4.0, "backend": "portable"}
    tensors = [_random(1, 64, 4, 48, seed=seed).requires_grad_() for seed in range(3)]
    assert flashtile.warmup(*tensors, **options) > 0  # type: ignore[arg-type]
    assert all(tensor.grad is None for tensor in tensors)
    built = flashtile.builds()
    for batch, length in ((1, 1), (2, 17), (1, 128), (3, 500), (1, 1024)):
        _results([_random(batch, length, 4, 48, seed=seed) for seed in range(3)], causal=True, softcap=4.0)
    assert flashtile.builds() == built


def test_the_lists_of_a_mask_of_128k_tokens_are_made_in_5_ms() -> None:
    tokens = 131072
    ids = torch.arange(tokens, device="cuda") // 3000
    mask = masks.causal() & masks.document(ids)
    inputs = Inputs(*(torch.empty(1, tokens, 1, 64, device="cuda", dtype=torch.bfloat16),) * 3, mask=mask.tensors)
    problem = describe(inputs, Options(mask=mask.token, scale=0.1, out_dtype=torch.bfloat16))
    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        visits._make(inputs, problem, *portable_config(64, "masked").forward[:2], False)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3, times
