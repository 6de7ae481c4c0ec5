"""H2O (Zhang et al. 2023) as CSP's release runs it: once, after the prompt (METHODS B.2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from csp_ext.methods.base import Layer
from csp_ext.methods.ranked import Ranked, RankedSelection


@dataclass(frozen=True)
class H2O(Ranked):
    """Keep the keys that all queries of the prompt attended to most, and the most recent."""

    def scores(self, layer: Layer, selection: RankedSelection) -> Tensor:
        return selection.attention(layer)
