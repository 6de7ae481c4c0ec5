"""What attention must know of a pruned prompt at the front of a cache, and how to attend behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from csp_ext.integration.ring import Ring
from csp_ext.ops.decode import decode

MAX_QUERIES = 8  # of one call of decode
MAX_DIM = 512  # of a head, likewise


@dataclass
class Front:
    """The slots of a pruned prompt: which of them a row sees, and with which softmax.

    Either `bias` says it (any stock kernel, the n-softmax by a sink in slot 0), or `start` and `n` do
    (``decode``).

    Attributes
    ----------
    slots : int
        Physical slots of the prompt, the sink included.
    bias : Tensor or None
        Additive [B, 1 or Hq, 1, slots]; None: every slot is plainly visible.
    start : Tensor or None
        int32 [B, Hkv], the first visible slot.
    n : float
        n-softmax constant beside `start`.
    log_n : Tensor or None
        [B, Hq, 1], log n where rows or heads differ (-inf: nothing was dropped); None: n holds for all.
    end : Tensor or None
        0-dim int32, one past the last written slot of a buffer; None: the cache has no free slots.
    clean : bool
        Whether every token after the prompt is seen by all that follow it.
    ring : Ring or None
        Takes the queries of new tokens, where the cache is pruned again while it grows.
    alike : bool
        Whether the rows fill these slots as they fill those of every other layer that has as many.
    forward : object or None
        Which forward this is, the same object in all layers: they share its mask.
    """

    slots: int
    bias: Tensor | None = None
    start: Tensor | None = None
    n: float = 0.0
    log_n: Tensor | None = None
    end: Tensor | None = None
    clean: bool = True
    ring: Ring | None = None
    alike: bool = False
    forward: object = None

    @property
    def hides(self) -> bool:
        """Whether a stock attention mask would show slots of the prompt that must not be seen."""
        return self.bias is not None or self.start is not None

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to every tensor with a row per sequence."""
        self.bias = None if self.bias is None else change(self.bias)
        self.start = None if self.start is None else change(self.start)
        self.log_n = None if self.log_n is None else change(self.log_n)
        if self.ring is not None:
            self.ring.each(change)

    def takes(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Say whether ``decode`` can attend for these queries."""
        return (
            self.start is not None
            and self.clean
            and query.shape[-2] <= MAX_QUERIES
            and query.dtype == key.dtype == value.dtype
            and key.shape[-1] == value.shape[-1] <= MAX_DIM
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attend for new queries [B, Hq, q, D] with ``decode``; returns [B, q, Hq, D]."""
        n = self.n if self.log_n is None else 0.0
        output, lse = decode(query, key, value, self.start, self.end, n=n, scale=scale)
        if self.log_n is not None:
            output = (output * torch.sigmoid(lse - self.log_n)[..., None]).to(output.dtype)
        return output.transpose(1, 2).contiguous()

    def with_sink(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tensors for a stock kernel: where `n` stands for the sink, a copy with one."""
        if self.start is None or self.n == 0:
            return key, value
        return tuple(torch.nn.functional.pad(tensor, (0, 0, 1, 0)) for tensor in (key, value))  # type: ignore[return-value]

    def mask(self, stock: Tensor | None, query: Tensor, stored: int) -> Tensor | None:
        """Return the mask of new queries [B, Hq, q, D] over a pruned prompt and what follows it.

        `stock` is the model's mask of these queries: its last columns belong to the tokens after the prompt.
        None means causal, and that nothing is hidden from a single query. `stored` counts the cache's slots,
        without what :meth:`with_sink` adds.
        """
        shared = self.alike and self.hides and self.forward is not None and stock is not None
        if not shared or torch.compiler.is_compiling():
            return self._mask(stock, query, stored)
        # The layers are given the same mask; making ours of it takes longer than a small attention.
        last = getattr(stock, "csp_mask", None)
        if last is None or last[0] is not self.forward or last[1] != stored:
            last = self.forward, stored, self._mask(stock, query, stored)
            stock.csp_mask = last  # type: ignore[union-attr]
        return last[2]

    def _mask(self, stock: Tensor | None, query: Tensor, stored: int) -> Tensor | None:
        length, recent = query.shape[-2], stored - self.slots
        whole = stock is None and length == 1 and self.end is None
        if not self.hides and (whole or (stock is not None and stock.shape[-1] == stored)):
            return stock
        if stock is None:
            after = self._causal(length, recent, query)
        else:
            after = stock[..., max(0, stock.shape[-1] - recent) :]
        if after.dtype == torch.bool:
            after = additive(after, query.dtype)
        if after.shape[-1] < recent:  # drafts behind a prompt: the model knows nothing of the free slots
            free = recent - after.shape[-1]
            after = torch.nn.functional.pad(after, (0, free), value=torch.finfo(after.dtype).min)
        front = self._bias(query)
        shape = (query.shape[0], max(front.shape[1], after.shape[1]), length)
        parts = (front, after.to(front.dtype))
        # Concatenating expanded tensors is slow.
        return torch.cat([p if p.shape[:3] == shape else p.expand(*shape, -1) for p in parts], dim=-1)

    def _causal(self, length: int, recent: int, query: Tensor) -> Tensor:
        if self.end is None:
            visible = torch.ones(length, recent, dtype=torch.bool, device=query.device)
            return visible.tril(recent - length)[None, None]
        slot = torch.arange(self.slots, self.slots + recent, device=query.device)
        own = torch.arange(length, device=query.device)[:, None] + self.end - length
        return (slot <= own)[None, None]

    def _bias(self, query: Tensor) -> Tensor:
        if self.bias is not None:
            return self.bias
        if self.start is None:
            return query.new_zeros(1, 1, 1, self.slots)
        visible = torch.arange(self.slots, device=query.device) >= self.start[..., None]
        if self.n == 0:
            return visibility_bias(visible, 0.0, query.shape[1], query.dtype)
        sink = torch.ones_like(visible[..., :1])
        if self.log_n is not None:
            group = query.shape[1] // visible.shape[1]
            sink = self.log_n[:, ::group] > -torch.inf
        return visibility_bias(torch.cat([sink, visible], dim=-1), self.n, query.shape[1], query.dtype)


@dataclass(frozen=True)
class Decoding:
    """How new tokens attend to what a prune left.

    Attributes
    ----------
    n : float
        n-softmax constant.
    own : bool
        Whether ``decode`` attends.
    plain : bool
        Whether the model's own mask has the padding of these slots right, and all rows and heads have dropped
        a token.
    alike : bool
        Whether the heads of a row always keep equally many tokens: one mask then does for all of them.
    heads : tuple of int
        Hq and Hkv.
    dtype : torch.dtype
        Of the queries.
    """

    n: float
    own: bool
    plain: bool
    alike: bool
    heads: tuple[int, int]
    dtype: torch.dtype

    @property
    def sink(self) -> int:
        """Slots in front of the tokens that stand for n in a stock kernel: an all-zero one, or none."""
        return int(self.n > 0 and not self.own)

    def front(self, kept: Tensor, dropped: Tensor) -> Front:
        """Return how the slots are seen.

        Parameters
        ----------
        kept : Tensor
            bool [B, Hs, T], the slots in use, the sink left out; the free ones stand at the left.
        dropped : Tensor
            bool [B, Hs], who has dropped a token: only they have an n-softmax.
        """
        if self.alike:
            kept, dropped = kept[:, :1], dropped[:, :1]
        count = kept.shape[-1]
        num_heads, num_kv_heads = self.heads
        if self.own:
            front = Front(count, n=self.n, alike=self.alike)
            front.start = (count - kept.sum(-1)).to(torch.int32).expand(-1, num_kv_heads).contiguous()
            if self.n > 0 and not self.plain:
                exact = torch.float64 if self.dtype == torch.float64 else torch.float32
                log_n = torch.full(dropped.shape, math.log(self.n), dtype=exact, device=dropped.device)
                log_n = log_n.masked_fill_(~dropped, -torch.inf).expand(-1, num_kv_heads)
                front.log_n = log_n.repeat_interleave(num_heads // num_kv_heads, dim=1)[..., None]
            return front
        visible = torch.cat([dropped[..., None], kept], dim=-1) if self.sink else kept
        front = Front(visible.shape[-1], alike=self.alike)
        if not (self.plain and self.n in (0, 1)):
            front.bias = visibility_bias(visible, self.n, num_heads, self.dtype)
        return front


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros where `visible`, the lowest number of `dtype` elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, torch.finfo(dtype).min
    )


def visibility_bias(visible: Tensor, n: float, num_heads: int, dtype: torch.dtype) -> Tensor:
    """Return the additive mask [B, 1 or Hq, 1, slots] of a pruned prompt.

    Parameters
    ----------
    visible : Tensor
        bool [B, Hs, slots]; for n > 0 slot 0 is the sink, an all-zero key and value.
    n : float
        n-softmax constant (Eq. 7): a logit of log n on the sink puts n into the denominator.
    num_heads : int
        Hq: per-head masks are repeated to the query heads.
    dtype : torch.dtype
        Of the attention logits.
    """
    bias = additive(visible, dtype)
    if n > 0:
        bias[..., 0] += math.log(n)
    if bias.shape[1] > 1:
        bias = bias.repeat_interleave(num_heads // bias.shape[1], dim=1)
    return bias[:, :, None]
