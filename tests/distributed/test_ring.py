"""What a ring sends and computes: known without any process, for it follows from masks and layouts alone."""

import pytest
import torch

from flashtile import masks, parts
from flashtile.distributed import balance
from flashtile.distributed.scheme import ALL, CAUSAL, Rectangle, hull, rectangles
from flashtile.parts import Inputs, Options, Whole

TOKENS = 8


def _whole(ranks: int, mask: masks.Mask, **inputs: torch.Tensor) -> Whole:
    q = torch.zeros(1, TOKENS, 2, 4)
    return parts.whole_of(Inputs(q, q, q, mask=mask.tensors, **inputs), Options(mask=mask.token), ranks)


def _between(whole: Whole, ranks: int, rank_q: int, rank_kv: int, layout: str = "zigzag") -> list[Rectangle]:
    held = [balance.pieces(layout, rank, ranks, ranks * TOKENS) for rank in (rank_q, rank_kv)]
    return rectangles(whole, *held)


def _shape(found: Rectangle) -> tuple[int, int]:
    return found.rows.stop - found.rows.start, found.keys.stop - found.keys.start


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_causal_step_is_one_call_of_equal_work(ranks: int) -> None:
    whole = _whole(ranks, masks.causal())
    for rank in range(ranks):
        for source in range(ranks):
            (found,) = _between(whole, ranks, rank, source)
            if source == rank:
                assert (found.mask.token, _shape(found)) == (CAUSAL, (TOKENS, TOKENS))
            else:
                assert found.mask.token == ALL
                # All queries against the early keys of an earlier rank; late queries against all keys of a later one.
                assert _shape(found) == ((TOKENS, TOKENS // 2) if source < rank else (TOKENS // 2, TOKENS))


def test_what_no_query_sees_is_not_sent() -> None:
    """Of an earlier rank the late keys; of a window, all but the neighbours."""
    causal = _whole(4, masks.causal())
    assert hull(_between(causal, 4, 2, 1)) == slice(0, TOKENS // 2)
    assert hull(_between(causal, 4, 1, 2)) == slice(0, TOKENS)
    window = _whole(4, masks.window(3, 0))
    met = [source for source in range(4) if hull(_between(window, 4, 3, source, "contiguous")) is not None]
    assert met == [2, 3]


def test_a_plain_step_is_one_call() -> None:
    (found,) = _between(_whole(3, masks.full()), 3, 0, 2)
    assert _shape(found) == (TOKENS, TOKENS)


def test_scores_that_know_places_keep_their_chunks_apart() -> None:
    """Chunks that are not neighbours in the sequence have indices of their own."""
    whole = _whole(2, masks.causal(), alibi_slopes=torch.ones(2))
    assert not whole.placeless
    assert len(_between(whole, 2, 0, 0)) == 3
    assert len(_between(whole, 2, 1, 0)) == 2


def test_nothing_visible_is_nothing_computed() -> None:
    assert _between(_whole(2, masks.prefix(0)), 2, 0, 1) == []
    assert hull([]) is None
