"""Ways to smooth scores that ``CSPConfig.pool`` does not have: without runs, and over images as grids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from csp_ext.evaluation.render import CELLS, GRID

# Takes the candidates' scores [B, H, N], at least 0, and their modality [B, N].
Smoothing = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Past:
    """The highest score of a key and the `before` keys before it.

    Attributes
    ----------
    before : int
        Keys looked back at.
    within_run : bool
        Only as far as the modality stays the same, as the package does.
    """

    before: int = 3
    within_run: bool = True

    def __call__(self, scores: Tensor, modality: Tensor) -> Tensor:
        offsets = torch.arange(-self.before, 1)
        run, _ = _runs(modality)
        other = run[:, _neighbours(offsets, run.shape[1])[0]]  # [B, N, K]
        allowed = other == run[..., None] if self.within_run else torch.ones_like(other, dtype=torch.bool)
        return _highest(scores, offsets, allowed)


@dataclass(frozen=True)
class Grid:
    """Images: the highest score of the cells around a key. Text: as :class:`Past`.

    Attributes
    ----------
    rows, columns : tuple of int
        First and last offset, 0 between them.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]

    def __call__(self, scores: Tensor, modality: Tensor) -> Tensor:
        (top, bottom), (left, right) = self.rows, self.columns
        down = torch.arange(top, bottom + 1).repeat_interleave(right - left + 1)
        along = torch.arange(left, right + 1).repeat(bottom - top + 1)
        cell = _runs(modality)[1] % CELLS
        row, column = cell[..., None] // GRID + down, cell[..., None] % GRID + along
        allowed = (row >= 0) & (row < GRID) & (column >= 0) & (column < GRID)
        around = _highest(scores, down * GRID + along, allowed)
        return torch.where(modality[:, None] > 0, around, Past()(scores, modality))


@dataclass(frozen=True)
class WholeImage:
    """As :class:`Past`, and every token of an image moves towards the image's highest score.

    Attributes
    ----------
    weight : float
        How far: 0 not at all, 1 all of the way.
    """

    weight: float

    def __call__(self, scores: Tensor, modality: Tensor) -> Tensor:
        smooth = Past()(scores, modality)
        offsets = torch.arange(1 - CELLS, CELLS)
        cell = _runs(modality)[1][..., None] % CELLS + offsets
        best = _highest(smooth, offsets, (cell >= 0) & (cell < CELLS))
        shared = (1 - self.weight) * smooth + self.weight * best
        return torch.where(modality[:, None] > 0, shared, smooth)


def _runs(modality: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of each position's modality run, and its place in the run, int64 [B, N] each."""
    starts = torch.ones_like(modality, dtype=torch.bool)
    starts[:, 1:] = modality[:, 1:] != modality[:, :-1]
    position = torch.arange(modality.shape[1]).expand_as(modality)
    first = torch.where(starts, position, 0).cummax(1).values
    return starts.cumsum(1), position - first


def _neighbours(offsets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return positions [N, K], moved inside where they are outside, and whether they were inside."""
    where = torch.arange(count)[:, None] + offsets
    return where.clamp(0, count - 1), (where >= 0) & (where < count)


def _highest(scores: Tensor, offsets: Tensor, allowed: Tensor) -> Tensor:
    """Return the highest of the scores [B, H, N] at the allowed [B, N, K] offsets [K], 0 among them."""
    where, inside = _neighbours(offsets, scores.shape[-1])
    return scores[..., where].masked_fill(~(inside & allowed)[:, None], 0).amax(-1)
