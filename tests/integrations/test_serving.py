"""Serving engines' backends over stand-ins of the engines: steps of a server beside the textbook formula."""

import importlib
from collections.abc import Iterator
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile import plan
from tests.integrations import engines
from tests.integrations.engines import HEADDIM, HEADS, HEADS_KV, PAGE, PAGES, STEPS, Mode, Pool, Server, Step, layer
from tests.integrations.rule import assert_close

VLLM, SGLANG = "flashtile.integrations.serving.vllm", "flashtile.integrations.serving.sglang"
SLOPES = [0.5, 0.25, 0.1, 0.0]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that ran."""
    ran: list[str] = []
    original = plan.decoder

    def decoder(chosen: Any) -> Any:
        ran.append(chosen.kernel)
        return original(chosen)

    monkeypatch.setattr(plan, "decoder", decoder)
    return ran


@pytest.fixture
def vllm() -> Iterator[Any]:
    with engines.installed(engines.vllm_modules(), VLLM):
        yield importlib.import_module(VLLM)


@pytest.fixture
def sglang() -> Iterator[Any]:
    with engines.installed(engines.sglang_modules(), SGLANG):
        yield importlib.import_module(SGLANG)


@pytest.mark.parametrize(("group", "module"), [("vllm.general_plugins", VLLM), ("sglang.srt.plugins", SGLANG)])
def test_entry_points(group: str, module: str, caplog: pytest.LogCaptureFixture) -> None:
    """What is installed names functions that are there; without the engine they do nothing, and raise nothing."""
    (found,) = (point for point in metadata.entry_points(group=group) if point.name == "flashtile")
    assert found.value == f"{module}:register"
    with caplog.at_level("INFO", "flashtile"):
        found.load()()
    assert f"No module named '{group.split('.')[0]}'" in caplog.text


class TestVllm:
    def _metadata(self, vllm: Any, server: Server, step: Step, padded: int = 0) -> Any:
        builder = vllm.TileBackend.get_builder_cls()(None, ["layer"], None, torch.device("cpu"))
        return builder.build(
            0,
            SimpleNamespace(
                query_start_loc_cpu=torch.tensor(step.starts),
                seq_lens=torch.tensor(step.lengths, dtype=torch.int32),
                block_table_tensor=server.table(step.requests).int(),
                slot_mapping=torch.cat([step.slots, torch.full((padded,), -1)]),
                num_actual_tokens=len(step.slots) + padded,
                causal=True,
            ),
        )

    @pytest.mark.parametrize(
        ("given", "meant"),
        [
            ({}, {}),
            (
                {"sliding_window": 8, "logits_soft_cap": 5.0, "sinks": torch.linspace(-1, 1, HEADS)},
                {"window": 7, "softcap": 5.0, "sinks": torch.linspace(-1, 1, HEADS)},
            ),
            ({"alibi_slopes": SLOPES}, {"slopes": torch.tensor(SLOPES)}),
        ],
    )
    def test_steps(self, vllm: Any, kernels: list[str], given: dict[str, Any], meant: dict[str, Any]) -> None:
        backend = vllm.TileBackend
        cache = torch.full(backend.get_kv_cache_shape(PAGES, PAGE, HEADS_KV, HEADDIM), torch.nan)
        attend = backend.get_impl_cls()(HEADS, HEADDIM, HEADDIM**-0.5, HEADS_KV, **given)
        server = Server()
        for news in STEPS:
            step = server.step(news)
            out = torch.full((len(step.q), HEADS * HEADDIM), torch.nan)
            known = self._metadata(vllm, server, step)
            assert attend.forward(None, step.q, step.k, step.v, cache, known, out) is out
            assert_close(out.view(-1, HEADS, HEADDIM), *server.expected(step, **meant))
        # One call for each number of new tokens.
        assert len(kernels) == sum(len(set(news.values())) for news in STEPS)

    def test_padded_tokens(self, vllm: Any) -> None:
        """Tokens without a slot write to the block that is nobody's; more queries than tokens are left alone."""
        cache = torch.zeros(vllm.TileBackend.get_kv_cache_shape(PAGES, PAGE, HEADS_KV, HEADDIM))
        attend = vllm.TileImpl(HEADS, HEADDIM, HEADDIM**-0.5, HEADS_KV)
        server = Server()
        step = server.step({0: 3, 1: 1})
        q, k, v = (torch.cat([tensor, torch.randn(2, *tensor.shape[1:])]) for tensor in (step.q, step.k, step.v))
        out = torch.zeros(6, HEADS, HEADDIM)
        attend.forward(None, q, k, v, cache, self._metadata(vllm, server, step, padded=2), out)
        assert_close(out[:4], *server.expected(step))
        assert not out[4:].any()
        owned = [0, *server.pages[0], *server.pages[1]]
        assert not cache[[page for page in range(PAGES) if page not in owned]].any()

    def test_shared_caches_and_the_measuring_run(self, vllm: Any) -> None:
        cache = torch.zeros(vllm.TileBackend.get_kv_cache_shape(PAGES, PAGE, HEADS_KV, HEADDIM))
        attend = vllm.TileImpl(HEADS, HEADDIM, HEADDIM**-0.5, HEADS_KV)
        shared = vllm.TileImpl(HEADS, HEADDIM, HEADDIM**-0.5, HEADS_KV, kv_sharing_target_layer_name="first")
        server = Server()
        step = server.step({0: 5})
        out = torch.ones(5, HEADS, HEADDIM)
        assert not attend.forward(None, step.q, step.k, step.v, cache, None, out).any()
        known = self._metadata(vllm, server, step)
        attend.forward(None, step.q, step.k, step.v, cache, known, out)
        written = cache.clone()
        again = shared.forward(None, step.q, step.k * 2, step.v * 2, cache, known, torch.empty_like(out))
        torch.testing.assert_close(again, out)
        torch.testing.assert_close(cache, written)

    def test_registered_once(self, vllm: Any) -> None:
        registry = importlib.import_module("vllm.v1.attention.backends.registry")
        vllm.register()
        assert registry.paths == {registry.AttentionBackendEnum.CUSTOM: f"{VLLM}.TileBackend"}
        registry.paths[registry.AttentionBackendEnum.CUSTOM] = "another's"
        vllm.register()
        assert set(registry.paths.values()) == {"another's"}

    def test_refusals(self, vllm: Any) -> None:
        with pytest.raises(ValueError, match="page_size: got 8"):
            vllm.TileBackend.get_kv_cache_shape(PAGES, 8, HEADS_KV, HEADDIM)
        with pytest.raises(NotImplementedError, match="attention: got encoder_only"):
            vllm.TileImpl(HEADS, HEADDIM, 1.0, HEADS_KV, attn_type="encoder_only")
        with pytest.raises(NotImplementedError, match="causal: got other"):
            vllm.TileMetadataBuilder(None, [], None, None).build(0, SimpleNamespace(causal=False))
        with pytest.raises(NotImplementedError, match="output_scale"):
            vllm.TileImpl(HEADS, HEADDIM, 1.0).forward(None, *[None] * 6, output_scale=torch.ones(1))


