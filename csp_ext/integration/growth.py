"""Pruning again while the answer grows: what a pruned cache has to remember for it, and the prune."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from csp_ext.integration.front import Decoding
from csp_ext.integration.modality import PADDING
from csp_ext.integration.ring import Ring
from csp_ext.methods.base import Layer, Renewal

if TYPE_CHECKING:
    from csp_ext.integration.cache import PrunedLayer


@dataclass
class Growth:
    """What one layer remembers between two prunes, beside the ring of its last queries.

    Attributes
    ----------
    renewal : Renewal
        How to prune again, the same for every layer.
    kinds : Tensor
        int8 [B, Hs, S], the modality in every slot that the last prune left, the sink left out; -1: free.
    dropped : Tensor
        bool [B, Hs], which rows and heads have dropped a token.
    run : int
        How many of the last slots hold the last tokens without a gap.
    padded : bool
        Whether padding may stand among those, or among the tokens behind them.
    decoding : Decoding
        How new tokens attend.
    scale, causal
        Of the model's attention.
    later : Tensor or None
        int8 [B, <= after], the modality of the tokens behind those slots; those not in it are text.
    """

    renewal: Renewal
    kinds: Tensor
    dropped: Tensor
    run: int
    padded: bool
    decoding: Decoding
    scale: float | None
    causal: bool
    later: Tensor | None = None

    @classmethod
    def after(
        cls, prompt: Layer, indices: Tensor | None, renewal: Renewal, decoding: Decoding, left_padded: bool
    ) -> tuple[Growth, Ring]:
        """Return what is to be remembered of a prompt's prune, and the ring of its last queries.

        Parameters
        ----------
        prompt : Layer
            The whole prompt.
        indices : Tensor or None
            int32 [B, Hs, T], what was kept; None: all of it.
        renewal, decoding
            As in the attributes.
        left_padded : bool
            Whether all padding stands at the left.
        """
        kinds = prompt.modality[:, None]
        dropped = torch.zeros_like(kinds[..., 0], dtype=torch.bool)
        run, padded = kinds.shape[-1], not left_padded
        # Without a prune the padding stays where it is, among the keys and among the queries.
        aligned = left_padded or indices is None
        if indices is not None:
            real = (kinds >= 0).sum(-1)
            kinds = _kinds_at(kinds, indices)
            dropped, run, padded = (kinds >= 0).sum(-1) < real, renewal.recent, False
        growth = cls(renewal, kinds, dropped, run, padded, decoding, prompt.scale, prompt.causal)
        return growth, _ring_of(prompt, renewal.window, aligned)

    @property
    def limit(self) -> int:
        """Most physical slots: T + m, and the sink."""
        return self.renewal.budget + self.renewal.interval + self.decoding.sink

    def note(self, kinds: Tensor, after: int) -> None:
        """Take down the modality of the next tokens, int8 [B, q]; `after` more came since the last prune."""
        kinds = kinds.to(self.kinds.device)
        self.later = torch.cat([self._known(after), kinds], dim=1)

    def crop(self, tokens: int) -> None:
        """Forget all but the first `tokens` stored ones."""
        self.kinds, self.run = self.kinds[..., :tokens], min(self.run, tokens)
        if self.later is not None:
            self.later = self.later[:, : tokens - self.kinds.shape[-1]]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to every tensor with a row per sequence."""
        self.kinds, self.dropped = change(self.kinds), change(self.dropped)
        self.later = None if self.later is None else change(self.later)

    @torch.no_grad()
    def prune(self, layer: PrunedLayer, written: int, index: int, count: int) -> None:
        """Bring a layer back to its budget, by what its last queries attend to.

        Parameters
        ----------
        layer : PrunedLayer
            Holds more tokens than the budget.
        written : int
            Its slots in use.
        index, count : int
            Which of the prunable layers it is, and how many there are.
        """
        assert layer.front is not None
        assert layer.front.ring is not None
        ring, skip = layer.front.ring, layer.sink()
        key, value = (tensor[:, :, skip:written] for tensor in (layer.keys, layer.values))
        rows, heads = key.shape[:2]
        after = key.shape[2] - self.kinds.shape[-1]
        kinds = self._with_later(after)
        watched = min(ring.size, self.run + after)
        query, there = ring.last(watched)
        flat = kinds.shape[1] > 1
        if flat:
            # The heads hold different tokens: to the method each is a row of its own.
            query = query.unflatten(1, (heads, -1)).flatten(0, 1)
            key, value = (tensor.flatten(0, 1)[:, None] for tensor in (key, value))
            there = there.repeat_interleave(heads, dim=0)
        view = Layer(
            query=query.to(key.dtype),
            key=key,
            value=value,
            modality=kinds.flatten(0, 1),
            index=index,
            count=count,
            scale=self.scale,
            causal=self.causal,
        )
        indices = self.renewal.select(view, there)
        indices = indices.reshape(rows, -1, indices.shape[-1])
        kept = indices >= 0
        self.dropped = self.dropped | (kept.sum(-1) < (kinds >= 0).sum(-1))
        self.kinds = _kinds_at(kinds, indices)
        if self.padded:  # the heads agree on the last tokens
            ring.close_gaps(kinds[:, 0, kinds.shape[-1] - watched :] >= 0)
        self.run, self.padded, self.later = self.renewal.recent, False, None
        front = self.decoding.front(kept, self.dropped)
        front.ring = ring
        places = torch.where(kept, indices + skip, PADDING)
        layer.renew(F.pad(places, (self.decoding.sink, 0), value=PADDING), front, written)

    def _with_later(self, after: int) -> Tensor:
        """Return the modality of every stored token, int8 [B, Hs, S + after]."""
        later = self._known(after)[:, None].expand(-1, self.kinds.shape[1], -1)
        return torch.cat([self.kinds, later], dim=-1)

    def _known(self, after: int) -> Tensor:
        """Return the modality of the first tokens behind the last prune, int8 [B, after]."""
        later = self.kinds.new_zeros(self.kinds.shape[0], 0) if self.later is None else self.later[:, :after]
        return F.pad(later, (0, after - later.shape[1]))


