"""The integrations on a GPU: what PyTorch's flash operator is given there, and what only a GPU takes.

Most of the time goes into compiling kernels: `python -m pytest tests/gpu/test_integrations.py -n 8`.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flashtile
from flashtile.integrations.serving import ragged
from tests import conformance
from tests.gpu.graphs import captured
from tests.integrations import engines
from tests.integrations.rule import assert_close, ran

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture
def activated() -> Iterator[None]:
    flashtile.activate_sdpa()
    yield
    flashtile.deactivate_sdpa()


def _leaves(heads_kv: int, dtype: torch.dtype, headdim: int = 64) -> list[Tensor]:
    shapes = ((2, 4, 70, headdim), (2, heads_kv, 70, headdim), (2, heads_kv, 70, headdim))
    return [torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_() for shape in shapes]


def _results(function: object, leaves: list[Tensor], **options: object) -> list[Tensor]:
    out = function(*leaves, **options)  # type: ignore[operator]
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]


@pytest.mark.usefixtures("activated")
class TestActivated:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("headdim", [64, 40])
    def test_results(self, dtype: torch.dtype, causal: bool, headdim: int) -> None:
        leaves = _leaves(4, dtype, headdim)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION), ran() as plans:
            found = _results(F.scaled_dot_product_attention, leaves, is_causal=causal)
        assert [plan.problem.backward for plan in plans] == [False, True]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            textbook = _results(F.scaled_dot_product_attention, leaves, is_causal=causal)
            exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
            truth = _results(F.scaled_dot_product_attention, exact, is_causal=causal)
        for name, *three in zip(("out", "dq", "dk", "dv"), found, textbook, truth, strict=True):
            assert_close(*three, name)

    def test_grouped_queries(self) -> None:
        leaves = _leaves(2, torch.bfloat16)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION), ran() as plans:
            F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True).sum().backward()
        assert {plan.problem.heads_kv for plan in plans} == {2}

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_compiled(self, backend: str) -> None:
        leaves = _leaves(4, torch.bfloat16)

        def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q * 2, k, v, is_causal=True) * 2

        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            with ran() as plans:
                found = _results(torch.compile(layer, fullgraph=True, backend=backend), leaves)
            expected = _results(layer, leaves)
        assert [plan.problem.backward for plan in plans] == [False, True]
        for ours, eager in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)

    def test_dropout_runs_pytorchs_kernel(self) -> None:
        leaves = _leaves(4, torch.bfloat16)
        with conformance.watched() as plans:
            found = _results(F.scaled_dot_product_attention, leaves, dropout_p=0.5)
        assert plans == []
        assert all(tensor.isfinite().all() for tensor in found)

    def test_restored_between_the_passes(self) -> None:
        """PyTorch's backward kernel takes what our forward kernel returned."""
        leaves = _leaves(4, torch.bfloat16)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            expected = _results(F.scaled_dot_product_attention, leaves)
            out = F.scaled_dot_product_attention(*leaves)
            flashtile.deactivate_sdpa()
            with conformance.watched() as plans:
                found = torch.autograd.grad(out.float().square().sum(), leaves)
        assert plans == []
        for ours, theirs in zip(expected[1:], found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_masked_calls() -> None:
    leaves = _leaves(4, torch.bfloat16)
    bias = torch.randn(4, 70, 70, device="cuda", requires_grad=True)
    with flashtile.replace_sdpa(), ran() as plans:
        F.scaled_dot_product_attention(*leaves, attn_mask=bias).float().sum().backward()
    assert bias.grad is not None
    assert bias.grad.shape == bias.shape
    assert {plan.backend for plan in plans} <= {"hopper", "portable"}


MODEL_NAMES = (
    "BertForMaskedLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Gemma2ForCausalLM",
    "DeepseekV3ForCausalLM",
)


@pytest.mark.parametrize("name", MODEL_NAMES)
@pytest.mark.parametrize("padded", [False, True])
def test_transformers(name: str, padded: bool) -> None:
    """Small models in bfloat16: logits and gradients err at most twice as much as those of "eager"."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from flashtile.integrations.transformers import NAME
    from tests.integrations import models

    model = models.MODELS[name]
    inputs = {key: value.cuda() for key, value in model.inputs().items()}
    valid = torch.ones(2, 9, device="cuda")
    if padded:
        valid[0, 5:] = 0
        inputs["attention_mask"] = valid
    runs = {}
    for kind, implementation, dtype in (
        ("truth", "eager", torch.float64),
        ("textbook", "eager", torch.bfloat16),
        ("found", NAME, torch.bfloat16),
    ):
        built = model.build(implementation).cuda().to(dtype)
        with conformance.watched() as plans:
            runs[kind] = models.run(built, inputs, valid)
    assert len(plans) == 2 * model.calls
    assert {plan.backend for plan in plans} <= {"hopper", "portable"}
    largest = max(value.abs().max().item() for key, value in runs["truth"].items() if key != "logits")
    for key, value in runs["found"].items():
        scale = 0.0 if key == "logits" else largest
        assert_close(value, runs["textbook"][key], runs["truth"][key], key, scale=scale)


def test_transformers_in_a_cuda_graph() -> None:
    """The mask function reads nothing on the host while a graph is captured."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from flashtile.integrations.transformers import NAME
    from tests.integrations import models

    model = models.MODELS["LlamaForCausalLM"].build(NAME).cuda().bfloat16()
    ids = models.tokens(2, 9).cuda()
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(input_ids=ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(stream)
        with captured() as graph:
            found = model(input_ids=ids, use_cache=False).logits
        graph.replay()
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evoformer(dtype: torch.dtype) -> None:
    """Both biases and their gradients, on the GPU's kernels."""
    from flashtile.integrations.evoformer import evoformer_attention

    shapes = ((1, 5, 70, 4, 32), (1, 5, 70, 4, 32), (1, 5, 70, 4, 32), (1, 5, 1, 1, 70), (1, 1, 4, 70, 70))
    leaves = [torch.randn(*shape, device="cuda").to(dtype).requires_grad_() for shape in shapes]

    def formula(q: Tensor, k: Tensor, v: Tensor, over_keys: Tensor, over_pairs: Tensor) -> Tensor:
        scores = torch.einsum("...qhd,...khd->...hqk", q, k) * 32**-0.5 + over_keys + over_pairs
        return torch.einsum("...hqk,...khd->...qhd", torch.softmax(scores, dim=-1), v)

    with ran() as plans:
        found = _results(lambda q, k, v, *biases: evoformer_attention(q, k, v, biases), leaves)
    assert {plan.backend for plan in plans} <= {"hopper", "portable"}
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    textbook, truth = _results(formula, leaves), _results(formula, exact)
    for name, *three in zip(("out", "dq", "dk", "dv", "dkeys", "dpairs"), found, textbook, truth, strict=True):
        assert_close(*three, name)


def test_flash_attn_varlen() -> None:
    from flashtile.integrations.flash_attn import flash_attn_func, flash_attn_varlen_func

    q = torch.randn(100, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    offsets = torch.tensor([0, 33, 100], dtype=torch.int32, device="cuda")
    with ran():
        out = flash_attn_varlen_func(q, q, q, offsets, offsets, 67, 67, causal=True)
    for begin, end in ((0, 33), (33, 100)):
        part = q[None, begin:end]
        torch.testing.assert_close(out[begin:end], flash_attn_func(part, part, part, causal=True)[0])


def test_batches_of_a_serving_engine() -> None:
    """Prompts, chunks of prompts and single tokens over one paged cache, as the engines' backends run them."""
    server = engines.Server(torch.float16)
    caches = [torch.full((engines.PAGES, engines.PAGE, 2, 16), torch.nan, device="cuda").half() for _ in range(2)]
    for news in engines.STEPS:
        step = server.step(news)
        for cache, fresh in zip(caches, (step.k, step.v), strict=True):
            cache.flatten(0, 1)[step.slots.cuda()] = fresh.cuda()
        lengths, table = torch.tensor(step.lengths, device="cuda"), server.table(step.requests).cuda()
        out = torch.zeros(*step.q.shape, device="cuda").half()
        found = ragged.attention(step.q.cuda(), *caches, ragged.grouped(step.starts, lengths, table), out)
        assert_close(found.cpu(), *server.expected(step))