class TestSglang:
    def _runner(self, server_slots: Tensor | None = None, **changes: Any) -> Any:
        slots = torch.zeros(8, PAGES * PAGE, dtype=torch.int32) if server_slots is None else server_slots
        usual = {"token_to_kv_pool": Pool(), "req_to_token_pool": SimpleNamespace(req_to_token=slots)}
        return SimpleNamespace(**{**usual, "page_size": PAGE, "use_mla_backend": False, **changes})

    def _batch(self, runner: Any, server: Server, step: Step) -> Any:
        """Requests have rows of the table of slots, of which SGLang fills in what each has."""
        places = torch.tensor([5 - request for request in step.requests])
        for place, request, length in zip(places.tolist(), step.requests, step.lengths, strict=True):
            own = [page * PAGE + row for page in server.pages[request] for row in range(PAGE)]
            runner.req_to_token_pool.req_to_token[place, :length] = torch.tensor(own[:length])
        lengths = torch.tensor(step.lengths)
        return SimpleNamespace(
            forward_mode=Mode(decoding=set(step.counts) == {1}),
            req_pool_indices=places,
            seq_lens=lengths,
            seq_lens_cpu=lengths,
            extend_seq_lens_cpu=step.counts,
            out_cache_loc=step.slots,
        )

    @pytest.mark.parametrize(
        ("changes", "meant"),
        [
            ({}, {}),
            ({"sliding_window_size": 7, "logit_cap": 5.0}, {"window": 7, "softcap": 5.0}),
        ],
    )
    @pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 1, HEADS)])
    def test_steps(self, sglang: Any, kernels: list[str], changes: Any, meant: Any, sinks: Tensor | None) -> None:
        runner, server = self._runner(), Server()
        backend = sglang.create(runner)
        for news in STEPS:
            step = server.step(news)
            batch = self._batch(runner, server, step)
            backend.init_forward_metadata(batch)
            run = backend.forward_decode if batch.forward_mode.is_decode() else backend.forward_extend
            out = run(step.q.flatten(1), step.k, step.v, layer(**changes), batch, sinks=sinks)
            assert out.shape == (len(step.q), HEADS * HEADDIM)
            assert_close(out.view(-1, HEADS, HEADDIM), *server.expected(step, sinks=sinks, **meant))
        assert len(kernels) == sum(len(set(news.values())) for news in STEPS)

    def test_saved_elsewhere(self, sglang: Any) -> None:
        """Keys that the engine has written itself are not written again."""
        runner, server = self._runner(), Server()
        backend, step = sglang.create(runner), server.step({0: 4})
        batch = self._batch(runner, server, step)
        backend.init_forward_metadata(batch)
        pool = runner.token_to_kv_pool
        pool.k[step.slots], pool.v[step.slots] = step.k, step.v
        out = backend.forward_extend(step.q, step.k * 0, step.v * 0, layer(), batch, save_kv_cache=False)
        assert_close(out.view(-1, HEADS, HEADDIM), *server.expected(step))

    def test_registered(self, sglang: Any) -> None:
        sglang.register()
        registry = importlib.import_module("sglang.srt.layers.attention.attention_registry")
        assert {"flashtile": sglang.create} == registry.ATTENTION_BACKENDS
        assert importlib.import_module("sglang.srt.server_args").choices == ["triton", "flashtile"]

    def test_refusals(self, sglang: Any) -> None:
        with pytest.raises(ValueError, match="page_size: got 1"):
            sglang.create(self._runner(page_size=1))
        with pytest.raises(NotImplementedError, match="attention: got latent attention"):
            sglang.create(self._runner(use_mla_backend=True))
        runner, server = self._runner(), Server()
        backend, step = sglang.create(runner), server.step({0: 4})
        batch = self._batch(runner, server, step)
        with pytest.raises(NotImplementedError, match="attention: got cross attention"):
            backend.forward_extend(step.q, step.k, step.v, layer(is_cross_attention=True), batch)
        with pytest.raises(NotImplementedError, match="attention: got encoder_only"):
            backend.forward_extend(step.q, step.k, step.v, layer(attn_type="encoder_only"), batch)
        batch.forward_mode = Mode(verifying=True)
        with pytest.raises(NotImplementedError, match="attention: got speculative decoding"):
            backend.init_forward_metadata(batch)


def test_without_the_interface(caplog: pytest.LogCaptureFixture) -> None:
    """A vLLM that has a registry and keeps its classes elsewhere is left alone."""
    modules = engines.vllm_modules()
    del modules["vllm.v1.attention.backend"]
    with engines.installed(modules, VLLM), caplog.at_level("INFO", "flashtile"):
        importlib.import_module(VLLM).register()
    assert modules["vllm.v1.attention.backends.registry"]["paths"] == {}
    assert "flashtile is no backend of this vLLM" in caplog.text
