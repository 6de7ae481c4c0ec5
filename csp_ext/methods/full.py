"""The full cache: nothing is dropped."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from csp_ext.config import slots_of
from csp_ext.methods.base import Layer, Method, Selection


@dataclass(frozen=True)
class Full(Method):
    """Keep everything; its `budget` is there so that every method can be made alike."""

    budget: float | int = 1.0

    def __post_init__(self) -> None:
        slots_of(self.budget, 1)

    def observes(self, length: int) -> int:
        return 1

    def start(self, modality: Tensor, longest: int, left_padded: bool) -> Selection:
        return _Everything(longest)


class _Everything(Selection):
    exact, observes = True, 1

    def __init__(self, longest: int) -> None:
        self.budget, self.prune_from = longest, longest + 1

    def select(self, layer: Layer) -> Tensor:
        raise AssertionError("a prompt that loses nothing has nothing to select")
