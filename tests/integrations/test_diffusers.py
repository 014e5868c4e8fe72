"""diffusers: a transformer through the dispatcher's backend "flashtile", a UNet through the processor."""

import copy
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from diffusers.models import attention_dispatch  # noqa: E402

import flashtile  # noqa: E402
from flashtile.integrations.diffusers import NAME, TileAttnProcessor, _attention, _register  # noqa: E402
from tests import conformance  # noqa: E402
from tests.integrations.rule import assert_close, ran  # noqa: E402


@pytest.fixture(autouse=True)
def _default_backend() -> Iterator[None]:
    """Setting a model's backend sets every other model's too."""
    registry = attention_dispatch._AttentionBackendRegistry
    before = registry._active_backend
    yield
    registry.set_active_backend(before)


def _transformer() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(3)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 12, 4),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.randn(12, 3).round(),
        "txt_ids": torch.zeros(5, 3),
    }
    return model, inputs


def _unet() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(3)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(2, 7, 24),
    }
    return model, inputs


def _results(model: Any, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    out = model(**given).sample
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).sin().reshape(out.shape)).sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {"out": out, **{name: g for name, g in zip(names, found, strict=True) if g is not None}}


def _compare(model: Any, ours: Any, inputs: dict[str, Tensor], calls: int) -> None:
    """Output and gradients of all parameters, and how many attention calls ran here."""
    truth = _results(copy.deepcopy(model).double(), inputs, torch.float64)
    textbook = _results(model, inputs, torch.float32)
    with ran() as plans:
        found = _results(ours, inputs, torch.float32)
    assert len(plans) == 2 * calls
    assert found.keys() == truth.keys()
    largest = max(value.abs().max().item() for name, value in truth.items() if name != "out")
    for name, value in found.items():
        assert_close(value, textbook[name], truth[name], name, scale=0.0 if name == "out" else largest)


class TestBackend:
    def test_transformer(self) -> None:
        model, inputs = _transformer()
        ours = copy.deepcopy(model)
        ours.set_attention_backend(NAME)
        model.set_attention_backend("native")
        _compare(model, ours, inputs, calls=2)

    def test_context(self) -> None:
        model, inputs = _transformer()
        with conformance.watched() as plans, torch.no_grad():
            expected = model(**inputs).sample
        assert plans == []
        with attention_dispatch.attention_backend(NAME), ran(), torch.no_grad():
            found = model(**inputs).sample
        torch.testing.assert_close(found, expected)

    def test_compiled(self) -> None:
        model, inputs = _transformer()
        model.set_attention_backend(NAME)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad(), ran():
            found = compiled(**inputs).sample
        with torch.no_grad():
            torch.testing.assert_close(found, model(**inputs).sample)

    @pytest.mark.parametrize("shape", [(2, 7), (5, 7), (2, 3, 5, 7)])
    @pytest.mark.parametrize("kind", ["bool", "float"])
    def test_masks(self, shape: tuple[int, ...], kind: str) -> None:
        """As diffusers' native backend reads them."""
        q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8)
        mask = torch.rand(shape) > 0.3 if kind == "bool" else torch.randn(shape)
        with ran():
            found = attention_dispatch.dispatch_attention_fn(q, k, k, mask, backend=NAME)
        expected = attention_dispatch.dispatch_attention_fn(q, k, k, mask, backend="native")
        torch.testing.assert_close(found, expected)

    def test_registered_once(self) -> None:
        before = list(attention_dispatch.AttentionBackendName)
        _register()
        assert list(attention_dispatch.AttentionBackendName) == before
        assert attention_dispatch.AttentionBackendName(NAME) in before


class TestUNet:
    def test_processor(self) -> None:
        model, inputs = _unet()
        ours = copy.deepcopy(model)
        ours.set_attn_processor(TileAttnProcessor())
        _compare(model, ours, inputs, calls=len(model.attn_processors))

    def test_mask(self) -> None:
        model, inputs = _unet()
        ours = copy.deepcopy(model)
        ours.set_attn_processor(TileAttnProcessor())
        mask = torch.ones(2, 7).tril(3)
        with torch.no_grad(), ran():
            found = ours(**inputs, encoder_attention_mask=mask).sample
        with torch.no_grad():
            expected = model(**inputs, encoder_attention_mask=mask).sample
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_context_without_a_processor(self) -> None:
        model, inputs = _unet()
        with torch.no_grad():
            expected = model(**inputs).sample
            with flashtile.replace_sdpa(), ran() as plans:
                found = model(**inputs).sample
        assert len(plans) == len(model.attn_processors)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class TestRefused:
    def test_options(self) -> None:
        q = torch.randn(1, 4, 2, 8)
        with pytest.raises(NotImplementedError, match="return_lse: got True, need False in diffusers' backend"):
            _attention(q, q, q, return_lse=True)
        with pytest.raises(NotImplementedError, match="parallel_config: got diffusers' context parallelism, need None"):
            _attention(q, q, q, _parallel_config=object())

    def test_other_versions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(diffusers, "__version__", "0.99.0")
        with pytest.raises(
            NotImplementedError, match=r"diffusers: got version 0.99.0, need 0.42: .* try flashtile.repl"
        ):
            _register()


def test_the_stand_in_must_come_first() -> None:
    """diffusers looks for flash-attn once, at its import; `install_as_flash_attn` says so when it is too late."""
    assert "diffusers" in sys.modules
    installed = flashtile.install_as_flash_attn()
    installed.uninstall()
    assert "diffusers was imported before: it looks only once" in str(installed)
