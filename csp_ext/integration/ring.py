"""The last queries of a layer, in place: what scores a cache that is pruned again while it grows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Ring:
    """A ring buffer of the last queries.

    Attributes
    ----------
    queries : Tensor
        [B, Hq, size, D]; the query of token p stands in slot p % size.
    count : Tensor
        0-dim int64, tokens seen: one more than the newest p.
    floor : Tensor
        0-dim int64, the oldest p that is still there.
    """

    def __init__(self, queries: Tensor, known: Tensor) -> None:
        """Begin with queries [B, Hq, size, D], of which the last `known` (0-dim int64) are true ones."""
        self.queries = queries
        self.count = torch.full_like(known, queries.shape[2])
        self.floor = self.count - known

    @property
    def size(self) -> int:
        """How many queries there is room for."""
        return self.queries.shape[2]

    @torch.no_grad()
    def write(self, query: Tensor) -> None:
        """Append the queries [B, Hq, q, D] of new tokens; works inside a graph."""
        new = query.shape[2]
        kept = min(new, self.size)
        places = torch.arange(new - kept, new, device=self.count.device) + self.count
        self.queries.index_copy_(2, places % self.size, query[:, :, new - kept :].to(self.queries.dtype))
        self.count.add_(new)

    def last(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the last `count` queries, oldest first, and which of them are there, bool [count]."""
        places = torch.arange(self.size - count, self.size, device=self.count.device) + self.count - self.size
        return self.queries.index_select(2, places % self.size), places >= self.floor

    def crop(self, count: int) -> None:
        """Take back the last `count` tokens; the older ones that they had overwritten are lost."""
        self.floor.copy_(torch.maximum(self.floor, self.count - self.size))
        self.count.sub_(count)

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to every tensor with a row per sequence."""
        self.queries = change(self.queries)

    def become(self, other: Ring) -> None:
        """Take over what another ring of the same shape holds, in place."""
        for name in ("queries", "count", "floor"):
            getattr(self, name).copy_(getattr(other, name))
