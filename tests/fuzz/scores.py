"""Random functions of scores: nested tuples again, which become a function and the tensors that it captures.

They are continuous in the score, so that a rounding error stays one; what depends on indices may jump.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.problems import Draw, Feature, Shape, Tensors

Expression = tuple[Any, ...]
CONSTANT = st.sampled_from((-1.5, -0.25, 0.0, 0.5, 1.0, 2.0))

CONDITIONS: dict[str, Callable[..., Any]] = {
    "later": lambda h, q, kv: kv > q,
    "third": lambda h, q, kv: (q + kv) % 3 == 0,
    "heads": lambda h, q, kv: h % 2 == 0,
    "first": lambda h, q, kv: kv < 5,
}
TERMS: dict[str, Callable[[Tensors, Any, Any, Any, Any], Any]] = {
    "distance": lambda tensors, b, h, q, kv: (q - kv).abs() * -0.05,
    "slope": lambda tensors, b, h, q, kv: torch.exp2(-(h + 1.0)) * (kv - q) * 0.1,
    "gain": lambda tensors, b, h, q, kv: tensors["gain"][h],
    "relative": lambda tensors, b, h, q, kv: tensors["table"][h, (q - kv).clamp(-8, 8) + 8],
    "keys": lambda tensors, b, h, q, kv: tensors["keys"][kv],
    "rows": lambda tensors, b, h, q, kv: tensors["rows"][b, q],
    "wave": lambda tensors, b, h, q, kv: torch.sin(q * 0.5) * torch.cos(kv * 0.25),
}
_SIZES: dict[str, Callable[[Shape], tuple[int, ...]]] = {
    "gain": lambda shape: (shape.heads,),
    "table": lambda shape: (shape.heads, 17),
    "keys": lambda shape: (max(1, shape.seqlen_kv),),
    "rows": lambda shape: (max(1, shape.batch), max(1, shape.seqlen_q)),
}
_READ = {"gain": "gain", "relative": "table", "keys": "keys", "rows": "rows"}


def expressions() -> st.SearchStrategy[Expression]:
    """Functions of up to a few steps."""
    term = st.tuples(st.just("term"), st.sampled_from(sorted(TERMS))) | st.tuples(st.just("constant"), CONSTANT)

    def wider(parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        condition = st.sampled_from(sorted(CONDITIONS))
        return st.one_of(
            st.tuples(st.just("add"), parts, term),
            st.tuples(st.just("multiply"), parts, term),
            st.tuples(st.just("tanh"), parts, st.sampled_from((1.0, 4.0))),
            st.tuples(st.just("sigmoid"), parts),
            st.tuples(st.just("clamp"), parts),
            st.tuples(st.just("where"), condition, parts, parts),
        )

    whole: st.SearchStrategy[Any] = st.recursive(st.just(("score",)), wider, max_leaves=4)
    # Only the last step hides: what would be made of -inf afterwards may be NaN.
    return whole | st.tuples(st.just("hide"), st.sampled_from(sorted(CONDITIONS)), whole)


def feature(expression: Expression) -> Feature:
    """The argument `score_mod`; the tables that it reads are leaves with gradients."""
    names = _tables(expression)

    def options(tensors: Tensors, shape: Shape) -> dict[str, Any]:
        held = {name: tensors[name] for name in names}

        def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return _run(expression, held, score, (b, h, q_idx, kv_idx))

        return {"score_mod": score_mod}

    def leaves(shape: Shape, draw: Draw) -> Tensors:
        return {name: draw.normal(*_SIZES[name](shape)) for name in names}

    return Feature(options, leaves=leaves)


def _tables(expression: Expression) -> list[str]:
    """The names of the leaves that an expression reads."""
    return sorted({_READ[name] for name in _terms(expression) if name in _READ})


def factors(expression: Expression) -> list[str]:
    """The names of the leaves that are part of a product."""
    if expression[0] == "multiply":
        return _tables(expression)
    return [name for part in expression[1:] if isinstance(part, tuple) for name in factors(part)]


def _terms(expression: Expression) -> list[str]:
    if expression[0] == "term":
        return [expression[1]]
    return [name for part in expression[1:] if isinstance(part, tuple) for name in _terms(part)]


def _run(expression: Expression, tensors: Tensors, score: Tensor, index: tuple[Any, ...]) -> Any:
    kind, *rest = expression
    if kind == "score":
        return score
    if kind == "constant":
        return rest[0]
    if kind == "term":
        return TERMS[rest[0]](tensors, *index)
    parts = [_run(part, tensors, score, index) for part in rest if isinstance(part, tuple)]
    if kind in ("where", "hide"):
        chosen = CONDITIONS[rest[0]](*index[1:])
        return torch.where(chosen, parts[0], parts[1] if kind == "where" else -torch.inf)
    steps: dict[str, Callable[[], Any]] = {
        "add": lambda: parts[0] + parts[1],
        "multiply": lambda: parts[0] * parts[1],
        "tanh": lambda: rest[1] * torch.tanh(parts[0] / rest[1]),
        "sigmoid": lambda: torch.sigmoid(parts[0]),
        "clamp": lambda: parts[0].clamp(-3.0, 3.0),
    }
    return steps[kind]()
