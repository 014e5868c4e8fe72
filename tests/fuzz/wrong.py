"""Calls with arguments of wrong types and values.

Whether such a call is wrong is not said beforehand: a drawn value may be right by chance. Either flashtile refuses it,
in the words of `flashtile.check`, or its result is the reference's for the very same arguments.
"""

import math
import re
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flashtile
from flashtile import State, masks, reference
from tests.fuzz.where import Where
from tests.integrations.rule import assert_close

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 6, 8, 4, 16
REFUSALS = (TypeError, ValueError, NotImplementedError)
RAISED_BY = re.compile(r"flashtile/(check/\w+|plan)\.py$")
"""Where users' mistakes are raised."""
SIZES = st.integers(0, 9)


@dataclass(frozen=True)
class WrongCall:
    """packed: of `attention_varlen`. changed: arguments and what they get, as `value` makes it."""

    packed: bool
    changed: tuple[tuple[str, tuple[Any, ...]], ...]


def calls(where: Where) -> st.SearchStrategy[WrongCall]:
    number = st.sampled_from((0, 1, -1, 2**31, 2**63, 2**70, 0.5, -0.0, 1e-320, 1e300, math.nan, math.inf, -math.inf))
    dtypes = st.sampled_from(
        (torch.float16, torch.float32, torch.float64, torch.bool, torch.int8, torch.int32, torch.int64, torch.complex64)
    )
    shapes = st.lists(st.sampled_from((0, 1, BATCH, QUERIES, KEYS, HEADS, WIDTH, 3)), max_size=5).map(tuple)
    likely = st.sampled_from(
        (
            *((BATCH, QUERIES, HEADS, WIDTH), (BATCH, KEYS, HEADS, WIDTH), (HEADS,), (BATCH, HEADS), (BATCH + 1,)),
            *((BATCH, HEADS, QUERIES, KEYS), (1, 1, QUERIES, KEYS), (HEADS, 1, KEYS), (), (BATCH,), (BATCH, KEYS)),
        )
    )
    anything = st.one_of(
        st.tuples(st.just("number"), number),
        st.tuples(st.just("object"), st.sampled_from(sorted(OBJECTS))),
        st.tuples(st.just("tensor"), shapes | likely, dtypes, st.sampled_from(("cpu", "cpu", "cpu", "meta"))),
        st.tuples(st.just("pair"), number, number),
    )
    names = st.sampled_from(ARGUMENTS)
    changed = st.lists(st.tuples(names, anything), min_size=1, max_size=2, unique_by=lambda pair: pair[0])
    return st.builds(WrongCall, st.booleans(), changed.map(tuple))


ARGUMENTS = (
    *("q", "k", "v", "causal", "window", "mask", "block_mask", "score_mod", "bias", "alibi_slopes", "softcap", "sinks"),
    *("scale", "dropout_p", "seed", "alignment", "out_dtype", "return_lse", "deterministic", "batch_invariant"),
    *("backend", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k"),
)
OF_PACKED = {name for name in ARGUMENTS if "seq" in name}

OBJECTS: dict[str, Any] = {
    "none": None,
    "true": True,
    "false": False,
    "text": "causal",
    "top_left": "top_left",
    "empty_text": "",
    "list": [1.0, 2.0],
    "empty_list": [],
    "dict": {},
    "numbers": (1, 2, 3),
    "nothing_and_one": (None, 1),
    "bytes": b"x",
    "complex": 1j,
    "object": object(),
    "array": np.ones((BATCH, KEYS, HEADS, WIDTH), np.float32),
    "numpy_number": np.float32(0.5),
    "numpy_integer": np.int64(3),
    "float16": torch.float16,
    "float32": torch.float32,
    "sparse": torch.eye(KEYS).to_sparse(),
    "parameter": torch.nn.Parameter(torch.ones(HEADS)),
    "full": masks.full(),
    "causal": masks.causal(),
    "prefix": masks.prefix(torch.tensor([3, 5])),
    "prefix_of_three": masks.prefix(torch.tensor([3, 5, 1])),
    "document": masks.document(torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 1, 2, 2, 0, 1])),
    "document_short": masks.document(torch.tensor([0, 1, 1])),
    "dense": masks.dense(torch.ones(QUERIES, KEYS, dtype=torch.bool)),
    "dense_wrong": masks.dense(torch.ones(3, QUERIES, KEYS, dtype=torch.bool)),
    "block_mask": create_block_mask(lambda b, h, q, kv: q >= kv, None, None, QUERIES, KEYS, device="cpu"),
    "block_mask_short": create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 3, KEYS, device="cpu"),
    "no_arguments": lambda: 1,
    "mask_mod": lambda b, h, q, kv: q >= kv,
    "score_mod": lambda score, b, h, q, kv: score + q - kv,
    "branches": lambda b, h, q, kv: q if q > kv else kv,
    "branching_score": lambda score, b, h, q, kv: score if score > 0 else -score,
    "text_of_it": lambda *index: "text",
    "random": lambda score, *index: score + torch.rand(()),
    "two": lambda score, *index: torch.stack((score, score)),
}
"""By name, so that a drawn call can be printed and drawn again."""


