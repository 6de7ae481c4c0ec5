"""SnapKV (Li et al. 2024): what the last queries attend to, smoothed over neighbours (METHODS B.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from csp_ext._fields import check_choice, check_int
from csp_ext.methods.base import Layer
from csp_ext.methods.ranked import Ranked, RankedSelection


@dataclass(frozen=True)
class SnapKV(Ranked):
    """Keep the keys that the observation window attended to most, and the most recent.

    The smoothing runs over all candidates, whatever their modality; a missing neighbour counts as 0.

    Attributes
    ----------
    pool : {"none", "max", "avg"}
        "avg" divides by the kernel's width everywhere, as the releases do.
    pool_kernel : int
        Odd width.
    """

    recent: int | str = 32
    window: int | str = 32
    pool: str = "avg"
    pool_kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pool", self.pool, ("none", "max", "avg"))
        check_int("pool_kernel", self.pool_kernel, 1)
        if self.pool_kernel % 2 == 0:
            raise ValueError(f"pool_kernel must be odd, got {self.pool_kernel}")

    def scores(self, layer: Layer, selection: RankedSelection) -> Tensor:
        return self.pooled(selection.attention(layer), layer.modality, selection.recent)

    def pooled(self, scores: Tensor, modality: Tensor, recent: int) -> Tensor:
        """Smooth [B, Hs, L] over the candidates: recent tokens and padding count as 0."""
        if self.pool == "none":
            return scores
        real = modality >= 0
        candidate = real & (real.flip(1).cumsum(1).flip(1) > recent)
        scores = scores * candidate[:, None]
        half = self.pool_kernel // 2
        if self.pool == "max":
            return F.max_pool1d(scores, self.pool_kernel, stride=1, padding=half)
        return F.avg_pool1d(scores, self.pool_kernel, stride=1, padding=half)
