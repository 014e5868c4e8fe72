"""Who is measured. To add a peer, write one function and register it:

    @peer("mine", title="My attention", layout="bhsd", devices=("cuda",))
    def _mine(case: Case) -> Attend:
        if case.feature != "causal":
            raise Refused("it has causal attention only")
        return functools.partial(mine.attention, is_causal=True)

The function is called once per case, outside every timing: build masks and plans in it. What it returns is called with
q, k, v in the layout that it asked for, contiguous, so that each peer is given its own best layout.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

import flashtile
from flashtile.bench import cases, textbook
from flashtile.bench.block_masks import block_mask
from flashtile.bench.cases import Case, Tensors

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

LAYOUTS = ("bshd", "bhsd")
"""(batch, seqlen, heads, headdim) and (batch, heads, seqlen, headdim)."""


FORWARD_ALONE = "it has a forward pass alone"

FUSED = ("sdpa_flash", "sdpa_cudnn", "fa3", "fa4", "flashtile")
"""Who computes attention in one kernel on a GPU."""


class Refused(Exception):
    """The peer cannot take the case; the message says why."""


@dataclass(frozen=True)
class Peer:
    """`prepare(case)` gives the function to measure. `quadratic`: how many score matrices it holds at once.
    `trains`: it has a backward pass. `eight`: its inputs are rounded to 8 bits, and its errors are judged so."""

    name: str
    title: str
    prepare: Callable[[Case], Attend]
    layout: str
    devices: tuple[str, ...]
    quadratic: float
    trains: bool = True
    eight: bool = False

    def bind(self, case: Case, tensors: Tensors) -> "Bound":
        """The peer with the case's inputs in its own layout.

        Raises:
            Refused: it cannot take the case.
        """
        if torch.device(case.device).type not in self.devices:
            raise Refused(f"it does not run on {case.device}")
        attend = self.prepare(case)
        own = [self._convert(tensor).detach().requires_grad_(self.trains) for tensor in tensors[:3]]
        return Bound(self, attend, own[0], own[1], own[2], self._convert(tensors.grad))

    def _convert(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).contiguous() if self.layout == "bhsd" else tensor.contiguous()

    def matrix_memory(self, case: Case) -> int:
        """Bytes that its score matrices take."""
        return int(self.quadratic * case.matrix_bytes)


@dataclass
class Bound:
    """One peer, ready to run one case."""

    peer: Peer
    attend: Attend
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor = field(repr=False)

    def forward(self) -> Tensor:
        """The output; its graph is recorded where gradients are enabled."""
        return self.attend(self.q, self.k, self.v)

    def backward(self, out: Tensor, keep: bool = False) -> tuple[Tensor, ...]:
        """Gradients of q, k and v; `keep`: the graph is needed again.

        Raises:
            Refused: the peer has no backward pass.
        """
        if not self.peer.trains:
            raise Refused(FORWARD_ALONE)
        return torch.autograd.grad(out, (self.q, self.k, self.v), self.grad, retain_graph=keep)

    def common(self, tensor: Tensor) -> Tensor:
        """A result of this peer as (batch, seqlen, heads, headdim)."""
        return tensor.detach().transpose(1, 2) if self.peer.layout == "bhsd" else tensor.detach()


PEERS: dict[str, Peer] = {}


def peer(
    name: str,
    *,
    title: str,
    layout: str = "bshd",
    devices: tuple[str, ...] = ("cpu", "cuda"),
    quadratic: float = 0.0,
    trains: bool = True,
    eight: bool = False,
) -> Callable[[Callable[[Case], Attend]], Callable[[Case], Attend]]:
    """Registers a peer; see the module's description."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, need one of {', '.join(LAYOUTS)}")

    def register(prepare: Callable[[Case], Attend]) -> Callable[[Case], Attend]:
        PEERS[name] = Peer(name, title, prepare, layout, devices, quadratic, trains, eight)
        return prepare

    return register


def _dense(case: Case) -> tuple[Tensor | None, Tensor | None]:
    """(bool mask, what joins the scores) of the case."""
    if not cases.FEATURES[case.feature].dense:
        raise Refused(f"it has no {case.feature}")
    return cases.allowed(case), cases.added(case)


@peer("flashtile", title="flashtile")
def _flashtile(case: Case) -> Attend:
    if "packed" in case.feature:
        return _packed(case)
    options: dict[str, Any] = cases.options(case)
    return lambda q, k, v: flashtile.attention(q, k, v, **options)


def _offsets(case: Case) -> tuple[Tensor, int]:
    """(where packed sequences begin and the last one ends, the longest)."""
    lengths = cases.lengths(case)
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(case.device, torch.int32), int(lengths.max())


def _tokens(tensor: Tensor) -> Tensor:
    """The same without its batch of one, as a view: gradients are not copied, as they would be behind an index."""
    return tensor.flatten(0, 1)


def _packed(case: Case) -> Attend:
    """Sequences side by side, told of their lengths."""
    offsets, longest = _offsets(case)
    options: dict[str, Any] = {"causal": "causal" in case.feature, "max_seqlen_q": longest}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flashtile.attention_varlen(_tokens(q), _tokens(k), _tokens(v), offsets, offsets, **options)
        return out[None]

    return call


@peer("flashtile_functions", title="flashtile, functions")
def _flashtile_functions(case: Case) -> Attend:
    """The feature as a user would write it, where `flashtile` has it built in."""
    mask_mod, score_mod = cases.functions(case)
    if mask_mod is None and score_mod is None:
        raise Refused(f"{case.feature} has no function")
    return lambda q, k, v: flashtile.attention(q, k, v, mask=mask_mod, score_mod=score_mod)