def value(made: tuple[Any, ...], device: str) -> Any:
    """The object that a drawn description stands for."""
    kind, *rest = made
    if kind == "number":
        return rest[0]
    if kind == "pair":
        return tuple(rest)
    if kind == "object":
        return OBJECTS[rest[0]]
    shape, dtype, place = rest
    generator = torch.Generator().manual_seed(len(shape))
    tensor = (torch.rand(shape, generator=generator) * 4).to(dtype)
    return tensor.to("meta" if place == "meta" else device)


def _right(call: WrongCall, device: str) -> dict[str, Any]:
    """Arguments that are in order."""
    generator = torch.Generator().manual_seed(7)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device)

    if not call.packed:
        shapes = (BATCH, QUERIES), (BATCH, KEYS), (BATCH, KEYS)
        return {name: normal(*shape, HEADS, WIDTH) for name, shape in zip("qkv", shapes, strict=True)}
    lengths = {"cu_seqlens_q": [0, 4, 10], "cu_seqlens_k": [0, 7, 16]}
    rows = {name: normal(count, HEADS, WIDTH) for name, count in (("q", 10), ("k", 16), ("v", 16))}
    return {**rows, **{name: torch.tensor(given, dtype=torch.int32, device=device) for name, given in lengths.items()}}


def check(call: WrongCall, where: Where) -> bool:
    given = _right(call, where.tensors)
    for name, made in call.changed:
        if call.packed or name not in OF_PACKED:
            given[name] = value(made, where.tensors)
    function: Any = flashtile.attention_varlen if call.packed else flashtile.attention
    torch.manual_seed(0)
    try:
        found = function(**given)
    except REFUSALS as error:
        _assert_in_our_words(error)
        return False
    if given["q"].device.type != "meta" and not given.get("dropout_p"):
        _assert_right(found, given, call.packed)
    return True


def _assert_in_our_words(error: Exception) -> None:
    """Raised by the checks, naming the argument and what it got; other exceptions are the library's own mistakes."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = Path(last.filename).as_posix()
    assert RAISED_BY.search(place), f"{type(error).__name__} from {place.split('/flashtile/')[-1]}: {error}"
    ours = r"^[\w\[\]. ]+: got .+", r"^no backend takes ", r"^mask_mod: |^score_mod: "
    assert any(re.match(pattern, str(error)) for pattern in ours), f"not in our words: {error}"


def _assert_right(found: Any, given: dict[str, Any], packed: bool) -> None:
    """A call that was taken gives what the reference gives."""
    unknown = {"out_dtype", "return_lse", "deterministic", "batch_invariant", "backend", "max_seqlen_q", "max_seqlen_k"}
    options = {name: part for name, part in given.items() if name not in unknown and part is not None}
    out = found.out if isinstance(found, State) else found
    if packed and not _plain(options):
        # The reference takes no tables of packed sequences; those have their own door.
        assert out.shape == (*given["q"].shape[:-1], given["v"].shape[-1])
        return
    # PyTorch's operators take no integers beyond 64 bits.
    numbers = {name: options[name] for name in ("scale", "softcap") if options.get(name) is not None}
    options |= {name: float(number) for name, number in numbers.items()}
    compute: Any = reference.attention_varlen if packed else reference.attention
    truth, textbook = (compute(**options, dtype=dtype).out for dtype in (torch.float64, None))
    if truth.isfinite().all():
        assert_close(out, textbook, truth, scale=4.0)
    else:
        # Scores past what float32 holds.
        assert truth.dtype is torch.float64


def _plain(options: dict[str, Any]) -> bool:
    """Nothing that depends on the sequence."""
    tables = ("bias", "alibi_slopes", "seqused_q", "seqused_k", "mask", "score_mod")
    return all(options.get(name) is None for name in tables)
