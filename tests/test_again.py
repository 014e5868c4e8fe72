"""Passes done again: real numbers, computed in place of Hopper's kernels out of what their launches are given."""

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile import autograd, backends, decoding, facts, plan, recall
from flashtile.backends import hopper
from flashtile.backends.hopper import calls, launch
from flashtile.backends.portable import cached
from flashtile.backends.portable.launch import Machine
from flashtile.decoding import CacheArguments
from flashtile.kernels import arguments, bias, direct
from flashtile.kernels.again import Again, _maker, tensors_of
from flashtile.problem import Inputs, describe_cached
from flashtile.tuning import decoding as tuning
from flashtile.tuning.decoding import DecodeConfig
from tests.lengths import of_long_sequences


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of (batch, seqlen, heads, headdim), by PyTorch."""
    heads = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)


def _gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        return torch.autograd.grad(_attention(*leaves), leaves, grad)


def _bias_gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Tensor:
    """Of a bias of zeros for each entry, (batch, heads, seqlen_q, seqlen_kv)."""
    q, k, v, grad = (tensor.detach().float().transpose(1, 2) for tensor in (q, k, v, grad))
    weights, grad_weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1), grad @ v.mT
    return weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))


class Computing:
    """Stands for Hopper's kernels, compiled and launched; `launched`: by Triton's launcher, `played`: from a tape."""

    def __init__(self) -> None:
        self.launched, self.played = 0, 0
        self.names: set[str] = set()
        self._lock = threading.Lock()
        self._dq: dict[int, Tensor] = {}

    def launch(self, kernel: Any, programs: int, arguments: Any, options: dict[str, Any]) -> Any:
        name, fields = kernel.fn.__name__, [parameter.name for parameter in kernel.params]
        self.launched += 1
        self.names.add(name)
        self._run(name, dict(zip(fields, arguments, strict=True)))
        return _Compiled(self, name, fields)

    def play(self, name: str, given: dict[str, Any]) -> None:
        self.played += 1
        self._run(name, given)

    def _run(self, name: str, given: dict[str, Any]) -> None:
        q, k, v, o, do = (given.get(f"{each}_desc") for each in ("q", "k", "v", "o", "do"))
        if "packing" in given and given["packing"].offsets_q is not None:
            self._packed(name, given)
        elif name == "forward_kernel":
            assert given["counter"][0] == 0
            given["counter"] += 1
            o.base.copy_(_attention(q.base, k.base, v.base))
            given["lse"].pointer.zero_()
        elif name == "backward_kernel":
            dq, dk, dv = _gradients(q.base, k.base, v.base, do.base)
            given["dk_desc"].base.copy_(dk)
            given["dv_desc"].base.copy_(dv)
            if given["sums_desc"] is not None:
                self._dq[given["sums_desc"].base.data_ptr()] = dq
        elif name == "query_kernel":
            assert given["counter"][0] == 0
            given["counter"] += 1
            given["dq_desc"].base.copy_(_gradients(q.base, k.base, v.base, do.base)[0])
        elif name == "bias_kernel":
            of_entries = _bias_gradients(*(given[each].pointer for each in ("q", "k", "v", "grad_out")))
            for part, entries in enumerate(of_entries.split(given["batches"])):
                given["grad"].pointer[part] = entries.sum(0)
        elif name == "after_kernel":
            given["dq"].pointer.copy_(self._dq.pop(given["sums"].data_ptr()))

    def _packed(self, name: str, given: dict[str, Any]) -> None:
        """Of packed sequences: nothing is computed, but that memory is as rows are that nobody writes."""
        written = {
            "forward_kernel": {"o_desc": (0.0, 1.0), "lse": (-torch.inf, 2.0)},
            "before_kernel": {"delta": (0.0, 3.0)},
            "backward_kernel": {"dk_desc": (0.0, 4.0), "dv_desc": (0.0, 5.0)},
            "after_kernel": {"dq": (0.0, 6.0)},
        }
        for field, (before, after) in written[name].items():
            tensor = getattr(given[field], "base" if field.endswith("_desc") else "pointer")
            assert (tensor == before).all(), (name, field)
            tensor.fill_(after)


class _Compiled:
    def __init__(self, machine: Computing, name: str, fields: list[str]) -> None:
        self.machine, self.name, self.fields = machine, name, fields

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments: self.machine.play(self.name, dict(zip(self.fields, arguments, strict=True)))


@pytest.fixture(params=["dQ apart", "dQ added"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Computing]:
    """Calls on the CPU go to Hopper's backend, and are kept as a GPU's are."""
    if request.param == "dQ added":
        of_long_sequences(monkeypatch)
    made = Computing()
    monkeypatch.setattr(recall, "worth_it", lambda q: True)
    monkeypatch.setattr(recall, "_known", {})
    monkeypatch.setattr(facts, "no_gpu", lambda: None)
    monkeypatch.setattr(facts, "architectures", lambda: ["sm_90"])
    monkeypatch.setattr(hopper, "DEVICE", "cpu")
    monkeypatch.setattr(hopper, "_kept", lambda memory: memory)
    monkeypatch.setattr(calls, "DEVICE", calls.Machine(made.launch, 132))
    plan.choose.cache_clear()
    yield made
    plan.choose.cache_clear()


def _tensors(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 40, 2, 64, generator=generator).bfloat16() for _ in range(4)]


def _agree(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor) -> None:
    """The output, and the gradients that autograd finds."""
    torch.testing.assert_close(out, _attention(q, k, v))
    torch.testing.assert_close(torch.autograd.grad(out, (q, k, v), grad), _gradients(q, k, v, grad))


def _warm(machine: Computing) -> None:
    """Until calls of `_tensors` are done again, both ways."""
    for seed in range(3):
        q, k, v, grad = _tensors(seed)
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        _agree(*leaves, grad, flashtile.attention(*leaves))
    (call,) = recall._known.values()
    assert all(backends.AGAIN in memory for memory in call.memories)
    assert (machine.launched, machine.played) == (8, 4)


@pytest.mark.parametrize("machine", ["dQ apart"], indirect=True)
def test_warming_up_runs_what_other_lengths_take(machine: Computing) -> None:
    """A call of 40 rows has dQ from a kernel of its own, a long one has it added up."""
    q, k, v, _ = _tensors()
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    flashtile.warmup(*leaves)
    assert {"backward_kernel", "query_kernel", "after_kernel"} <= machine.names
    assert all(leaf.grad is None for leaf in leaves)


def test_nothing_but_the_tape_is_left_of_a_known_call(machine: Computing, monkeypatch: pytest.MonkeyPatch) -> None:
    _warm(machine)
    for name in ("describe", "plan"):
        monkeypatch.setattr(autograd, name, None)
    monkeypatch.setattr(launch, "forward", None)
    monkeypatch.setattr(launch, "backward", None)
    for seed in range(3, 6):
        q, k, v, grad = _tensors(seed)
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        _agree(*leaves, grad, flashtile.attention(*leaves))
    assert machine.launched == 8


def test_the_host_does_little(machine: Computing, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions of Python that a known call enters, PyTorch's among them: what its time on the host consists of, and
    the same on every machine."""
    _warm(machine)
    entered: list[str] = []
    monkeypatch.setattr(direct.Series, "add", lambda *launch: True)
    monkeypatch.setattr(direct, "driver", lambda: machine)
    monkeypatch.setattr(machine, "cuLaunchKernelEx", None, raising=False)
    for name in ("_cuda_getDevice", "_cuda_getCurrentRawStream"):
        monkeypatch.setattr(torch._C, name, lambda *index: None, raising=False)
    recall._known.clear()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            entered.append(frame.f_code.co_name)

    def entering(call: Callable[[], Any]) -> tuple[Any, list[str]]:
        entered.clear()
        sys.setprofile(note)
        try:
            return call(), [*entered]
        finally:
            sys.setprofile(None)

    for seed in range(4):
        q, k, v, grad = _tensors(seed)
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        out, forward = entering(lambda: flashtile.attention(*leaves))  # noqa: B023
        with torch.no_grad():
            _, backward = entering(lambda: out.grad_fn.apply(grad, None))  # noqa: B023
    assert len(forward) <= 36, forward
    assert len(backward) <= 22, backward


