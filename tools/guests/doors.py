"""How flashtile comes in the place of each library's attention. Without a GPU, "cuda" means the CPU."""

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import flashtile

PARAMETERS: dict[str, list[Any]] = {}
"""Values that a parameter of the tests has in the place of its own."""

REPLACED: dict[str, Any] = {}
"""What a test module has in the place of its own functions of that name."""


def _module(name: str, **members: Any) -> ModuleType:
    """A module that others can import from now on."""
    made = sys.modules[name] = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(members)
    parent, _, own = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], own, made)
    return made


class _OnCpu(TorchFunctionMode):
    """What asks for a CUDA device gets the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls func with other devices."""
        kwargs = {name: _cpu(value) if name == "device" else value for name, value in (kwargs or {}).items()}
        return func(*(args if func is torch.Tensor.__getitem__ else map(_cpu, args)), **kwargs)


def _cpu(value: Any) -> Any:
    found = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
    return torch.device("cpu") if found else value


def _without_a_gpu(capability: tuple[int, int]) -> None:
    """What tests that were written for a GPU of this capability ask of one."""
    if torch.cuda.is_available():
        return
    properties = SimpleNamespace(total_memory=80 * 2**30, multi_processor_count=132)
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda device=None: None
    _OnCpu().__enter__()


def _rotary(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0, **_: Any
) -> Tensor:
    """The formula, for tests' own references: x (batch, seqlen, heads, headdim), cos and sin (positions, pairs)."""
    offsets = torch.as_tensor(seqlen_offsets).expand(x.shape[0]).long()
    places = offsets[:, None] + torch.arange(x.shape[1])
    turn = torch.complex(cos.float(), sin.float())[places][:, :, None]
    size = 2 * turn.shape[-1]
    pairs = x[..., :size].float().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    dim = -1 if interleaved else -2
    turned = torch.complex(*pairs.unbind(dim)) * turn
    rotated = torch.stack([turned.real, turned.imag], dim=dim).flatten(-2).to(x.dtype)
    return torch.cat([rotated, x[..., size:]], dim=-1)


def _flash_attn(capability: tuple[int, int]) -> None:
    """The stand-in, and what the tests besides take from flash-attn for their references."""
    flashtile.install_as_flash_attn()
    import flash_attn.flash_attn_interface as interface

    interface.USE_TRITON_ROCM = False
    # The weights that its kernels hand out are scaled by blocks of keys and normalised by the tests; ours are already.
    interface._get_block_size_n = None
    REPLACED["normalize_flash_attn_S"] = lambda weights, *_, **__: weights
    _module("flash_attn.layers")
    _module("flash_attn.layers.rotary", apply_rotary_emb=_rotary)
    _without_a_gpu(capability)


def _for_transformers() -> None:
    """Its tests of models import its tests of pipelines, which need much more and have no part in what is run."""
    _module("tests.test_pipeline_mixin", PipelineTesterMixin=type("PipelineTesterMixin", (), {}))


def _transformers() -> None:
    """Every model that runs on "sdpa", which is what they run on unless asked otherwise."""
    _for_transformers()
    import transformers

    from flashtile.integrations.transformers import attention_forward, attention_mask

    transformers.AttentionInterface.register("sdpa", attention_forward)
    transformers.AttentionMaskInterface.register("sdpa", attention_mask)


class _Replacing(TorchFunctionMode):
    """`replace_sdpa`, but for calls that ask for PyTorch's formula, with which tests compare."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls func with flashtile in its place where it is attention."""
        if not torch.backends.cuda.flash_sdp_enabled():
            return func(*args, **(kwargs or {}))
        with flashtile.replace_sdpa():
            return func(*args, **(kwargs or {}))


def _pytorch() -> None:
    _Replacing().__enter__()


def _diffusers() -> None:
    """The dispatcher's default is flashtile's, and tests of backends get it in the place of those that they name.
    Models without a dispatcher, UNets among them, have its processor for their default."""
    from diffusers.models import attention_processor
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    from flashtile.integrations.diffusers import TileAttnProcessor

    ours = AttentionBackendName("flashtile")
    _AttentionBackendRegistry.set_active_backend(ours)
    PARAMETERS["backend"] = [ours]
    attention_processor.AttnProcessor2_0 = TileAttnProcessor


def _evoformer() -> None:
    """DeepSpeed without DeepSpeed."""
    from flashtile.integrations.evoformer import DS4Sci_EvoformerAttention

    device = "cuda" if torch.cuda.is_available() else "cpu"
    accelerator = SimpleNamespace(device_name=lambda: device)
    builder = SimpleNamespace(NAME="evoformer_attn")
    _module("deepspeed")
    _module("deepspeed.ops", __compatible_ops__={builder.NAME: True})
    _module("deepspeed.ops.op_builder", EvoformerAttnBuilder=builder)
    _module("deepspeed.ops.deepspeed4science", DS4Sci_EvoformerAttention=DS4Sci_EvoformerAttention)
    _module("deepspeed.accelerator", get_accelerator=lambda: accelerator)
    _module("unit")
    _module("unit.util", skip_on_arch=lambda least: None)


DOORS: dict[str, Callable[[], object]] = {
    "flash-attn": lambda: _flash_attn((8, 0)),
    "flash-attn-3": lambda: _flash_attn((9, 0)),
    "transformers": _transformers,
    "diffusers": _diffusers,
    "pytorch": _pytorch,
    "evoformer": _evoformer,
    "none": _for_transformers,
    # The installed version is there before diffusers' tests put their checkout's sources first.
    "no-diffusers": lambda: importlib.import_module("diffusers"),
}
"""What `--door` takes, "none" and "no-..." for no flashtile; called once, before tests are imported."""
