"""PagedCache against a plain dictionary of tensors; what sharing saves; use with `attention_kvcache`."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from torch import Tensor

import flashtile
from flashtile.kvcache import OutOfPages, PagedCache, packed, quantized, unpacked

PAGES, PAGE, LAYERS = 7, 16, 2


def _pool(pages: int = PAGES, layers: int = LAYERS) -> PagedCache:
    cache = PagedCache(pages, PAGE, 2, 3, headdim_v=5, layers=layers, dtype=torch.float32)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    return cache


def _rows(tokens: int, first: float, layers: int = LAYERS) -> tuple[Tensor, Tensor]:
    """Numbers that no other rows have."""
    k = first + torch.arange(layers * tokens * 6, dtype=torch.float32).view(layers, tokens, 2, 3)
    return k, -first - torch.arange(layers * tokens * 10, dtype=torch.float32).view(layers, tokens, 2, 5)


class PoolMachine(RuleBasedStateMachine):
    """Any order of operations. The model: sequence -> its rows, and how many pages it was promised."""

    sequences = Bundle("sequences")

    def __init__(self) -> None:
        super().__init__()
        self.pool = _pool()
        self.model: dict[int, tuple[Tensor, Tensor]] = {}
        self.count = 0.0

    def _fresh(self, tokens: int) -> tuple[Tensor, Tensor]:
        self.count += 1000.0
        return _rows(tokens, self.count)

    @rule(target=sequences, tokens=st.integers(0, 40))
    def allocate(self, tokens: int) -> int:
        needed = -(-tokens // PAGE)
        if needed > self.pool.pages_free:
            with pytest.raises(OutOfPages):
                self.pool.allocate(tokens)
            tokens = 0
        sequence = self.pool.allocate(tokens)
        assert sequence not in self.model
        self.model[sequence] = self._fresh(0)
        return sequence

    @rule(sequence=sequences, tokens=st.integers(0, 40))
    def append(self, sequence: int, tokens: int) -> None:
        k, v = self._fresh(tokens)
        free = self.pool.pages_free
        try:
            self.pool.append(sequence, k, v)
        except OutOfPages:
            assert self.pool.pages_free == free
            return
        old_k, old_v = self.model[sequence]
        self.model[sequence] = torch.cat((old_k, k), 1), torch.cat((old_v, v), 1)

    @rule(first=sequences, second=sequences, tokens=st.integers(1, 20))
    def extend_together(self, first: int, second: int, tokens: int) -> None:
        """All or none; rows are written through the table that comes back."""
        chosen = list(dict.fromkeys((first, second)))
        try:
            batch = self.pool.extend(chosen, tokens)
        except OutOfPages:
            return
        for index, sequence in enumerate(chosen):
            k, v = self._fresh(tokens)
            assert int(batch.cache_seqlens[index]) == self.model[sequence][0].shape[1]
            for row in range(tokens):
                place = int(batch.cache_seqlens[index]) + row
                page = int(batch.block_table[index, place // PAGE])
                self.pool.k[:, page, place % PAGE], self.pool.v[:, page, place % PAGE] = k[:, row], v[:, row]
            old_k, old_v = self.model[sequence]
            self.model[sequence] = torch.cat((old_k, k), 1), torch.cat((old_v, v), 1)

    @rule(target=sequences, sequence=sequences)
    def fork(self, sequence: int) -> int:
        free = self.pool.pages_free
        child = self.pool.fork(sequence)
        assert self.pool.pages_free == free
        self.model[child] = self.model[sequence]
        return child

    @rule(sequence=sequences, share=st.floats(0, 1))
    def truncate(self, sequence: int, share: float) -> None:
        k, v = self.model[sequence]
        tokens = int(share * k.shape[1])
        self.pool.truncate(sequence, tokens)
        self.model[sequence] = k[:, :tokens], v[:, :tokens]

    @rule(sequence=consumes(sequences))
    def free(self, sequence: int) -> None:
        self.pool.free(sequence)
        del self.model[sequence]

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        assert self.pool.sequences == list(self.model)
        for sequence, (k, v) in self.model.items():
            found = self.pool.read(sequence)
            assert self.pool.seqlen(sequence) == k.shape[1]
            assert torch.equal(found[0], k)
            assert torch.equal(found[1], v)

    @invariant()
    def no_page_is_lost(self) -> None:
        held = [page for sequence in self.model for page in self.pool._pages[sequence]]
        assert self.pool.pages_free == PAGES - len(set(held))
        assert [held.count(page) for page in range(PAGES)] == self.pool._owners


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=25)


def test_forks_share_until_one_writes() -> None:
    pool = _pool()
    parent = pool.allocate()
    pool.append(parent, *_rows(20, 0.0))
    children = [pool.fork(parent) for _ in range(3)]
    assert pool.pages_free == PAGES - 2
    pool.append(children[0], *_rows(1, 500.0))
    assert pool.pages_free == PAGES - 3, "the page that is full stays shared"
    pool.free(parent)
    pool.free(children[0])
    assert pool.pages_free == PAGES - 2
    pool.extend(children[1:], 1)
    assert pool.pages_free == PAGES - 3, "the last who holds a page writes into it"


def test_out_of_pages_loses_nothing() -> None:
    pool = _pool(pages=3)
    one, two = pool.allocate(), pool.allocate()
    pool.append(one, *_rows(16, 0.0))
    pool.append(two, *_rows(16, 100.0))
    with pytest.raises(OutOfPages, match="got 1 free of 3, need 2 more; nothing has changed"):
        pool.extend([one, two], 1)
    assert (pool.seqlen(one), pool.seqlen(two), pool.pages_free) == (16, 16, 1)
    pool.extend([one], 1)


def test_pages_set_aside_are_used() -> None:
    pool = _pool(pages=3)
    sequence = pool.allocate(40)
    assert pool.pages_free == 0
    assert pool.extend([sequence], 3, width=1).block_table.shape == (1, 1)
    assert pool.extend([sequence], 37).block_table.tolist() == [[0, 1, 2]]
    assert pool.block_table([sequence], width=5).tolist() == [[0, 1, 2, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_pool_of_few_bits(dtype: torch.dtype) -> None:
    """Rows come as they are stored; a fork's copy has the same bits."""
    pool = PagedCache(4, PAGE, 2, 3, dtype=dtype)
    k, v = (rows.remainder(7).to(dtype) for rows in (torch.arange(60.0).view(1, 10, 2, 3), torch.ones(1, 10, 2, 3)))
    one = pool.allocate()
    pool.append(one, k, v)
    two = pool.fork(one)
    pool.append(two, k[:, :2], v[:, :2])
    for sequence, wanted in ((one, k), (two, torch.cat((k.float(), k[:, :2].float()), 1))):
        assert torch.equal(pool.read(sequence)[0].float(), wanted.float())


