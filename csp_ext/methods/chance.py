"""A random choice: what every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from csp_ext._fields import check_int
from csp_ext.methods.base import Layer
from csp_ext.methods.ranked import Ranked, RankedSelection


@dataclass(frozen=True)
class Random(Ranked):
    """Keep random tokens, others in every head, and the most recent.

    Attributes
    ----------
    seed : int
        The same seed keeps the same positions of prompts of the same shape.
    """

    recent: int | str = 8
    window: int | str = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("seed", self.seed, 0)

    def scores(self, layer: Layer, selection: RankedSelection) -> Tensor:
        rows, heads, length, _ = layer.key.shape
        generator = torch.Generator().manual_seed(self.seed * 1009 + layer.index)
        return torch.rand(rows, heads, length, generator=generator).to(layer.key.device)
