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
        int64 [B, 1], the oldest p that is still there.
    """

    def __init__(self, queries: Tensor, known: Tensor) -> None:
        """Begin with queries [B, Hq, size, D], of which the last `known` (int64 [B, 1]) are true ones."""
        self.queries = queries
        self.count = torch.full((), queries.shape[2], dtype=torch.int64, device=queries.device)
        self.floor = self.count - known

    @property
    def size(self) -> int:
        """How many queries there is room for."""
        return self.queries.shape[2]

    @torch.no_grad()
    def write(self, query: Tensor) -> None:
        """Append the queries [B, Hq, q, D] of new tokens; works inside a graph."""
        if not torch.compiler.is_compiling():
            self._make_writable()
        new = query.shape[2]
        kept = min(new, self.size)
        places = torch.arange(new - kept, new, device=self.count.device) + self.count
        self.queries.index_copy_(2, places % self.size, query[:, :, new - kept :].to(self.queries.dtype))
        self.count.add_(new)

    def last(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the last `count` queries, oldest first, and which of them are there, bool [B, count]."""
        places = torch.arange(self.size - count, self.size, device=self.count.device) + self.count - self.size
        return self.queries.index_select(2, places % self.size), places >= self.floor

    def close_gaps(self, real: Tensor) -> None:
        """Forget tokens that were padding, so that the queries of each row follow upon one another.

        Parameters
        ----------
        real : Tensor
            bool [B, n], which of the last n <= size tokens stay; what is before them is forgotten, too.
        """
        query, there = self.last(real.shape[1])
        order = real.byte().argsort(dim=-1, stable=True)  # the real ones at the right
        places = order[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        known = (real & there).sum(-1, keepdim=True)
        self.count.sub_(real.shape[1])
        self.write(query.gather(2, places))
        self.floor.copy_(self.count - known)

    def crop(self, count: int) -> None:
        """Take back the last `count` tokens; the older ones that they had overwritten are lost."""
        self._make_writable()
        self.floor.copy_(torch.maximum(self.floor, self.count - self.size))
        self.count.sub_(count)

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to every tensor with a row per sequence."""
        self.queries, self.floor = change(self.queries), change(self.floor)

    def become(self, other: Ring) -> None:
        """Take over what another ring of the same shape holds, in place."""
        for name, tensor in vars(other).items():
            getattr(self, name).copy_(tensor)

    def _make_writable(self) -> None:
        """Replace tensors of a past inference mode, which only another one may write to."""
        for name, tensor in vars(self).items():
            if tensor.is_inference() and not torch.is_inference_mode_enabled():
                setattr(self, name, tensor.clone())
