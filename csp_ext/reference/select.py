"""Twin of ``select``: which keys of a row are kept."""

from __future__ import annotations

import torch

from csp_ext.reference.candidates import Candidates, candidates_of, validity
from csp_ext.reference.ranking import descending_order, ranks

COMBINE = ("intersection", "union", "calibrated")
POOL = ("none", "max", "past", "avg")
FAR = 2**62  # a key that no list ranks: after every other key


def select(
    self: torch.Tensor,
    cross: torch.Tensor,
    modality: torch.Tensor,
    query_modality: torch.Tensor,
    *,
    budget: int,
    recent: int | None = None,
    cross_ratio: float = 0.5,
    combine: str = "intersection",
    k_self: int | None = None,
    k_cross: int | None = None,
    pool: str = "none",
    pool_kernel: int = 7,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the keys that a row keeps.

    The last ``recent`` real keys are always kept; the other real keys are the candidates. With ``k_self``
    and ``k_cross`` the candidates in the literal masks of Eq. 2-3 are kept (an invalid key never is); without
    them exactly ``budget - recent``, by the rules of :func:`final_order`. A row that fits is kept whole: at
    most ``budget`` real tokens under the exact budget, fewer than ``budget`` under the literal masks
    (Algorithm 1: "if L_k < T return").

    Parameters
    ----------
    self, cross : Tensors [B, Hs, L]
    modality : Tensor [B, L], int8
        -1: padding, never kept.
    query_modality : Tensor [B, O], int8
        -1: this query does not observe. With ``causal`` it decides where a list is valid.
    budget : int
        T, slots per row, recent ones included.
    recent : int, optional
        R; default O.
    cross_ratio : float
        Share of the cross list, rounded to thousandths (halves to even).
    combine : {"intersection", "union", "calibrated"}
    k_self, k_cross : int, optional
        Both or neither; "calibrated" takes neither.
    pool, pool_kernel
        Smoothing of each list, see :func:`csp_ext.reference.candidates.pooled`.
    causal : bool

    Returns
    -------
    indices : Tensor [B, Hs, T], int32
        Ascending positions; free slots are -1 and stand at the left.
    lengths : Tensor [B, Hs], int32
    """
    recent = query_modality.shape[1] if recent is None else recent
    _check(budget, recent, cross_ratio, combine, k_self, k_cross, pool, pool_kernel)
    batch, heads, _ = self.shape
    literal = k_self is not None and k_cross is not None
    valid_self, valid_cross = validity(modality, query_modality, causal)
    indices = torch.full((batch, heads, budget), -1, dtype=torch.int32, device=self.device)
    lengths = torch.zeros((batch, heads), dtype=torch.int32, device=self.device)
    for b in range(batch):
        real = torch.nonzero(modality[b] >= 0).flatten()
        fits = real.numel() < budget if literal else real.numel() <= budget
        for h in range(heads):
            kept = real
            if not fits:
                row = candidates_of(
                    self[b, h],
                    cross[b, h],
                    modality[b],
                    valid_self[b],
                    valid_cross[b],
                    recent,
                    pool,
                    pool_kernel,
                )
                if k_self is not None and k_cross is not None:
                    chosen = literal_mask(row, k_self, k_cross, combine)
                else:
                    order = final_order(row, cross_ratio, combine)
                    chosen = torch.zeros_like(row.valid_self)
                    chosen[order[: budget - recent]] = True
                kept = torch.cat([row.position[chosen], real[row.position.numel() :]])
            count = kept.numel()
            indices[b, h, budget - count :] = kept.int()
            lengths[b, h] = count
    return indices, lengths


def literal_mask(row: Candidates, k_self: int, k_cross: int, combine: str) -> torch.Tensor:
    """The candidates [N] inside the two quotas, ranked with the tie rule of ``select`` (Eq. 2-3)."""
    rank_self = ranks(row.self, row.valid_self, row.tie)
    rank_cross = ranks(row.cross, row.valid_cross, row.tie)
    in_self = row.valid_self & (rank_self <= k_self)
    in_cross = row.valid_cross & (rank_cross <= k_cross)
    return in_self & in_cross if combine == "intersection" else in_self | in_cross


def final_order(row: Candidates, cross_ratio: float, combine: str) -> torch.Tensor:
    """Order the candidates of a row, best first; the exact budget keeps the first ``budget - recent``.

    With ranks r^s, r^c inside the valid candidates and p = round(1000 rho), "union" sorts by the smaller and
    "intersection" by the larger of ``p r^s`` and ``(1000 - p) r^c``; a list in which a key is not valid does
    not count. "calibrated" sorts by ``(1 - rho) S / sum(S) + rho C / sum(C)``. With p = 0 or 1000 every rule
    sorts by the one list and then, for keys not valid there, by the other. A key valid in no list comes last.
    Ties go to the higher unpooled self + cross, then to the later position.

    Returns
    -------
    Tensor [N], int64
        Indices into the candidates.
    """
    p = round(1000 * cross_ratio)
    neither = ~(row.valid_self | row.valid_cross)
    if combine == "calibrated" and 0 < p < 1000:
        key = (1000 - p) * _share(row.self, row.valid_self) + p * _share(row.cross, row.valid_cross)
        order = descending_order(key.masked_fill(neither, -torch.inf), row.tie)
        return order[torch.sort(neither[order], stable=True).indices]
    rank_self = ranks(row.self, row.valid_self, row.tie)
    rank_cross = ranks(row.cross, row.valid_cross, row.tie)
    small, large = combined_keys(rank_self, rank_cross, row, p)
    key = small if combine == "union" else large
    return descending_order(-key, row.tie)


def combined_keys(
    rank_self: torch.Tensor, rank_cross: torch.Tensor, row: Candidates, p: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The union and the intersection key of every candidate from its two ranks: int64 [N], small is good."""
    neither = ~(row.valid_self | row.valid_cross)
    if p in (0, 1000):
        first, first_valid, second = (
            (rank_self, row.valid_self, rank_cross) if p == 0 else (rank_cross, row.valid_cross, rank_self)
        )
        key = torch.where(first_valid, first, row.position.numel() + second).masked_fill(neither, FAR)
        return key, key
    own, other = p * rank_self, (1000 - p) * rank_cross
    small = torch.minimum(own.masked_fill(~row.valid_self, FAR), other.masked_fill(~row.valid_cross, FAR))
    large = torch.maximum(own.masked_fill(~row.valid_self, 0), other.masked_fill(~row.valid_cross, 0))
    return small, large.masked_fill(neither, FAR)


def _share(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Each valid value over the sum of the valid ones that are numbers; zeros where it is not positive."""
    values = values.masked_fill(~valid, 0)
    total = values.nansum()
    share = values / total if total > 0 else torch.zeros_like(values)
    # an infinite score stays one, though its share of an infinite sum is not a number
    return torch.where(values.isfinite(), share, values)


def _check(
    budget: int,
    recent: int,
    cross_ratio: float,
    combine: str,
    k_self: int | None,
    k_cross: int | None,
    pool: str,
    pool_kernel: int,
) -> None:
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")
    if not 0 <= recent <= budget:
        raise ValueError(f"recent must lie in [0, budget = {budget}], got {recent}")
    if not 0 <= cross_ratio <= 1:
        raise ValueError(f"cross_ratio must lie in [0, 1], got {cross_ratio}")
    if combine not in COMBINE:
        raise ValueError(f"combine must be one of {COMBINE}, got {combine!r}")
    if pool not in POOL:
        raise ValueError(f"pool must be one of {POOL}, got {pool!r}")
    if pool_kernel < 1 or pool_kernel % 2 == 0:
        raise ValueError(f"pool_kernel must be odd and at least 1, got {pool_kernel}")
    if (k_self is None) != (k_cross is None):
        raise ValueError(f"k_self and k_cross go together, got {k_self} and {k_cross}")
    if k_self is None or k_cross is None:
        return
    if combine == "calibrated":
        raise ValueError('combine="calibrated" takes no k_self and k_cross')
    most = k_self + k_cross if combine == "union" else min(k_self, k_cross)
    if min(k_self, k_cross) < 0 or recent + most > budget:
        raise ValueError(
            f"k_self = {k_self}, k_cross = {k_cross}, recent = {recent} exceed budget = {budget}"
        )
