"""Random problems for `attention` and `attention_varlen`, and how one is checked."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

import flashtile
from flashtile import State
from tests import oracle
from tests.fuzz import masks, scores
from tests.fuzz.where import Where
from tests.problems import Call, Feature, Shape, Tensors, compose, packed
from tests.views import VIEWS

SLACK = 4.0
"""As in test_properties: a search through thousands of tiny problems meets the tails of the errors' distribution."""
LEAST_HALF = 16
"""Over a key or two the textbook formula makes no error at all in half precision, and twice that is none."""
HALF = (torch.float16, torch.bfloat16)
BIASES = st.tuples(*(st.booleans(),) * 4)


@dataclass(frozen=True)
class Problem:
    """A call as it was drawn, all of it: its repr makes it again.

    options: keyword arguments of `attention` beside the tensors. bias: along which dimensions it has its full size.
    slopes: whether there is one a batch entry. views: how q, k, v and the gradient of out lie in memory.
    """

    shape: Shape
    dtype: torch.dtype
    options: tuple[tuple[str, Any], ...] = ()
    mask: masks.Expression | None = None
    block_mask: tuple[str, tuple[int, int]] | None = None
    score: scores.Expression | None = None
    bias: tuple[bool, ...] | None = None
    bias_dtype: torch.dtype = torch.float32
    slopes: bool | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    shift: float = 0.0
    lse_grad: bool = True
    views: tuple[str, str, str, str] = ("contiguous",) * 4
    small_tiles: bool = True
    schedule: int = 0
    backend: str | None = None

    def call(self, device: str) -> Call:
        return compose(repr(self), self.shape, self.features(), self.dtype, device, self.lse_grad, self.shift)

    def features(self) -> tuple[Feature, ...]:
        found = [Feature(lambda tensors, shape: dict(self.options))]
        found += [] if self.mask is None else [masks.feature(self.mask)]
        found += [] if self.block_mask is None else [masks.block_mask(*self.block_mask)]
        found += [] if self.score is None else [scores.feature(self.score)]
        found += [] if self.bias is None else [_bias(self.bias, self.bias_dtype)]
        found += [] if self.slopes is None else [_vector("alibi_slopes", 0.2, self.slopes)]
        found += [_vector("sinks", 2.0)] if self.sinks else []
        if self.dropout_p:
            found.append(Feature(lambda tensors, shape: {"dropout_p": self.dropout_p, "seed": 0x1234_5678_9ABC}))
        return tuple(found)


def _bias(full: tuple[bool, ...], dtype: torch.dtype) -> Feature:
    def leaves(shape: Shape, draw: Any) -> Tensors:
        sizes = (size if wide else 1 for size, wide in zip(shape.scores, full, strict=True))
        return {"bias": draw.normal(*sizes).to(dtype)}

    return Feature(lambda tensors, shape: {"bias": tensors["bias"]}, leaves=leaves)


def _vector(option: str, size: float, per_batch: bool = False) -> Feature:
    def leaves(shape: Shape, draw: Any) -> Tensors:
        return {option: draw.normal(*((shape.batch,) if per_batch else ()), shape.heads).abs() * size}

    return Feature(lambda tensors, shape: {option: tensors[option]}, leaves=leaves)


def _options() -> st.SearchStrategy[tuple[tuple[str, Any], ...]]:
    drawn = st.fixed_dictionaries(
        {},
        optional={
            "causal": st.booleans(),
            "window": st.tuples(masks.SIDE, masks.SIDE),
            "alignment": masks.ALIGNMENTS,
            "scale": st.sampled_from((0.05, 0.3, 1.0, -0.5, 0.0)),
            "softcap": st.sampled_from((0.0, 0.5, 3.0, 30.0, 1e4)),
            "out_dtype": st.just(torch.float32),
            "deterministic": st.booleans(),
            "batch_invariant": st.booleans(),
        },
    )
    return drawn.map(lambda options: tuple(options.items()))


