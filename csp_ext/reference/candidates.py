"""The candidates of one row and head: positions, smoothed lists, validity."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from csp_ext.reference.visibility import visible_keys


@dataclass
class Candidates:
    """What ``select`` ranks: the real keys of a row that are not among its recent ones, in position order.

    All tensors are [N], N the number of candidates.
    """

    position: torch.Tensor  # int64, ascending
    self: torch.Tensor  # float64, pooled
    cross: torch.Tensor  # float64, pooled
    tie: torch.Tensor  # float64, unpooled self + cross
    valid_self: torch.Tensor  # bool
    valid_cross: torch.Tensor  # bool


def validity(
    modality: torch.Tensor, query_modality: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Say per key whether an observing query of its own and of another modality can see it.

    Decided by the modalities alone, never by a score: a weight that underflows to zero is still there.

    Parameters
    ----------
    modality : Tensor [B, L], int8
    query_modality : Tensor [B, O], int8
    causal : bool

    Returns
    -------
    (valid_self, valid_cross) : Tensors [B, L], bool
    """
    queries = query_modality[:, :, None]  # [B, O, 1]
    observed = visible_keys(modality, query_modality.shape[1], causal) & (queries >= 0)
    same = queries == modality[:, None, :]
    return (observed & same).any(dim=1), (observed & ~same).any(dim=1)


def candidates_of(
    self_row: torch.Tensor,
    cross_row: torch.Tensor,
    modality_row: torch.Tensor,
    valid_self_row: torch.Tensor,
    valid_cross_row: torch.Tensor,
    recent: int,
    pool: str,
    pool_kernel: int,
) -> Candidates:
    """Gather the candidates of one row of [L] tensors and smooth its lists.

    The last ``recent`` real keys are not candidates.
    """
    real = torch.nonzero(modality_row >= 0).flatten()
    position = real[: max(real.numel() - recent, 0)]
    own, other = self_row.double()[position], cross_row.double()[position]
    runs = modality_row[position]
    return Candidates(
        position=position,
        self=pooled(own, runs, pool, pool_kernel),
        cross=pooled(other, runs, pool, pool_kernel),
        tie=own + other,
        valid_self=valid_self_row[position],
        valid_cross=valid_cross_row[position],
    )


def pooled(values: torch.Tensor, modality: torch.Tensor, pool: str, pool_kernel: int) -> torch.Tensor:
    """Smooth the scores of a row's candidates inside runs of equal modality.

    The candidates form one sequence in position order. Neighbours are counted in that sequence, so padding
    between two of them changes nothing and a padded row equals the row alone. A run is a maximal stretch of
    it with one modality. Element j becomes the maximum, or the mean over the elements present, of the at most
    ``pool_kernel`` candidates within ``pool_kernel // 2`` steps of j that stand in j's run; with "past" the
    maximum of those of them that do not come after j. The maximum passes over a NaN where it can.

    Parameters
    ----------
    values, modality : Tensors [N]
        Scores and modalities of the candidates.
    pool : {"none", "max", "past", "avg"}
    pool_kernel : int
        Odd.

    Returns
    -------
    Tensor [N]
    """
    if pool == "none" or values.numel() == 0:
        return values
    count = values.numel()
    changes = torch.zeros(count, dtype=torch.int64, device=values.device)
    changes[1:] = modality[1:] != modality[:-1]
    run = changes.cumsum(0)
    before = pool_kernel // 2
    after = 0 if pool == "past" else before
    index = torch.arange(count, device=values.device)
    neighbour = index[:, None] + torch.arange(-before, after + 1, device=values.device)  # [N, window]
    inside = (neighbour >= 0) & (neighbour < count)
    neighbour = neighbour.clamp(0, count - 1)
    inside &= run[neighbour] == run[:, None]
    window = values[neighbour]
    if pool == "avg":
        return window.masked_fill(~inside, 0).sum(dim=1) / inside.sum(dim=1)
    nan = window.isnan()
    largest = window.masked_fill(~inside | nan, -torch.inf).amax(dim=1)
    return largest.masked_fill((nan | ~inside).all(dim=1), torch.nan)
