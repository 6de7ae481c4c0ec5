"""Other budgets for other layers, the same in total."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from csp_ext.config import CSPConfig
from csp_ext.methods import CSP, Layer, Method, Selection


@dataclass(frozen=True)
class AcrossLayers(Method):
    """CSP with a budget of its own for each layer.

    Attributes
    ----------
    config : CSPConfig
        With the mean budget.
    weights : tuple of float
        One per layer, 1 in the mean: its part of the slots that are not recent ones.
    """

    config: CSPConfig
    weights: tuple[float, ...]

    def observes(self, length: int) -> int:
        return length

    def start(self, modality: Tensor, longest: int, left_padded: bool) -> Selection:
        return _Selection(self, modality, longest, left_padded)


class _Selection(Selection):
    exact = False  # no mask fits all layers

    def __init__(self, method: AcrossLayers, modality: Tensor, longest: int, left_padded: bool) -> None:
        sizes = method.config.resolve(longest)
        self.budget, self.prune_from, self.observes = sizes.budget, sizes.prune_from, modality.shape[1]
        self.layers = [
            CSP(method.config.replace(budget=sizes.recent + free)).start(modality, longest, left_padded)
            for free in split(sizes.budget - sizes.recent, method.weights)
        ]

    def select(self, layer: Layer) -> Tensor:
        if len(self.layers) != layer.count:
            raise ValueError(f"weights must be {layer.count}, one per layer, got {len(self.layers)}")
        return self.layers[layer.index].select(layer)


def split(free: int, weights: tuple[float, ...]) -> list[int]:
    """Return `free` times each weight as ints that keep the total."""
    sizes, total, given = [], 0.0, 0
    for weight in weights:
        total += weight * free
        sizes.append(round(total) - given)
        given += sizes[-1]
    return sizes