def _shapes(packs: bool, where: Where) -> Any:
    lengths, widths = st.integers(0, where.longest), st.sampled_from(where.widths)
    heads = st.tuples(*[st.integers(1, most) for most in where.groups])
    if not packs:
        parts = st.tuples(st.integers(*where.batches), lengths, lengths, heads, widths, widths, st.booleans())
        return parts.map(lambda p: Shape(*p[:3], p[3][0] * p[3][1], p[3][0], p[4], p[4] if p[6] else p[5]))
    # (queries, keys, those in use in 64ths)
    sequences = st.lists(st.tuples(lengths, lengths, st.integers(0, 64), st.integers(0, 64)), max_size=4)

    def pack(parts: tuple[Any, ...]) -> Shape:
        rows, (groups, group), width, used = parts
        queries, keys = tuple(row[0] for row in rows), tuple(row[1] for row in rows)
        in_use = (tuple(row[i] * row[i + 2] // 64 for row in rows) for i in range(2)) if used else (None, None)
        return packed(queries, keys, groups * group, groups, width, *in_use)

    return st.tuples(sequences, heads, widths, st.booleans()).map(pack)


def _settled(problem: Problem) -> Problem:
    """Without what the fuzzer's own words do not allow together."""
    options, shape = dict(problem.options), problem.shape
    if problem.dtype in HALF and not shape.packed:
        lengths = {"seqlen_q": max(LEAST_HALF, shape.seqlen_q), "seqlen_kv": max(LEAST_HALF, shape.seqlen_kv)}
        problem = replace(problem, shape=replace(shape, **lengths))
    if problem.dtype in HALF and shape.packed:
        assert shape.lengths_q is not None
        assert shape.lengths_kv is not None
        longer = [tuple(n + LEAST_HALF for n in each) for each in (shape.lengths_q, shape.lengths_kv)]
        used = [None if each is None else tuple(n + LEAST_HALF for n in each) for each in (shape.used_q, shape.used_kv)]
        problem = replace(problem, shape=packed(*longer, shape.heads, shape.heads_kv, shape.headdim, *used))
    if problem.dtype is torch.float64:
        options.pop("out_dtype", None)
    if problem.block_mask is not None:
        # Flex's own maker takes no empty problem.
        full = problem.shape.batch and problem.shape.seqlen_q and problem.shape.seqlen_kv
        problem = replace(problem, block_mask=problem.block_mask if full else None)
    return replace(problem, options=tuple(options.items()))


def problems(where: Where, packs: bool) -> st.SearchStrategy[Problem]:
    """Whole calls that are meant to work."""
    often = st.sampled_from((False, False, True))
    fields: dict[str, Any] = {
        "shape": _shapes(packs, where),
        "dtype": st.sampled_from(where.dtypes),
        "options": _options(),
        "mask": st.none() | masks.expressions(packs),
        "score": st.none() | st.none() | scores.expressions(),
        "bias": st.none() | st.none() | BIASES,
        "bias_dtype": st.sampled_from((torch.float32, *(dtype for dtype in where.dtypes if dtype in HALF))),
        "slopes": st.none() | st.none() | st.booleans(),
        "sinks": often,
        "dropout_p": st.sampled_from((0.0, 0.0, 0.0, 0.1, 0.5)),
        "shift": st.sampled_from((0.0,) * 8 + (30.0, -30.0)),
        "lse_grad": st.booleans(),
        "views": st.tuples(*(st.sampled_from(where.views),) * 4),
        "small_tiles": st.booleans(),
        "schedule": st.integers(0, where.schedules - 1),
        "backend": st.sampled_from(where.backends),
    }
    if not packs:
        block = st.tuples(st.sampled_from(sorted(masks.FUNCTIONS)), st.tuples(st.integers(1, 40), st.integers(1, 40)))
        fields["block_mask"] = st.none() | st.none() | block
    return st.builds(Problem, **fields).map(_settled)


def check(problem: Problem, where: Where) -> bool:
    """Whether the call was taken; asserts that it is right."""
    with where.ready(problem.small_tiles, problem.schedule):
        call = problem.call(where.tensors)
        try:
            found = _run(call, problem)
        except NotImplementedError:
            # A backend that was asked for by name may say no.
            if problem.backend is None:
                raise
            return False
    known = oracle.truth_and_textbook(call)
    oracle.compare(found, call, SLACK, known, _inherent(problem, call, found, known[0]))
    return True


def _inherent(problem: Problem, call: Call, found: Tensors, truth: Tensors) -> dict[str, float]:
    """Errors of gradients that cancel, which the textbook formula may escape by chance.

    The rows' sums of P * dP are taken from out as it was rounded (FlashAttention-2, Dao 2023, section 3.1), so that the
    score gradients of a row miss zero by a step of a random walk over its columns, and what is summed over rows by a
    walk over all of them; slopes weigh each with a distance, and a table that a function multiplies with the score
    weighs each with that score, as large as the shifted logits are. So do the gradients of queries and keys, where one
    key has all the weight of each row and they are 0 in the textbook formula, or nothing beside these errors. Shifted
    logits have an error of their size, which a column of keys as large then multiplies.
    """
    longest = max(1, call.shape.seqlen_q, call.shape.seqlen_kv)
    wide = torch.finfo(torch.float64 if call.leaves["q"].dtype is torch.float64 else torch.float32)
    products = call.grads["out"].double() * found["out"].double()
    noise = 2 * torch.finfo(found["out"].dtype).eps * float(products.norm())
    width = call.shape.headdim**0.5
    shift = abs(problem.shift)
    logits = shift * width * abs(dict(problem.options).get("scale", 1 / max(1.0, width)))
    errors = {f"d{name}": noise for name in call.leaves if name not in "qkv"}
    if problem.score is not None:
        errors |= {f"d{name}": noise * max(1.0, logits) for name in scores.factors(problem.score)}
    errors["dalibi_slopes"] = noise * longest
    errors["dq"] = oracle.ROUNDINGS * wide.eps * shift**2 * call.shape.headdim_v**0.5
    for name, other in (("dq", "k"), ("dk", "q")):
        if call.leaves[name[1:]].numel() and call.leaves[other].numel():
            cancelled = noise * float(call.leaves[other].double().norm(torch.inf))
            errors[name] = errors.get(name, 0.0) + cancelled * (float(truth[name].norm(torch.inf)) < cancelled)
    return errors


def _run(call: Call, problem: Problem) -> Tensors:
    """out, lse and gradients of leaves that lie in memory as the problem says."""
    leaves = {name: leaf.detach().clone() for name, leaf in call.leaves.items()}
    leaves |= {name: VIEWS[view](leaves[name]) for name, view in zip("qkv", problem.views, strict=False)}
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    options = {**call.arguments(leaves), "return_lse": True, "backend": problem.backend}
    function: Any = flashtile.attention_varlen if call.shape.packed else flashtile.attention
    state: State = function(leaves["q"], leaves["k"], leaves["v"], **call.packing(), **options)
    outputs = [(state.out, VIEWS[problem.views[3]](call.grads["out"]))]
    if "lse" in call.grads:
        outputs.append((state.lse, call.grads["lse"]))
    values, grads = zip(*((value, grad.to(value.dtype)) for value, grad in outputs), strict=True)
    found = torch.autograd.grad(values, list(leaves.values()), grads, allow_unused=True)
    results: Tensors = {"out": state.out.detach(), "lse": state.lse.detach()}
    for (name, leaf), grad in zip(leaves.items(), found, strict=True):
        results[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results
