"""RoCo (Ren and Zhu 2024): the mean attention of a key, and no key dropped whose attention varies most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from csp_ext._fields import check_int
from csp_ext.config import slots_of
from csp_ext.methods.base import Layer
from csp_ext.methods.ranked import Ranked, RankedSelection, keep_best

TILE = 128  # queries whose attention is in memory at a time


@dataclass(frozen=True)
class RoCo(Ranked):
    """Drop the keys with the smallest mean attention among those that may be dropped (METHODS B.3).

    The mean and the standard deviation of a key run over the queries that can see it. The defaults of
    `recent`, `sinks` and `protected` are those of the authors' EasyKV, which evicts while it reads the prompt
    and counts the recent tokens among the protected; here the whole prompt is read first, and they are apart.

    Attributes
    ----------
    sinks : int
        How many of a row's first tokens are always kept.
    protected : float or int
        r, how many keys are outside of the eviction scope for the standard deviation of their attention: a
        share of the budget in (0, 1], at least one key, or a number of keys. Sinks and protected keys are
        kept as far as the budget has room for them beside the recent ones.
    """

    recent: int | str = 10
    sinks: int = 4
    protected: float | int = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("sinks", self.sinks, 0)
        if not isinstance(self.protected, float):
            check_int("protected", self.protected, 0)
        elif not 0 < self.protected <= 1:
            raise ValueError(f"protected as a share must lie in (0, 1], got {self.protected}")

    def scores(self, layer: Layer, selection: RankedSelection) -> Tensor:
        mean, spread = attention_moments(layer)
        real = layer.modality >= 0
        from_start, from_end = real.cumsum(1), real.flip(1).cumsum(1).flip(1)
        sink = real & (from_start <= self.sinks)
        # A mean is at most 1: what is protected counts 2, a sink 3.
        scores = mean.masked_fill(sink[:, None], 3)
        most = self.protected
        if isinstance(most, float):
            most = slots_of(most, selection.budget)
        most = min(most, selection.budget - selection.recent - self.sinks)
        if most <= 0:
            return scores
        droppable = real & ~sink & (from_end > selection.recent)
        varied = keep_best(spread, layer.modality.masked_fill(~droppable, -1), budget=most, recent=0)
        # A free slot points behind the row.
        place = torch.where(varied >= 0, varied, scores.shape[-1]).long()
        return F.pad(scores, (0, 1)).scatter(-1, place, 2.0)[..., :-1]


def attention_moments(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of each key's attention over the queries that see it.

    An ordinary softmax, the mean over the query heads of a KV head; sums and sums of squares are gathered
    over tiles of queries, in float32 (float64 for float64 keys). Padding neither attends nor is attended to.

    Parameters
    ----------
    layer : Layer
        Its queries are the last Q of the prompt.

    Returns
    -------
    tuple
        Two tensors [B, Hkv, L]; 0 for a key that no query sees.
    """
    dtype = torch.promote_types(layer.key.dtype, torch.float32)
    rows, heads, length, width = layer.key.shape
    shown = layer.query.shape[2]
    query = layer.query.unflatten(1, (heads, -1))  # [B, Hkv, G, Q, D]
    key = layer.key.to(dtype).unsqueeze(2).mT  # [B, Hkv, 1, D, L]
    scale = width**-0.5 if layer.scale is None else layer.scale
    real = layer.modality >= 0
    position = torch.arange(length, device=real.device)
    total = layer.key.new_zeros(rows, heads, length, dtype=dtype)
    squares, count = torch.zeros_like(total), real.new_zeros(rows, length, dtype=dtype)
    for start in range(0, shown, TILE):
        asks = position[length - shown :][start : start + TILE]
        visible = real[:, asks, None] & real[:, None]  # [B, q, L]
        if layer.causal:
            visible = visible & (position <= asks[:, None])
        logits = query[:, :, :, start : start + TILE].to(dtype) @ key * scale
        logits = logits.masked_fill(~visible[:, None, None], -torch.inf)
        # A query that is padding sees nothing: its row would be 0 / 0.
        weight = logits.softmax(-1).mean(2).masked_fill(~visible[:, None], 0)
        total += weight.sum(2)
        squares += weight.square().sum(2)
        count += visible.sum(1)
    count = count.clamp_min(1)[:, None]
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0).sqrt()