def test_four_bits_lie_two_in_a_byte() -> None:
    numbers = torch.arange(-8, 8, dtype=torch.int8).repeat(2, 1)
    pairs = packed(numbers)
    assert pairs[0, :2].tolist() == [0x98, 0xBA], "-8 and -7, then -6 and -5, the first in the low bits"
    assert torch.equal(unpacked(pairs), numbers)


def test_a_pool_of_four_bits() -> None:
    """Rows go in packed, by `append` or by the call that attends; what is read back is what was near."""
    pool = PagedCache(4, PAGE, 2, 6, headdim_v=4, dtype=torch.uint8)
    scale = torch.tensor([0.5, 0.25])
    assert (pool.k.shape[-1], pool.v.shape[-1]) == (3, 2)
    sequence = pool.allocate()
    k, v = torch.randn(1, 20, 2, 6), torch.randn(1, 20, 2, 4)
    pool.append(sequence, *(quantized(rows[:, :17], scale, torch.uint8) for rows in (k, v)))
    batch = pool.extend([sequence], 3)
    flashtile.attention_kvcache(
        torch.randn(1, 3, 2, 6), pool.k[0], pool.v[0], k=k[:, 17:], v=v[:, 17:], k_scale=scale, v_scale=scale,
        **batch._asdict(),
    )  # fmt: skip
    for found, rows in zip(pool.read(sequence), (k, v), strict=True):
        near = unpacked(found) * scale[:, None]
        cut_off = rows.clamp(-7 * scale[:, None], 7 * scale[:, None])
        assert bool(((near - cut_off).abs() <= scale[:, None] / 2 + 1e-6).all())


def test_attention_over_forks() -> None:
    """Two continuations of one prompt, in each layer, against attention over their own rows."""
    pool = PagedCache(12, 16, 2, 8, layers=2, dtype=torch.float32)
    prompt = pool.allocate()
    pool.append(prompt, torch.randn(2, 21, 2, 8), torch.randn(2, 21, 2, 8))
    both = [prompt, pool.fork(prompt)]
    for _ in range(3):
        batch = pool.extend(both, 4)
        for layer in range(2):
            q, k, v = (torch.randn(2, 4, heads, 8) for heads in (4, 2, 2))
            found = flashtile.attention_kvcache(q, pool.k[layer], pool.v[layer], k=k, v=v, **batch._asdict())
            for index, sequence in enumerate(both):
                own = [rows[layer][None] for rows in pool.read(sequence)]
                wanted = flashtile.attention(q[index : index + 1], *own, causal=True)
                torch.testing.assert_close(found[index : index + 1], wanted)
                assert torch.equal(own[0][0, -4:], k[index])
