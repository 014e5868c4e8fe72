"""What no kernel in Triton or Gluon takes."""

from flashtile import lower
from flashtile.problem import Problem
from flashtile.region import region


def functions(problem: Problem) -> str | None:
    """What stands against the score function and the mask."""
    rest = region(problem.mask).rest
    if (rest or problem.score_mod) and max(problem.seqlen_q, problem.seqlen_kv) > lower.LONGEST:
        return f"functions of positions are exact up to {lower.LONGEST}"
    reason = lower.unsupported_mask(rest) if rest else None
    if reason is None and problem.score_mod:
        reason = lower.unsupported(problem.score_mod)
    if reason is None and problem.deterministic and any(problem.wanted.score):
        reason = "gradients of captured tensors are added in any order, and deterministic results were asked for"
    return reason
