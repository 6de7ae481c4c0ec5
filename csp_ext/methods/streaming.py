"""StreamingLLM (Xiao et al. 2023): attention sinks at the front, and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from csp_ext._fields import check_int
from csp_ext.methods.base import Layer
from csp_ext.methods.ranked import Ranked, RankedSelection


@dataclass(frozen=True)
class Streaming(Ranked):
    """Keep the first `sinks` tokens of a row and its last; positions stay the true ones.

    Attributes
    ----------
    sinks : int
        As far as the budget has room for them.
    """

    recent: int | str = 0
    window: int | str = 1
    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("sinks", self.sinks, 0)

    def scores(self, layer: Layer, selection: RankedSelection) -> Tensor:
        real = layer.modality >= 0
        first = real & (real.cumsum(-1) <= self.sinks)
        # Equal scores go to the later position.
        return first.to(torch.float32)[:, None]
