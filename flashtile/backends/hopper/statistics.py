"""What the backward kernels know of a query row: its log-sum-exp and delta = rowsum(dO * O) - dlse."""

from triton.experimental import gluon

from flashtile.backends.hopper.compat import gl
from flashtile.backends.hopper.softmax import LOG2E
from flashtile.kernels.places import number_pointers


@gluon.jit
def load_statistics(lse, delta, place, o_query):
    """(lse, delta) of some rows; lse inf where there is none."""
    m_rows = o_query < place.seqlen_q
    b_lse = gl.load(number_pointers(lse, place, o_query), mask=m_rows, other=float("inf"))
    b_delta = gl.load(number_pointers(delta, place, o_query), mask=m_rows, other=0.0)
    return b_lse, b_delta


@gluon.jit
def subtracted(b_lse):
    """What is taken from scores in base 2: inf for rows that saw no key or do not exist, so that all weights are 0."""
    return gl.where(b_lse == float("-inf"), float("inf"), b_lse * LOG2E)
