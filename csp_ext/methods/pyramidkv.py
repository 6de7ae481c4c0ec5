"""PyramidKV (Cai et al. 2024): SnapKV whose lower layers keep more than the upper ones (METHODS B.6)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from csp_ext.methods.base import Layer, Selection
from csp_ext.methods.ranked import RankedSelection, keep_best
from csp_ext.methods.snapkv import SnapKV

FLATTEST = 20  # the last layer keeps this fraction of the mean layer's tokens, the recent ones not counted


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Keep what SnapKV keeps, with budgets that fall linearly from the first layer to the last.

    `budget` is the mean over the layers.
    """

    def start(self, modality: Tensor, longest: int, left_padded: bool) -> Selection:
        return _Selection(self, *self.sizes(longest), self.watching(modality, longest), modality)

    @staticmethod
    def budgets(budget: int, recent: int, count: int, length: int) -> list[int]:
        """Return the slots of each of `count` layers for a row of `length` real tokens.

        Their sum is ``count * budget``; a row that fits into `budget` is kept whole everywhere.
        """
        if length <= budget:
            return [length] * count
        most = _most(budget, recent, length)
        least = 2 * (budget - recent) - most
        steps = max(1, count - 1)
        # Shares of a slot in units of 1 / steps; a single layer gets the mean.
        parts = [most * steps - index * (most - least) for index in range(count)]
        if count == 1:
            parts = [budget - recent]
        whole = [part // steps for part in parts]
        left = count * (budget - recent) - sum(whole)
        by_remainder = sorted(range(count), key=lambda index: -(parts[index] % steps))
        for index in by_remainder[:left]:
            whole[index] += 1
        return [recent + slots for slots in whole]


def _most(budget: int, recent: int, length: int) -> int:
    """Return what the first layer keeps beside the recent tokens."""
    base = budget - recent
    return min(2 * base - base // FLATTEST, length - recent)


class _Selection(RankedSelection):
    """Rows that end the pyramid at different heights have budgets of their own."""

    method: PyramidKV

    def __init__(
        self, method: PyramidKV, budget: int, recent: int, watching: Tensor, modality: Tensor
    ) -> None:
        super().__init__(method, budget, recent, watching)
        self.lengths: list[int] = (modality >= 0).sum(-1).tolist()
        self.exact = len({_most(budget, recent, length) for length in self.lengths}) == 1

    def select(self, layer: Layer) -> Tensor:
        scores = self.method.scores(layer, self)
        slots = [
            self.method.budgets(self.budget, self.recent, layer.count, length)[layer.index]
            for length in self.lengths
        ]
        kept = scores.new_full((*scores.shape[:2], max(slots)), -1, dtype=torch.int32)
        for size in sorted(set(slots) - {0}):
            rows = [row for row, own in enumerate(slots) if own == size]
            kept[rows, :, max(slots) - size :] = keep_best(
                scores[rows], layer.modality[rows], budget=size, recent=min(self.recent, size)
            )
        return kept
