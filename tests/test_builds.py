"""One kernel serves all lengths: what Triton would compile anew for, counted without a GPU."""

import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from flashtile import decoding
from flashtile.autograd import wanted_of
from flashtile.backends import hopper, portable
from flashtile.backends.hopper import calls as hopper_calls
from flashtile.backends.hopper import launch as hopper_launch
from flashtile.backends.portable import cached as portable_cached
from flashtile.backends.portable import launch as portable_launch
from flashtile.decoding import CacheArguments
from flashtile.problem import describe, describe_cached
from flashtile.request import Arguments, Packing, build
from tests.lengths import of_long_sequences

LAUNCHES: dict[str, Any] = {"portable": portable_launch, "hopper": hopper_launch}
CONFIGURE: dict[str, Callable[[Any], Any]] = {
    "portable": lambda problem: portable.configure(problem, "hopper"),
    "hopper": hopper.configure,
}
LENGTHS = (1, 2, 15, 16, 17, 48, 100, 256, 1000)


@functools.cache
def _binder(kernel: Any) -> Any:
    """Triton's own function from arguments to what it specialises on."""
    return create_function_from_signature(
        inspect.signature(kernel.fn), kernel.params, make_backend(GPUTarget("cuda", 90, 32))
    )


class Counter:
    """A machine that launches nothing and notes what each kernel would be compiled for."""

    def __init__(self) -> None:
        self.found: defaultdict[str, set[str]] = defaultdict(set)

    def portable(
        self, kernel: Any, programs: int, tiles: Any, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self.hopper(kernel, programs, arguments, options)

    def hopper(self, kernel: Any, programs: int, arguments: Sequence[Any], options: dict[str, Any]) -> None:
        names = {parameter.name for parameter in kernel.params}
        given = {name: value for name, value in options.items() if name in names}
        _, specialization, _ = _binder(kernel)(*arguments, **given)
        of = dict(zip((parameter.name for parameter in kernel.params), arguments, strict=False)).get("KEYS", "")
        self.found[f"{kernel.fn.__module__} {kernel.fn.__name__} {of}"].add(str(specialization))

    def call(self, backend: str, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None = None, **given: Any) -> None:
        """One forward and one backward pass."""
        inputs, options = build(q, k, v, Arguments(**given), packing)
        launch, there = LAUNCHES[backend], getattr(self, backend)
        portable = backend == "portable"
        machine: Any = portable_launch.Machine(there, True) if portable else hopper_calls.Machine(there, 132)
        problem = describe(inputs, options)
        out, lse = launch.forward(inputs, problem, CONFIGURE[backend](problem), machine)
        problem = describe(inputs, options, backward=True, wanted=wanted_of(inputs))
        launch.backward(inputs, problem, CONFIGURE[backend](problem), out, lse, out, None, machine)


def _tensors(batch: int, seqlen_q: int, seqlen_kv: int) -> Iterable[Tensor]:
    return (torch.zeros(batch, length, 2, 64, dtype=torch.bfloat16) for length in (seqlen_q, seqlen_kv, seqlen_kv))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"dropout_p": 0.5},
        {"mask": lambda b, h, q_idx, kv_idx: (q_idx - kv_idx) % 3 == 0},
        {"score_mod": lambda score, b, h, q_idx, kv_idx: score * 2 + q_idx},
        {"softcap": 3.0, "alibi_slopes": torch.ones(2)},
    ],
    ids=("plain", "causal", "dropout", "mask_mod", "score_mod", "softcap_alibi"),
)
@pytest.mark.parametrize("backend", LAUNCHES)
def test_one_build_serves_all_lengths(backend: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """But for short sequences, where a row of the table of their own serves those."""
    of_long_sequences(monkeypatch, ("FORWARD", "BACKWARD"))
    if backend == "hopper":
        options = options | {"dropout_p": 0.0}  # which it leaves to others
    counter = Counter()
    for batch in (1, 2, 3):
        for seqlen_q in LENGTHS:
            for seqlen_kv in {seqlen_q, 64, 33}:
                counter.call(backend, *_tensors(batch, seqlen_q, seqlen_kv), **options)
    assert {name: len(found) for name, found in counter.found.items()} == dict.fromkeys(counter.found, 1)
    # Bits of a mask are made by query tiles and by key tiles.
    assert len(counter.found) == (6 if backend == "hopper" and "mask" in options else 4)


@pytest.mark.parametrize(("causal", "longest"), [(True, 512), (False, 256)])
def test_one_build_serves_all_short_sequences(causal: bool, longest: int) -> None:
    counter = Counter()
    for batch in (1, 3):
        for seqlen in (1, 16, 33, 200, longest):
            counter.call("hopper", *_tensors(batch, seqlen, seqlen), causal=causal)
    assert {len(found) for found in counter.found.values()} == {1}
    assert any("query_kernel" in name for name in counter.found)


@pytest.mark.parametrize(("causal", "lengths"), [(True, (513, 1000, 2048)), (False, (257, 600, 1024))])
def test_one_build_serves_all_lengths_between(causal: bool, lengths: tuple[int, ...]) -> None:
    """Long enough to add dQ up, and too short for the forward tiles of long sequences."""
    counter = Counter()
    for seqlen in lengths:
        counter.call("hopper", *_tensors(1, seqlen, seqlen), causal=causal)
    assert {len(found) for found in counter.found.values()} == {1}
    assert not any("query_kernel" in name for name in counter.found)


@pytest.mark.parametrize("backend", LAUNCHES)
def test_one_build_serves_all_windows(backend: str) -> None:
    counter = Counter()
    for size in (0, 1, 15, 16, 31, 512):
        counter.call(backend, *_tensors(1, 64, 64), window=(size, size))
    assert {len(found) for found in counter.found.values()} == {1}


@pytest.mark.parametrize("backend", LAUNCHES)
def test_one_build_serves_all_packings(backend: str) -> None:
    counter = Counter()
    for lengths in ((1,), (16, 16), (5, 0, 100), (64, 64, 64, 64, 1)):
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        rows = (torch.zeros(sum(lengths), 2, 64, dtype=torch.bfloat16) for _ in range(3))
        counter.call(backend, *rows, Packing(offsets, offsets, None, None, None, None), causal=True)
    assert {len(found) for found in counter.found.values()} == {1}


@pytest.mark.parametrize("page", [0, 32])
def test_few_builds_serve_all_caches(page: int) -> None:
    """Of any number of sequences and any capacity: one, but of the kernel that joins parts one for each number of them
    that are joined at a time."""
    counter = Counter()
    for batch in (1, 2, 3, 16):
        for capacity in (32, 96, 512, 1600):
            columns = capacity // page if page else 1
            table = {"block_table": torch.zeros(batch, columns, dtype=torch.int32)} if page else {}
            q, new, store = (
                torch.zeros(*shape, 64, dtype=torch.bfloat16)
                for shape in ((batch, 1, 8), (batch, 1, 2), (batch * columns, page or capacity, 2))
            )
            for splits in (2, 3, 16, 40):
                given = CacheArguments(cache_seqlens=3, k=new, v=new, causal=True, num_splits=splits, **table)
                call = decoding.build(q, store, store.clone(), given)
                problem = describe_cached(call.inputs, call.cache, call.options, call.interleaved, call.splits)
                config = portable.configure_decoding(problem, "hopper")
                portable_cached.decode(
                    call.inputs, call.cache, problem, config, portable_launch.Machine(counter.portable, True)
                )
    builds = {name.split()[-1]: len(found) for name, found in counter.found.items()}
    # It joins 4 parts, 16, or 16 after another.
    assert builds == {"append_kernel": 1, "decode_kernel": 1, "combine_kernel": 3}


def test_a_bias_adds_few() -> None:
    """Strides follow lengths, one batch entry has none: loads are wider where they are multiples of 16."""
    counter = Counter()
    for batch in (1, 2):
        for seqlen in LENGTHS:
            bias = torch.zeros(batch, 2, seqlen, seqlen, requires_grad=True)
            counter.call("portable", *_tensors(batch, seqlen, seqlen), bias=bias)
    assert max(len(found) for found in counter.found.values()) <= 6
