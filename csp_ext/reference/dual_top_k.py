"""Twin of ``dual_top_k`` (paper Eq. 2-3)."""

from __future__ import annotations

import torch

from csp_ext.reference.ranking import ranks


def dual_top_k(
    self: torch.Tensor,
    cross: torch.Tensor,
    k_self: int,
    k_cross: int,
    combine: str = "intersection",
    valid_self: torch.Tensor | None = None,
    valid_cross: torch.Tensor | None = None,
) -> torch.Tensor:
    """The literal masks of Eq. 2, combined as Eq. 3 or by union.

    Ties go to the later position. Each K is clamped to the number of valid keys, and an invalid key is never
    selected by that list; without the masks every key is valid, so zero scores can be selected.

    Parameters
    ----------
    self, cross : Tensors [..., N]
        Scores of the two lists.
    k_self, k_cross : int
        Sizes of the two lists.
    combine : {"intersection", "union"}
    valid_self, valid_cross : Tensors broadcastable to [..., N], bool, optional

    Returns
    -------
    Tensor [..., N], bool
    """
    if combine not in ("intersection", "union"):
        raise ValueError(f'combine must be "intersection" or "union", got {combine!r}')
    mask_self = _top_k(self, k_self, valid_self)
    mask_cross = _top_k(cross, k_cross, valid_cross)
    return mask_self & mask_cross if combine == "intersection" else mask_self | mask_cross


def _top_k(scores: torch.Tensor, k: int, valid: torch.Tensor | None) -> torch.Tensor:
    everywhere = torch.ones_like(scores, dtype=torch.bool)
    valid = everywhere if valid is None else valid.expand_as(scores)
    mask = torch.zeros_like(everywhere)
    for row in _rows(scores.shape[:-1]):
        rank = ranks(scores[row].double(), valid[row])
        mask[row] = (rank >= 1) & (rank <= k)
    return mask


def _rows(shape: torch.Size) -> list[tuple[int, ...]]:
    rows: list[tuple[int, ...]] = [()]
    for size in shape:
        rows = [(*row, i) for row in rows for i in range(size)]
    return rows
