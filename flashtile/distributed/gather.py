"""All-gather attention: every rank collects all keys and values, then works on its queries alone.

The simplest scheme and, for short sequences, the one with the fewest messages (Llama 3's context parallelism, Dubey et
al. 2024, section 3.3.2): one all-gather forward; backward one more, and the gradients of keys and values go to their
owners in one all-to-all, summed there in float32 and in rank order. Memory holds the keys of all ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from flashtile import parts
from flashtile.distributed import balance
from flashtile.distributed.balance import Piece
from flashtile.distributed.groups import as_bytes
from flashtile.distributed.scheme import Rectangle, Running, Scheme, call, rectangles, saved_of
from flashtile.parts import Grads, Whole
from flashtile.sums import Sums


class Gather(Scheme):
    """See above."""

    def _keys(self, whole: Whole) -> tuple[Tensor, Tensor]:
        """All keys and values, in the order of the sequence."""
        k, v = whole.inputs.k, whole.inputs.v
        if self.tokens is None or self.ranks == 1:
            return k, v
        width = k.shape[-1]
        together = torch.cat((k, v), -1)
        every = balance.joined(balance.gathered(together, self.tokens), self.layout, -3)
        return every[..., :width], every[..., width:]

    def _rectangles(self, whole: Whole) -> list[Rectangle]:
        """Each piece of this rank's queries against all keys."""
        every = [Piece(0, 0, whole.seqlen_kv)]
        return rectangles(whole, self.pieces(self.rank, whole.seqlen_q), every)

    def _forward(self, whole: Whole) -> tuple[Tensor, Tensor]:
        k, v = self._keys(whole)
        running = Running(whole)
        for found in self._rectangles(whole):
            running.add(found.rows, *parts.forward(call(whole, found, k, v)))
        return running.result()

    def _backward(
        self,
        whole: Whole,
        saved: tuple[Tensor, Tensor],
        grads: tuple[Tensor | None, Tensor | None],
        totals: Grads,
    ) -> tuple[Tensor, Tensor, Tensor]:
        k, v = self._keys(whole)
        sums = Sums(whole.inputs.q), Sums(k), Sums(v)
        for found in self._rectangles(whole):
            part = call(whole, found, k, v)
            given = parts.backward(part, *saved_of(found, saved, grads), totals)
            for total, rows, gradient in zip(sums, (found.rows, found.keys, found.keys), given, strict=True):
                total.add(rows, gradient)
        return sums[0].result(), *self._home(sums[1].result(), sums[2].result())

    def _home(self, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of this rank's keys and values, summed over all ranks."""
        if self.tokens is None or self.ranks == 1:
            return dk, dv
        width = dk.shape[-1]
        together = torch.cat((dk, dv), -1)
        shares = torch.stack([balance.own(together, self.layout, rank, self.ranks, -3) for rank in range(self.ranks)])
        arrived = torch.empty_like(shares)
        dist.all_to_all_single(as_bytes(arrived), as_bytes(shares), group=self.tokens)
        wide = torch.float64 if dk.dtype is torch.float64 else torch.float32
        total = arrived.sum(0, dtype=wide).to(dk.dtype)
        return total[..., :width].contiguous(), total[..., width:].contiguous()