# In a training step it keeps the weights, and makes their gradient and that of the scores: three matrices at a time.
@peer("textbook", title="textbook", layout="bhsd", quadratic=3.2)
def _textbook(case: Case) -> Attend:
    allowed, added = _dense(case)
    return lambda q, k, v: textbook.attention(q, k, v, allowed=allowed, added=added)


@peer("flashtile_portable", title="flashtile, portable", devices=("cuda",))
def _flashtile_portable(case: Case) -> Attend:
    """The backend in Triton, named, where another would be faster."""
    options: dict[str, Any] = cases.options(case)
    return lambda q, k, v: flashtile.attention(q, k, v, **options, backend="portable")


@peer("sdpa", title="SDPA", layout="bhsd")
def _sdpa(case: Case) -> Attend:
    return _scaled_dot_product(case)


@peer("sdpa_math", title="SDPA math", layout="bhsd", quadratic=4.0)
def _sdpa_math(case: Case) -> Attend:
    attend = _scaled_dot_product(case)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attend(q, k, v)

    return call


def _by_one_backend(case: Case, backend: SDPBackend) -> Attend:
    """PyTorch's attention held to one of its kernels, which knows no mask but the causal flag."""
    if case.feature not in ("plain", "causal"):
        raise Refused(f"it has no {case.feature}")
    attend = _scaled_dot_product(case)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            try:
                return attend(q, k, v)
            except RuntimeError as error:
                if "No available kernel" in str(error):
                    raise Refused("PyTorch has no such kernel for this case") from error
                raise

    return call


@peer("sdpa_flash", title="SDPA flash (FA2)", layout="bhsd", devices=("cuda",))
def _sdpa_flash(case: Case) -> Attend:
    return _by_one_backend(case, SDPBackend.FLASH_ATTENTION)


@peer("sdpa_cudnn", title="SDPA cuDNN", layout="bhsd", devices=("cuda",))
def _sdpa_cudnn(case: Case) -> Attend:
    return _by_one_backend(case, SDPBackend.CUDNN_ATTENTION)


@peer("sdpa_padded", title="padding and SDPA", layout="bshd", devices=("cuda",))
def _sdpa_padded(case: Case) -> Attend:
    """Packed sequences copied apart to the length of the longest, and back."""
    if case.feature != "packed causal":
        raise Refused(f"it has no {case.feature}")
    lengths = cases.lengths(case)
    longest = int(lengths.max())
    # Padding comes last, and the causal flag hides it from all that counts.
    inside = (torch.arange(longest) < lengths[:, None]).to(case.device)
    places = inside.flatten().nonzero()[:, 0]

    def padded(tensor: Tensor) -> Tensor:
        apart = tensor.new_zeros(len(lengths) * longest, *tensor.shape[2:]).index_copy(0, places, _tokens(tensor))
        return apart.unflatten(0, (len(lengths), longest)).transpose(1, 2)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gqa = case.group > 1
        out = scaled_dot_product_attention(padded(q), padded(k), padded(v), is_causal=True, enable_gqa=gqa)
        return out.transpose(1, 2).flatten(0, 1)[places][None]

    return call


def _flash_attention(case: Case, module: str) -> Attend:
    """A package with the functions of flash-attn, in our layout: plain, causal, windowed and packed."""
    causal = case.feature != "plain"
    packed, windowed = case.feature == "packed causal", case.feature.startswith("window")
    if causal and not (case.feature == "causal" or packed or windowed):
        raise Refused(f"it is measured with no {case.feature}")
    try:
        package = importlib.import_module(module)
    except ImportError as error:
        raise Refused(f"{module} is not installed") from error
    given: dict[str, Any] = {"causal": causal, "softmax_scale": case.headdim**-0.5}
    if windowed:
        given["window_size"] = (cases.reach_of(case), 0)
    if packed:
        offsets, longest = _offsets(case)
        given |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if packed:
            found = package.flash_attn_varlen_func(_tokens(q), _tokens(k), _tokens(v), **given)
        else:
            found = package.flash_attn_func(q, k, v, **given)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out[None] if packed else out

    return call


@peer("fa3", title="FlashAttention-3", devices=("cuda",), trains=False)
def _fa3(case: Case) -> Attend:
    """The package `fa3-fwd`, which has the forward pass alone, and was built without windows."""
    if case.feature.startswith("window"):
        raise Refused(f"it has no {case.feature}")
    return _flash_attention(case, "fa3_fwd_interface")


@peer("fa4", title="FlashAttention-4", devices=("cuda",))
def _fa4(case: Case) -> Attend:
    return _flash_attention(case, "flash_attn.cute")


@peer("flex", title="FlexAttention", layout="bhsd", devices=("cuda",))
def _flex(case: Case) -> Attend:
    """Compiled, its block mask made outside of the timing."""
    mask_mod, score_mod = cases.functions(case)
    if mask_mod is None and score_mod is None and case.feature != "plain":
        raise Refused(f"{case.feature} has no function")
    blocks = None
    if mask_mod is not None:
        blocks = block_mask(mask_mod, case.seqlen, case.device)
    # A round repeats the backward pass, for which the buffers of the forward pass must outlive the first time.
    torch._functorch.config.donated_buffer = False
    attend = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: attend(q, k, v, score_mod=score_mod, block_mask=blocks, enable_gqa=case.group > 1)


def _scaled_dot_product(case: Case) -> Attend:
    """PyTorch's attention, told of causality by its flag and of all else by a mask tensor."""
    shared: dict[str, Any] = {"enable_gqa": case.group > 1}
    if case.feature == "causal":
        return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, **shared)
    allowed, added = _dense(case)
    mask = allowed if added is None else added
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask, **shared)
