"""How heads are dealt out; what is exchanged is tested with the calls."""

import pytest

from flashtile.distributed.ulysses import Dealer


def _picked(heads: int, heads_kv: int, ranks: int) -> list[int]:
    dealer = Dealer("zigzag/0", None, ranks, "zigzag", None)  # type: ignore[arg-type]
    return dealer.heads_kv_of(heads, heads_kv)


@pytest.mark.parametrize(
    ("heads", "heads_kv", "ranks", "expected"),
    [
        (8, 8, 4, [0, 1, 2, 3, 4, 5, 6, 7]),
        (8, 4, 4, [0, 1, 2, 3]),
        (8, 2, 2, [0, 1]),
        # Fewer key/value heads than ranks: each of them several times.
        (8, 2, 4, [0, 0, 1, 1]),
        (8, 1, 4, [0, 0, 0, 0]),
        # Query heads 0 1 | 2 3 | 4 5 over key/value heads of three: the middle rank reads two, all get two.
        (6, 2, 3, [0, 0, 0, 1, 1, 1]),
        (12, 4, 2, [0, 1, 2, 3]),
    ],
)
def test_key_value_heads_follow_their_query_heads(heads: int, heads_kv: int, ranks: int, expected: list[int]) -> None:
    found = _picked(heads, heads_kv, ranks)
    assert found == expected
    each, count = heads // ranks, len(found) // ranks
    for rank in range(ranks):
        held = found[rank * count : (rank + 1) * count]
        for place in range(each):
            assert held[place // (each // count)] == (rank * each + place) // (heads // heads_kv)
