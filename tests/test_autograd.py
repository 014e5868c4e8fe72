"""The operators as PyTorch sees them: opcheck, compile, export, gradcheck, autocast, checkpoints, repeatability."""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flashtile
from flashtile import State, autograd, masks, trace
from flashtile.request import Arguments, Packing, build
from tests import oracle
from tests.oracle import assert_equal_bits
from tests.problems import CASES, Call, Case, Shape, make, packed

EVERYTHING = ("causal", "bias_heads", "alibi", "softcap", "sinks", "score_mod", "dropout", "gqa", "headdim_v")
SMALL = Shape(2, 13, 21, 4, 4, 8, 8)


def _operands(call: Call) -> tuple[Any, ...]:
    """The forward operator's arguments."""
    packing = call.packing()
    lengths = [packing.get(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")]
    where = Packing(*lengths, None, None) if packing else None  # type: ignore[arg-type]
    leaves = call.leaves
    inputs, options = build(leaves["q"], leaves["k"], leaves["v"], Arguments(**call.arguments()), where)
    return autograd._pack(inputs, options)


def _wanted(call: Call) -> list[bool]:
    named = [name in call.leaves for name in ("bias", "alibi_slopes", "sinks")]
    return [*named, *(True for name in call.leaves if name in ("table", "gain"))]


OPERATOR_CALLS: list[tuple[str, tuple[str, ...], Shape]] = [
    ("plain", (), SMALL),
    ("causal", ("causal",), SMALL),
    ("everything", EVERYTHING, SMALL),
    ("document", ("document", "out_float32"), SMALL),
    ("packed", ("causal", "alibi_batch"), packed((5, 0, 9), (7, 3, 0), 4, 2, 8)),
    ("packed_used", ("sinks", "mask_mod"), packed((5, 4), (7, 3), 4, 2, 8, (4, 4), (0, 3))),
    ("no_keys", ("causal",), Shape(2, 5, 0, 2, 2, 8, 8)),
]
OPERATORS = pytest.mark.parametrize(("features", "shape"), [point[1:] for point in OPERATOR_CALLS],
                                    ids=[point[0] for point in OPERATOR_CALLS])  # fmt: skip


@OPERATORS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_forward(features: tuple[str, ...], shape: Shape, dtype: torch.dtype) -> None:
    call = make("opcheck", shape, features, dtype)
    for leaf in call.leaves.values():
        leaf.requires_grad_()
    torch.library.opcheck(torch.ops.flashtile.forward.default, _operands(call))


@OPERATORS
@pytest.mark.parametrize("grads", ["both", "out", "lse"])
def test_opcheck_backward(features: tuple[str, ...], shape: Shape, grads: str) -> None:
    call = make("opcheck", shape, features, torch.float32)
    operands = _operands(call)
    out, lse = torch.ops.flashtile.forward(*operands)
    given = (torch.randn_like(out) if grads != "lse" else None, torch.randn_like(lse) if grads != "out" else None)
    torch.library.opcheck(torch.ops.flashtile.backward.default, (*given, out, lse, _wanted(call), *operands))


def _strided(call: Call) -> Call:
    """q, k and v as views of one fused tensor, heads before rows; the bias's last dimension strided."""
    fused = {name: leaf.transpose(1, 2).contiguous().transpose(1, 2) for name, leaf in call.leaves.items()
             if leaf.ndim == 4}  # fmt: skip
    if "bias" in call.leaves:
        fused["bias"] = call.leaves["bias"].mT.contiguous().mT
    return Call(call.shape, call.features, {**call.leaves, **fused}, call.fixed, call.grads)


@pytest.mark.parametrize("features", [(), ("causal",), EVERYTHING])
def test_opcheck_strided(features: tuple[str, ...]) -> None:
    call = _strided(make("opcheck", SMALL, features, torch.float32))
    for leaf in call.leaves.values():
        leaf.requires_grad_()
    operands = _operands(call)
    torch.library.opcheck(torch.ops.flashtile.forward.default, operands)
    plain = _operands(Call(call.shape, call.features, {n: t.detach() for n, t in call.leaves.items()}, call.fixed, {}))
    out, lse = torch.ops.flashtile.forward(*plain)
    grad_out = torch.randn_like(out).transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(torch.ops.flashtile.backward.default, (grad_out, None, out, lse, _wanted(call), *plain))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator_gives_what_the_eager_path_gives(case: Case) -> None:
    """Two doors, one answer, bit for bit: gradients too."""
    call = case.call(case.dtypes[0])
    eager = oracle.ours(call)
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in call.leaves.items()}
    state = torch.ops.flashtile.forward(*_operands(Call(call.shape, call.features, leaves, call.fixed, call.grads)))
    results = oracle._results(State(*state), leaves, call)
    assert_equal_bits(list(eager.values()), list(results.values()))


# torch.compile and torch.export.


def _relative(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score - 0.1 * (q_idx - kv_idx).abs()


def _dilated(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return (q_idx - kv_idx) % 3 != 1


def _even_keys(table: Tensor) -> Callable[..., Tensor]:
    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return table[kv_idx] % 2 == 0

    return mask_mod


Function = Callable[..., Tensor]


def _plain(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return flashtile.attention(q * 1.5, k, v, **options) + 1  # type: ignore[operator]


def _with_lse(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state = flashtile.attention(q, k, v, causal=True, return_lse=True)
    assert isinstance(state, State)
    return state.out * state.lse.transpose(1, 2)[..., None].sigmoid()


def _with_captures(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slopes = q.mean((0, 1, 3)) + 0.1

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - slopes[h] * (q_idx - kv_idx).abs()

    return _plain(q, k, v, score_mod=score_mod)


def _with_masks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ids = torch.arange(q.shape[1]) // 5
    key_ids = torch.arange(k.shape[1]) // 5
    mask = (masks.document(ids, key_ids) | masks.prefix(3)) & masks.window(9, None)
    return _plain(q, k, v, mask=mask)


def _with_merge(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = [flashtile.attention(q, k[:, i::2], v[:, i::2], return_lse=True) for i in range(2)]
    return flashtile.merge(parts).out  # type: ignore[arg-type]


class _Slopes(torch.nn.Module):
    """A score function that reads a parameter: made with the module, or one of its methods."""

    def __init__(self, method: bool) -> None:
        super().__init__()
        self.slopes = slopes = torch.nn.Parameter(torch.linspace(0.1, 0.4, 4))

        def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score - slopes[h] * (q_idx - kv_idx).abs()

        self.score_mod = None if method else score_mod

    def method(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - self.slopes[h] * (q_idx - kv_idx).abs()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _plain(q, k, v, score_mod=self.score_mod or self.method)


COMPILED: dict[str, Function] = {
    "plain": _plain,
    "causal": partial(_plain, causal=True),
    "window_softcap": partial(_plain, window=(4, 4), softcap=5.0),
    "dropout": partial(_plain, dropout_p=0.3, seed=7),
    "score_mod": partial(_plain, score_mod=_relative),
    "mask_mod": partial(_plain, mask=_dilated),
    "captured_mask": partial(_plain, mask=_even_keys(torch.arange(64))),
    "lse": _with_lse,
    "captures": _with_captures,
    "parameter": _Slopes(method=False),
    "method": _Slopes(method=True),
    "masks": _with_masks,
    "merge": _with_merge,
}


def _leaves(seqlen_q: int, seqlen_kv: int, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seqlen_q)
    sizes = ((batch, seqlen_q, 4, 8), (batch, seqlen_kv, 2, 8), (batch, seqlen_kv, 2, 8))
    return [torch.randn(size, generator=generator).requires_grad_() for size in sizes]


def _value_and_gradients(function: Function, leaves: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    value.square().sum().backward()
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _agree(compiled: Function, function: Function, leaves: list[Tensor]) -> None:
    pairs = zip(_value_and_gradients(compiled, leaves), _value_and_gradients(function, leaves), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


NOT_LIFTED = {
    "captures": "a function made in the compiled region over a tensor computed there cannot be lifted",
}
if torch.torch_version.TorchVersion(torch.__version__) < "2.13":
    # Seen with 2.11; newer ones take it.
    NOT_LIFTED["method"] = "the compiler makes no constant of a module whose method is the score function"
NAMES = [
    pytest.param(name, marks=pytest.mark.xfail(reason=NOT_LIFTED[name], strict=name == "captures"))
    if name in NOT_LIFTED
    else name
    for name in COMPILED
]


@pytest.mark.parametrize("name", NAMES)
def test_compile_aot_eager(name: str) -> None:
    compiled = torch.compile(COMPILED[name], backend="aot_eager", fullgraph=True)
    _agree(compiled, COMPILED[name], _leaves(20, 20))


@pytest.mark.parametrize("name", ["causal", "score_mod", "mask_mod", "masks"])
def test_compile_dynamic_shapes(name: str) -> None:
    """Many lengths, and nothing is compiled after the first."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(COMPILED[name], backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for length in (20, 31, 47, 33, 50):
        _agree(compiled, COMPILED[name], _leaves(length, length + 6))
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dynamic"), [("causal", True), ("parameter", False), ("masks", True)])
def test_compile_inductor(name: str, dynamic: bool) -> None:
    compiled = torch.compile(COMPILED[name], fullgraph=True, dynamic=dynamic)
    for length in (20, 31) if dynamic else (20,):
        _agree(compiled, COMPILED[name], _leaves(length, length))


def _packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, **options: Any) -> Tensor:
    out = flashtile.attention_varlen(q * 2, k, v, cu_q, cu_k, causal=True, **options)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize(
    ("longest", "backend"),
    [
        pytest.param(None, "aot_eager", id="absent"),
        pytest.param(30, "aot_eager", id="int"),
        pytest.param(torch.tensor(30), "aot_eager", id="tensor"),
        pytest.param(None, "inductor", id="inductor", marks=pytest.mark.slow),
    ],
)
def test_compile_packed(longest: int | Tensor | None, backend: str) -> None:
    """No length leads to a recompilation: lengths are data, and tokens are dynamic."""
    options = {} if longest is None else {"max_seqlen_q": longest, "max_seqlen_k": longest}
    function = partial(_packed, **options)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for lengths in ((5, 20, 7), (30, 1, 0), (9, 9, 9)):
        leaves = [leaf.detach()[0].requires_grad_() for leaf in _leaves(sum(lengths), sum(lengths), 1)]
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        bound = [lambda q, k, v, f=f, cu=cu_seqlens: f(q, k, v, cu, cu) for f in (compiled, function)]
        _agree(bound[0], bound[1], leaves)
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1


class _Block(torch.nn.Module):
    """Self-attention with the features that export must carry: masks in a token, a score function, sinks."""

    def __init__(self, modifier: str) -> None:
        super().__init__()
        self.project = torch.nn.Linear(16, 48)
        self.sinks = torch.nn.Parameter(torch.randn(2))
        self.slopes = slopes = torch.nn.Parameter(torch.randn(2))

        # Made here, so that no earlier test has traced them.
        def function(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score * 0.7 - 0.1 * (q_idx - kv_idx).abs()

        def parameter(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score * 0.7 - slopes[h] * (q_idx - kv_idx).abs()

        self.score_mod = {"none": None, "function": function, "parameter": parameter}[modifier]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).unbind(2)
        mask = masks.window(9, None) | masks.prefix(2)
        out = flashtile.attention(q, k, v, causal=True, mask=mask, sinks=self.sinks, score_mod=self.score_mod)
        assert isinstance(out, Tensor)
        return out.flatten(2)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("modifier", ["none", "function", "parameter"])
def test_export_with_dynamic_shapes(modifier: str, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exported at one size, saved, loaded, and run at others; functions are first traced within the export."""
    monkeypatch.setattr(trace, "_routes", {})
    block = _Block(modifier)
    dims = {"x": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", max=4096)}}
    program = torch.export.export(block, (torch.randn(2, 20, 16),), dynamic_shapes=dims, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch, tokens in ((2, 20), (3, 37), (1, 5)):
        x = torch.randn(batch, tokens, 16)
        torch.testing.assert_close(loaded(x), block(x))


# Autograd itself.


GRADCHECKED: dict[str, tuple[str, ...]] = {
    "causal": ("causal",),
    "window_sinks": ("window_left", "sinks"),
    "bias_softcap": ("bias_heads", "softcap"),
    "alibi_dropout": ("alibi", "dropout"),
    "score_mod": ("score_mod", "document"),
    "gqa": ("gqa", "headdim_v"),
    "packed": ("varlen", "causal"),
    "everything": EVERYTHING,
}


@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradcheck(name: str) -> None:
    """Against finite differences: no formula of ours or PyTorch's takes part."""
    call = make("gradcheck", Shape(1, 4, 5, 2, 2, 3, 3), GRADCHECKED[name], torch.float64)
    leaves = {name: leaf.double().requires_grad_() for name, leaf in call.leaves.items()}

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(leaves, tensors, strict=True))
        q, k, v = (named[name] for name in "qkv")
        attend: Any = flashtile.attention_varlen if call.shape.packed else flashtile.attention
        state = attend(q, k, v, **call.packing(), **call.arguments(named), return_lse=True)
        return state.out, torch.where(state.lse.isinf(), 0.0, state.lse)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


def _compiled(*tensors: Tensor) -> Tensor:
    return torch.compile(_plain, backend="aot_eager")(*tensors)


def _operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    inputs, options = build(q, k, v, Arguments())
    out: Tensor = torch.ops.flashtile.forward(*autograd._pack(inputs, options))[0]
    return out


@pytest.mark.parametrize(
    ("attend", "message"),
    [
        (_plain, "attention has no second derivative"),
        (_compiled, "double backward"),
        (_operator, "no autograd formula"),
    ],
)
def test_second_derivatives_are_refused(attend: Function, message: str) -> None:
    """An error, never a derivative in which a term is missing."""
    q, k, v = _leaves(6, 6)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(attend(q, k, v).square().sum(), [q], create_graph=True)[0].square().sum().backward()


@pytest.mark.parametrize("needed", ["q", "k", "v", "bias", "sinks", "alibi_slopes", "table"])
def test_one_gradient_alone(needed: str) -> None:
    """Freezing all but one tensor changes nothing for that one, and leaves the others without a gradient."""
    call = make("alone", SMALL, ("bias", "sinks", "alibi", "score_mod"), torch.float32)
    wanted = oracle.ours(call)[f"d{needed}"]
    leaves = {name: leaf.requires_grad_(name == needed) for name, leaf in call.leaves.items()}
    state = flashtile.attention(leaves["q"], leaves["k"], leaves["v"], **call.arguments(leaves), return_lse=True)
    assert isinstance(state, State)
    torch.autograd.backward([*state], [call.grads["out"], call.grads["lse"]])
    grad = leaves[needed].grad
    assert grad is not None
    assert_equal_bits([grad], [wanted])
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != needed)


def test_one_tensor_in_three_places() -> None:
    """q, k and v may be one tensor, and the bias may be the tensor that the score function captures."""
    x, table = torch.randn(1, 9, 2, 8, requires_grad=True), torch.randn(1, 1, 9, 9, requires_grad=True)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + table[0, 0, q_idx, kv_idx]

    out = flashtile.attention(x, x, x, bias=table, score_mod=score_mod)
    wanted = flashtile.reference.attention(x, x, x, bias=2 * table).out
    assert isinstance(out, Tensor)
    found = torch.autograd.grad(out.square().sum(), [x, table])
    for one, other in zip(found, torch.autograd.grad(wanted.square().sum(), [x, table]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_without_gradients() -> None:
    q, k, v = _leaves(9, 9)
    with torch.no_grad():
        plain = flashtile.attention(q, k, v)
    with torch.inference_mode():
        inference = flashtile.attention(q, k, v)
    assert isinstance(plain, Tensor)
    assert isinstance(inference, Tensor)
    assert not plain.requires_grad
    assert_equal_bits([plain], [inference])


def test_backward_twice_through_a_kept_graph() -> None:
    q, k, v = _leaves(9, 9)
    out = flashtile.attention(q, k, v, dropout_p=0.5)
    assert isinstance(out, Tensor)
    first = torch.autograd.grad(out.sum(), [q, k, v], retain_graph=True)
    assert_equal_bits(first, torch.autograd.grad(out.sum(), [q, k, v]))


def test_inputs_changed_in_place_are_noticed() -> None:
    q, k, v = _leaves(9, 9)
    doubled = k * 2
    out = flashtile.attention(q, doubled, v)
    assert isinstance(out, Tensor)
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_functorch_transforms_are_refused() -> None:
    """PyTorch's custom operators have no torch.func transforms; it says so, and nothing wrong is computed."""
    q, k, v = (leaf.detach() for leaf in _leaves(9, 9))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda q: _plain(q, k, v).sum())(q)


def test_meta_tensors_give_shapes() -> None:
    q, k, v = (leaf.detach().to("meta") for leaf in _leaves(9, 11))
    state = flashtile.attention(q, k, v, causal=True, return_lse=True)
    assert isinstance(state, State)
    assert (state.out.shape, state.lse.shape) == ((2, 9, 4, 8), (2, 4, 9))
    assert state.out.is_meta


# Autocast, checkpoints, repeatability.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """As PyTorch's own attention: the products run in autocast's dtype, gradients come back in the inputs'."""
    q, k, v = _leaves(20, 20)
    bias, sinks = torch.randn(4, 20, 20, requires_grad=True), torch.randn(4, requires_grad=True)
    with torch.autocast("cpu", dtype):
        out = flashtile.attention(q, k, v, bias=bias, sinks=sinks, causal=True)
    casts = [tensor.detach().to(dtype).requires_grad_() for tensor in (q, k, v)]
    wanted = flashtile.attention(*casts, bias=bias, sinks=sinks, causal=True)
    assert isinstance(out, Tensor)
    assert isinstance(wanted, Tensor)
    assert_equal_bits([out], [wanted])
    found = torch.autograd.grad(out.sum(), [q, k, v, bias, sinks])
    assert [grad.dtype for grad in found] == [torch.float32] * 5
    for one, other in zip(found, torch.autograd.grad(wanted.sum(), [*casts, bias, sinks]), strict=True):
        assert_equal_bits([one], [other.float()])


def test_autocast_leaves_float64_alone() -> None:
    q, k, v = (leaf.double() for leaf in _leaves(6, 6))
    with torch.autocast("cpu", torch.bfloat16):
        out = flashtile.attention(q, k, v)
    assert isinstance(out, Tensor)
    assert out.dtype is torch.float64


def test_autocast_under_compile() -> None:
    compiled = torch.compile(_plain, backend="aot_eager", fullgraph=True)
    leaves = _leaves(20, 20)
    with torch.autocast("cpu", torch.bfloat16):
        pair = [_value_and_gradients(function, leaves) for function in (compiled, _plain)]
    for one, other in zip(*pair, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{"dropout_p": 0.4}, {"causal": True, "score_mod": _relative}], ids=["drop", "mod"])
def test_activation_checkpoints(reentrant: bool, options: dict[str, Any]) -> None:
    """Recomputation in the backward pass draws the same seed and gives the same bits."""
    leaves = _leaves(20, 20)

    def run(wrapped: bool) -> list[Tensor]:
        torch.manual_seed(4)
        function = partial(_plain, **options)
        return _value_and_gradients(
            partial(checkpoint, function, use_reentrant=reentrant) if wrapped else function, leaves
        )

    assert_equal_bits(run(True), run(False))


def _poison() -> None:
    """Leaves NaN in the memory that the next calls are given."""
    del [torch.full((64, 1024), torch.nan) for _ in range(8)][:]


@pytest.mark.parametrize("features", [("causal",), EVERYTHING, ("varlen", "bias", "sinks")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_bit_for_bit(features: tuple[str, ...], dtype: torch.dtype) -> None:
    call = make("repeat", Shape(2, 60, 70, 4, 4, 16, 16), features, dtype)
    first = oracle.ours(call, deterministic=True)
    for _ in range(5):
        _poison()
        assert_equal_bits(list(oracle.ours(call, deterministic=True).values()), list(first.values()))


def test_global_deterministic_switch_is_honoured() -> None:
    seen: list[bool] = []
    q, k, v = (leaf.detach() for leaf in _leaves(6, 6))
    for switch in (True, False):
        torch.use_deterministic_algorithms(switch)
        try:
            seen.append(flashtile.explain(q, k, v).problem.deterministic)
            assert flashtile.explain(q, k, v, deterministic=not switch).problem.deterministic is not switch
        finally:
            torch.use_deterministic_algorithms(False)
    assert seen == [True, False]


def test_a_training_step_learns() -> None:
    """Twenty steps of a two-layer model reduce its loss as those of PyTorch's own attention do."""
    losses = {}
    for name in ("ours", "torch"):
        torch.manual_seed(0)
        layers = torch.nn.ModuleList([torch.nn.Linear(16, 48) for _ in range(2)])
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
        x, target = torch.randn(4, 30, 16), torch.randn(4, 30, 16)
        losses[name] = [_step(layers, optimizer, x, target, name == "ours") for _ in range(20)]
    torch.testing.assert_close(torch.tensor(losses["ours"]), torch.tensor(losses["torch"]), rtol=1e-4, atol=1e-5)
    assert losses["ours"][-1] < losses["ours"][0]


def _step(layers: torch.nn.ModuleList, optimizer: Any, x: Tensor, target: Tensor, ours: bool) -> float:
    hidden = x
    for layer in layers:
        q, k, v = layer(hidden).unflatten(-1, (3, 2, 8)).unbind(2)
        if ours:
            out = flashtile.attention(q, k, v, causal=True)
        else:
            heads_second = [tensor.transpose(1, 2) for tensor in (q, k, v)]
            out = torch.nn.functional.scaled_dot_product_attention(*heads_second, is_causal=True).transpose(1, 2)
        assert isinstance(out, Tensor)
        hidden = hidden + out.flatten(2)
    loss = (hidden - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())