def test_what_functions_capture_is_handed_on(machine: Computing) -> None:
    """Where it wants no gradient, passes both ways are done again."""
    for seed in range(5):
        q, k, v, grad = _tensors(seed)
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        table, before = torch.zeros(2), machine.launched
        out = flashtile.attention(*leaves, score_mod=lambda score, b, h, q_idx, kv_idx: score + table[h])  # noqa: B023
        _agree(*leaves, grad, out)
    assert machine.launched == before
    (call,) = recall._known.values()
    assert all(backends.AGAIN in memory for memory in call.memories)


@pytest.mark.parametrize("length", [128, 40])
def test_the_gradient_of_a_bias_is_on_the_tape(
    machine: Computing, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """In two parts, of three entries and of two; where rows of statistics are not padded, it is launched each time."""
    monkeypatch.setattr(bias, "LEAST", 2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        before = machine.launched
        *leaves, grad = (torch.randn(5, length, 2, 64, generator=generator).bfloat16() for _ in range(4))
        leaves += [torch.zeros(1, 2, length, length, dtype=torch.bfloat16)]
        q, k, v, pairs = (tensor.requires_grad_() for tensor in leaves)
        *found, of_pairs = torch.autograd.grad(flashtile.attention(q, k, v, bias=pairs), (q, k, v, pairs), grad)
        torch.testing.assert_close(tuple(found), _gradients(q, k, v, grad))
        torch.testing.assert_close(of_pairs, _bias_gradients(q, k, v, grad).sum(0, keepdim=True).bfloat16())
    assert machine.launched - before == (0 if length == 128 else 1)


def test_results_are_their_own_memory(machine: Computing) -> None:
    _warm(machine)
    q, k, v, grad = _tensors()
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    outs = [flashtile.attention(*leaves) for _ in range(3)]
    found = [torch.autograd.grad(out, leaves, grad, retain_graph=True) for out in outs for _ in range(2)]
    addresses = {tensor.data_ptr() for tensors in (outs, *found) for tensor in tensors}
    assert len(addresses) == 3 + 6 * 3
    assert all(tensor.is_contiguous() and not tensor.is_inference() for tensor in (*outs, *found[0]))


@pytest.mark.parametrize("ones", [(0, 0, 0), (0, 1, 1), (0, 1, 0)], ids=str)
def test_one_tensor_in_several_places(machine: Computing, ones: tuple[int, ...]) -> None:
    """Before and after others were in these places."""
    for _ in range(3):
        tensors = _tensors(1)
        leaves = [tensors[place].requires_grad_() for place in ones]
        out = flashtile.attention(*leaves)
        torch.testing.assert_close(out, _attention(*leaves))
        expected = torch.autograd.grad(_attention(*leaves), set(leaves), tensors[3])
        torch.testing.assert_close(torch.autograd.grad(out, set(leaves), tensors[3]), expected, atol=2e-2, rtol=2e-2)
        q, k, v, grad = _tensors(2)
        apart = [tensor.requires_grad_() for tensor in (q, k, v)]
        _agree(*apart, grad, flashtile.attention(*apart))


def test_gradients_of_other_layouts(machine: Computing) -> None:
    """Of a sum (one number everywhere), in turned memory, at no multiple of 16 bytes, and of the log-sum-exp."""
    _warm(machine)
    q, k, v, grad = _tensors(5)
    q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
    turned = grad.transpose(1, 2).contiguous().transpose(1, 2)
    one = torch.ones((), dtype=torch.bfloat16).expand(grad.shape)
    odd = torch.empty(grad.numel() + 1, dtype=grad.dtype)[1:].view(grad.shape).copy_(grad)
    assert odd.data_ptr() % 16
    for other in (one, turned, odd, one, turned, odd, grad, turned):
        _agree(q, k, v, other, flashtile.attention(q, k, v))
    before = machine.played
    for _ in range(3):
        out, lse = flashtile.attention(q, k, v, return_lse=True)
        found = torch.autograd.grad((out, lse), (q, k, v), (grad, torch.zeros_like(lse)))
        torch.testing.assert_close(found, _gradients(q, k, v, grad))
    assert machine.played - before == 4


def test_what_was_saved_comes_back_otherwise(machine: Computing) -> None:
    """Hooks may give memory of other strides or alignment; what was written for one layout serves that one alone."""
    _warm(machine)

    def turned(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.ndim == 4 else tensor.clone()

    def moved(tensor: Tensor) -> Tensor:
        room = torch.empty(tensor.numel() + 8, dtype=tensor.dtype)
        return room[8 : 8 + tensor.numel()].view(tensor.shape).copy_(tensor)

    for pack in (turned, moved, turned, moved, turned, moved):
        q, k, v, grad = _tensors(7)
        q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            out = flashtile.attention(q, k, v)
        _agree(q, k, v, grad, out)


def test_another_grad_mode_is_another_call(machine: Computing) -> None:
    _warm(machine)
    q, k, v, grad = _tensors(9)
    for _ in range(4):
        assert not flashtile.attention(q, k, v).requires_grad
    q.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for _ in range(3):
            with mode():
                out = flashtile.attention(q, k, v)
            torch.testing.assert_close(out.detach(), _attention(q, k, v).detach())
            assert out.requires_grad is (mode is torch.enable_grad)
            assert out.is_inference() is (mode is torch.inference_mode)
    torch.testing.assert_close(torch.autograd.grad(out, q, grad)[0], _gradients(q, k, v, grad)[0])


def test_autocast_is_seen(machine: Computing) -> None:
    _warm(machine)
    q, k, v, grad = _tensors(3)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            out = flashtile.attention(q.float(), k.float(), v.float())
        torch.testing.assert_close(out, _attention(q, k, v))
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        with torch.autocast("cpu", torch.float16):
            halves = flashtile.attention(*leaves)
            assert halves.dtype is torch.float16
        found = torch.autograd.grad(halves, leaves, grad.half())
        assert {tensor.dtype for tensor in found} == {torch.bfloat16}
        torch.testing.assert_close(found, _gradients(q, k, v, grad), atol=2e-2, rtol=2e-2)


def test_threads_share_a_tape(machine: Computing) -> None:
    _warm(machine)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(10):
                q, k, v, grad = _tensors(seed + step)
                leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
                _agree(*leaves, grad, flashtile.attention(*leaves))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(100 * turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_second_derivatives_are_refused(machine: Computing) -> None:
    _warm(machine)
    q, k, v, grad = _tensors(4)
    q.requires_grad_()
    (dq,) = torch.autograd.grad(flashtile.attention(q, k, v), q, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dq.float().sum().backward()


@pytest.mark.parametrize(
    "options",
    [
        {"sinks": torch.ones(2)},
        {"mask": lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (kv_idx % 3 != 1)},
        {"dropout_p": 0.5, "seed": 3},
        {"alibi_slopes": torch.ones(2)},
    ],
    ids=["sinks", "mask", "dropout", "slopes"],
)
def test_other_tensors_are_handed_on(machine: Computing, options: dict[str, Any]) -> None:
    """A mask's tiles are not known by layouts: such a call is asked again, whatever else is there is handed on."""
    for seed in range(4):
        flashtile.attention(*_tensors(seed)[:3], **options)
    listed = "mask" in options
    # A mask's bits have a kernel of their own.
    assert (machine.launched, machine.played) == (2 + listed, 2)
    (call,) = recall._known.values()
    assert (backends.AGAIN in call.memories[0]) is not listed


def test_rows_of_no_packed_sequence_are_filled(machine: Computing) -> None:
    for seed in range(5):
        q, k, v, grad = (tensor[0] for tensor in _tensors(seed))
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        offsets = torch.tensor([0, 10, 30], dtype=torch.int32)
        out, lse = flashtile.attention_varlen(*leaves, offsets, offsets, return_lse=True)
        assert (out == 1).all()
        assert (lse == 2).all()
        for gradient, filled in zip(torch.autograd.grad(out, leaves, grad), (6, 4, 5), strict=True):
            assert (gradient == filled).all()
    assert (machine.launched, machine.played) == (8, 12)
    (call,) = recall._known.values()
    assert all(backends.AGAIN in memory for memory in call.memories)


@pytest.mark.parametrize("shape", itertools.product((0, 1, 2, 64), repeat=3), ids=str)
def test_what_is_made_like_a_pattern_is_contiguous(shape: tuple[int, ...]) -> None:
    """PyTorch says so of what lies dense alone; and no memory is kept for it."""
    wanted = torch.empty(shape)
    pattern = arguments.pattern_of(wanted)
    assert pattern.untyped_storage().nbytes() <= 4
    for fill in (None, 0.0, -torch.inf):
        made = _maker(wanted, fill)()
        assert (made.shape, made.stride(), made.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        assert fill is None or (made == fill).all()


def test_tensors_are_taken_in_order() -> None:
    """Whether they are found by their places or one after the other."""
    q, k, v, bias, seed, first, second = (torch.empty(1, 1, 1, size) for size in range(1, 8))
    plain = Inputs(q, k, v, bias=bias, seed=seed)
    listed = plain._replace(mask=(first,), score=(second,))
    assert [*map(id, tensors_of(listed))] == [*map(id, (q, k, v, bias, seed, first, second))]
    for inputs in (plain, listed):
        assert [*map(id, Again(inputs, ())._pick(inputs))] == [*map(id, tensors_of(inputs))]


def test_calls_over_a_cache_get_their_own_tensors() -> None:
    """With everything that they may have: what is launched again reads and writes what a first launch would."""
    seen: list[Any] = []
    names: dict[int, str] = {}

    def note(kernel: str, arguments: Any) -> None:
        """Which tensors: named ones, or the first, second, ... that nobody named."""
        leaves = [leaf for each in arguments for leaf in direct.flattened(each, (), ())]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        seen.append((kernel, [names.setdefault(tensor.data_ptr(), f"made {len(names)}") for tensor in tensors]))

    class Compiled:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *arguments: note(self.name, arguments)

    def run(kernel: Any, programs: int, tiles: Any, arguments: Any, options: dict[str, Any]) -> Compiled:
        note(kernel.fn.__name__, arguments)
        return Compiled(kernel.fn.__name__)

    memory: dict[Any, Any] = {}
    runs: list[list[Any]] = []
    for turn in range(5):
        q, k, v = (torch.randn(2, 1, heads, 64).half() for heads in (4, 2, 2))
        k_cache, v_cache = torch.zeros(2, 96, 2, 64).half(), torch.zeros(2, 96, 2, 64).half()
        places = {"cache_batch_idx": torch.arange(2), "cache_leftpad": torch.zeros(2, dtype=torch.int64)}
        turns = {"rotary_cos": torch.ones(96, 32).half(), "rotary_sin": torch.zeros(96, 32).half()}
        lengths, sinks, slopes = torch.tensor([9, 7]), torch.ones(4), torch.ones(2, 4)
        given = CacheArguments(lengths, k, v, **places, **turns, sinks=sinks, alibi_slopes=slopes)
        inputs, cache, *_ = call = decoding.build(q, k_cache, v_cache, given)
        tensors = (q, k_cache, v_cache, *cache, slopes, sinks)
        names.clear()
        names.update(
            {tensor.data_ptr(): f"given {place}" for place, tensor in enumerate(tensors) if tensor is not None}
        )
        seen.clear()
        if backends.AGAIN in memory:
            assert turn >= 2
            results = memory[backends.AGAIN](tensors)[:2]
        else:
            problem = describe_cached(inputs, cache, call.options)
            config = DecodeConfig(tuning.decode_tiles(64, 2, "half", "half", "hopper"), 3)
            results = cached.decode(inputs, cache, problem, config, Machine(run, False), memory)
        runs.append([*seen, *[names[tensor.data_ptr()] for tensor in results]])
    assert {name for name, _ in runs[0][:-2]} >= {"append_kernel", "decode_kernel", "combine_kernel"}
    assert all(other == runs[0] for other in runs[1:])