def _kinds_at(kinds: Tensor, indices: Tensor) -> Tensor:
    """Return the modality [B, Hs, T] of the kept tokens, from [B, 1 or Hs, S]."""
    chosen = kinds.expand(-1, indices.shape[1], -1).gather(-1, indices.clamp_min(0).long())
    return chosen.masked_fill_(indices < 0, PADDING)


def _ring_of(prompt: Layer, size: int, aligned: bool) -> Ring:
    """Begin a ring with the queries of each row's last tokens, as far as they are at hand.

    `aligned`: these are the last ones, or the padding among them counts.
    """
    query = prompt.query
    hidden = prompt.key.shape[2] - query.shape[2]
    device = query.device
    if aligned:
        known = min(size, query.shape[2])
        queries = F.pad(query[:, :, query.shape[2] - known :], (0, 0, size - known, 0))
        return Ring(queries.clone(), torch.full((len(query), 1), known, device=device))
    positions = torch.arange(prompt.modality.shape[1], device=device)
    last = torch.where(prompt.modality >= 0, positions, PADDING).sort(-1).values
    last = F.pad(last, (max(0, size - last.shape[1]), 0), value=PADDING)[:, -size:]
    # A free slot observes nothing, so it does not matter what stands in its place.
    there = ((last >= hidden) | (last < 0)).flip(1).cumprod(1).sum(1, keepdim=True)
    places = (last - hidden).clamp_min(0)[:, None, :, None]
    return Ring(query.gather(2, places.expand(-1, query.shape[1], -1, query.shape[3])), there)


def make_room(layers: Sequence[PrunedLayer], new: int, written: int | None = None) -> bool:
    """Prune the layers of a cache back to their budget where `new` more tokens would exceed T + m.

    Parameters
    ----------
    layers : sequence of PrunedLayer
        All that may be pruned.
    new : int
        Tokens to come.
    written : int, optional
        Slots in use, where the caller knows; a static cache reads the device for it, once more to prune.

    Returns
    -------
    bool
        Whether they were pruned.
    """
    growth = layers[0].growth
    if growth is None:
        return False
    tokens = (layers[0].written() if written is None else written) - layers[0].sink()
    budget = growth.renewal.budget
    if tokens <= budget or tokens + new <= budget + growth.renewal.interval:
        return False
    written = layers[0].written()
    for index, layer in enumerate(layers):
        assert layer.growth is not None
        layer.growth.prune(layer, written, index, len(layers))
    return True
