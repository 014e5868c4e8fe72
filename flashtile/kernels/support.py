"""What no kernel in Triton or Gluon takes."""

from flashtile import lower
from flashtile.problem import Problem
from flashtile.region import region

STEEPEST = 2.0**20
"""The largest scale. A weight is 2^(s f - m f), f the scale and m the largest s, where s f is exact and m f was
rounded. Beyond 2^31 the two may be 128 apart for s = m, and the weight is infinite."""


def refuses(problem: Problem) -> str | None:
    """What stands against the scale, the score function and the mask."""
    if abs(problem.scale) > STEEPEST:
        return f"scores that are scaled by more than {STEEPEST:.0f} may be too large for their exponentials"
    rest = region(problem.mask).rest
    if (rest or problem.score_mod) and max(problem.seqlen_q, problem.seqlen_kv) > lower.LONGEST:
        return f"functions of positions are exact up to {lower.LONGEST}"
    reason = lower.unsupported_mask(rest) if rest else None
    if reason is None and problem.score_mod:
        reason = lower.unsupported(problem.score_mod)
    if reason is None and problem.deterministic and any(problem.wanted.score):
        reason = "gradients of captured tensors are added in any order, and deterministic results were asked for"
    return reason
