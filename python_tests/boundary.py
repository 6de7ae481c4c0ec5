"""Comparison of a selection with the twin's, aware of where rounding may decide.

A kept set jumps where two scores change order, so a plain comparison of indices is too strict or blind. Here
every comparison of two keys is "surely before", "surely after" or "too close to tell"; from these follow an
interval for each rank and for each key of the final order. A candidate whose interval decides must be kept or
dropped as the twin does it; only the others may flip.
"""

from __future__ import annotations

import torch

from csp_ext.reference.candidates import Candidates, candidates_of, validity
from csp_ext.reference.select import combined_keys, select

UNDERFLOW = 1e-36  # float32 may flush what is smaller to zero


def assert_select_close(
    indices: torch.Tensor,
    lengths: torch.Tensor,
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
    score_rtol: float = 0.0,
    arithmetic_rtol: float | None = None,
) -> None:
    """Assert that a result of ``select`` equals the twin's, up to proven near-ties.

    Parameters
    ----------
    indices : Tensor [B, Hs, T], int32
    lengths : Tensor [B, Hs], int32
        The result under test.
    self, cross : Tensors [B, Hs, L]
        The scores. Where the result under test was made from other, slightly different scores, say how far
        these are with ``score_rtol`` (relative to each score).
    score_rtol : float
        Relative uncertainty of each score; 0 where both sides got the same tensors.
    arithmetic_rtol : float, optional
        Relative error of what ``select`` computes from the scores: sums for ties, averages, shares. Default
        1e-5 for inputs below float64 (the sums are float32), 1e-12 for float64.

    Raises
    ------
    AssertionError
        Naming the row and the candidates that differ without being near a boundary.
    """
    recent = query_modality.shape[1] if recent is None else recent
    if arithmetic_rtol is None:
        arithmetic_rtol = 1e-12 if self.dtype == torch.float64 else 1e-5
    want, want_lengths = select(
        self, cross, modality, query_modality, budget=budget, recent=recent, cross_ratio=cross_ratio,
        combine=combine, k_self=k_self, k_cross=k_cross, pool=pool, pool_kernel=pool_kernel, causal=causal,
    )  # fmt: skip
    _assert_well_formed(indices, lengths, want, want_lengths, exact_lengths=k_self is None)
    valid_self, valid_cross = validity(modality, query_modality, causal)
    for b, h in torch.nonzero((indices != want).any(-1)).tolist():
        row = candidates_of(
            self[b, h], cross[b, h], modality[b], valid_self[b], valid_cross[b], recent, pool, pool_kernel
        )
        value_rtol = score_rtol + (arithmetic_rtol if pool == "avg" else 0.0)
        tie_rtol = score_rtol + arithmetic_rtol
        if k_self is not None and k_cross is not None:
            kept, dropped = _literal_certainty(row, k_self, k_cross, combine, value_rtol, tie_rtol)
        else:
            kept, dropped = _exact_certainty(
                row,
                budget - recent,
                round(1000 * cross_ratio),
                combine,
                value_rtol,
                tie_rtol,
                arithmetic_rtol,
            )
        # a candidate that is neither surely kept nor surely dropped may flip
        got = torch.zeros(modality.shape[1], dtype=torch.bool, device=indices.device)
        got[indices[b, h][indices[b, h] >= 0].long()] = True
        recents = torch.nonzero(modality[b] >= 0).flatten()[row.position.numel() :]
        must = torch.cat([row.position[kept], recents])
        must_not = torch.cat([row.position[dropped], torch.nonzero(modality[b] < 0).flatten()])
        missing, extra = must[~got[must]].tolist(), must_not[got[must_not]].tolist()
        where = f"row {b}, head {h}, outside the boundary band"
        _require(not missing, f"{where}: missing {missing[:8]}")
        _require(not extra, f"{where}: wrongly kept {extra[:8]}")


def _assert_well_formed(
    indices: torch.Tensor,
    lengths: torch.Tensor,
    want: torch.Tensor,
    want_lengths: torch.Tensor,
    exact_lengths: bool,
) -> None:
    _require(indices.dtype == torch.int32, f"indices are {indices.dtype}")
    _require(lengths.dtype == torch.int32, f"lengths are {lengths.dtype}")
    _require(indices.shape == want.shape, f"indices are {tuple(indices.shape)}, not {tuple(want.shape)}")
    _require(lengths.shape == want_lengths.shape, f"lengths are {tuple(lengths.shape)}")
    used = indices >= 0
    _require(torch.equal(used.sum(-1), lengths.long()), "lengths do not count the slots in use")
    _require(bool((used[..., :-1] <= used[..., 1:]).all()), "a free slot stands right of a used one")
    ascending = (indices[..., 1:] > indices[..., :-1]) | ~used[..., :-1]
    _require(bool(ascending.all()), "indices do not ascend")
    if exact_lengths:
        equal = torch.equal(lengths, want_lengths)
        _require(equal, f"lengths are {lengths.tolist()}, not {want_lengths.tolist()}")


def _require(condition: bool, message: str) -> None:
    # not an assert statement: it must also hold under python -O
    if not condition:
        raise AssertionError(message)


def _surely_less(a: torch.Tensor, b: torch.Tensor, rtol: float) -> torch.Tensor:
    """Pairwise [N, N]: a_i is below b_j by more than the uncertainty of both."""
    margin = rtol * (a.abs()[:, None] + b.abs()[None, :]) + (UNDERFLOW if rtol else 0.0)
    return b[None, :] - a[:, None] > margin


def _tie_surely_before(row: Candidates, tie_rtol: float) -> torch.Tensor:
    """Pairwise [N, N]: given equal keys, candidate i surely comes before candidate j."""
    later = row.position[:, None] > row.position[None, :]
    equal = row.tie[:, None] == row.tie[None, :]
    return _surely_less(row.tie, row.tie, tie_rtol).T | (equal & later)


def _rank_interval(
    values: torch.Tensor, valid: torch.Tensor, tie_before: torch.Tensor, value_rtol: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest possible 1-based rank of every candidate; meaningful where valid."""
    before = _surely_less(values, values, value_rtol).T
    if value_rtol == 0:
        before |= (values[:, None] == values[None, :]) & tie_before
    else:
        # equal by structure (both zero): no rounding separates them
        before |= (values[:, None] == 0) & (values[None, :] == 0) & tie_before
    low = 1 + (before & valid[:, None]).sum(0)
    high = valid.sum() - (before & valid[None, :]).sum(1)
    return low, high


def _literal_certainty(
    row: Candidates, k_self: int, k_cross: int, combine: str, value_rtol: float, tie_rtol: float
) -> tuple[torch.Tensor, torch.Tensor]:
    tie_before = _tie_surely_before(row, tie_rtol)
    masks = []
    for values, valid, k in ((row.self, row.valid_self, k_self), (row.cross, row.valid_cross, k_cross)):
        low, high = _rank_interval(values, valid, tie_before, value_rtol)
        masks.append((valid & (high <= k), ~valid | (low > k)))
    (in_self, out_self), (in_cross, out_cross) = masks
    if combine == "intersection":
        return in_self & in_cross, out_self | out_cross
    return in_self | in_cross, out_self & out_cross


def _exact_certainty(
    row: Candidates,
    k: int,
    p: int,
    combine: str,
    value_rtol: float,
    tie_rtol: float,
    arithmetic_rtol: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    tie_before = _tie_surely_before(row, tie_rtol)
    if combine == "calibrated" and 0 < p < 1000:
        before = _calibrated_before(row, p, tie_before, value_rtol + arithmetic_rtol)
    else:
        low_self, high_self = _rank_interval(row.self, row.valid_self, tie_before, value_rtol)
        low_cross, high_cross = _rank_interval(row.cross, row.valid_cross, tie_before, value_rtol)
        which = 0 if combine == "union" else 1
        low = combined_keys(low_self, low_cross, row, p)[which]
        high = combined_keys(high_self, high_cross, row, p)[which]
        fixed = low == high
        same = (low[:, None] == low[None, :]) & fixed[:, None] & fixed[None, :]
        before = (high[:, None] < low[None, :]) | (same & tie_before)
    others = ~torch.eye(row.position.numel(), dtype=torch.bool, device=before.device)
    surely_before = (before & others).sum(0)
    maybe_before = (~before.T & others).sum(0)
    return maybe_before < k, surely_before >= k


def _calibrated_before(row: Candidates, p: int, tie_before: torch.Tensor, rtol: float) -> torch.Tensor:
    own = row.self.masked_fill(~row.valid_self, 0)
    other = row.cross.masked_fill(~row.valid_cross, 0)
    key = torch.zeros_like(own)
    for weight, values in ((1000 - p, own), (p, other)):
        if values.sum() > 0:
            key += weight * values / values.sum()
    neither = ~(row.valid_self | row.valid_cross)
    # both terms structurally zero, or no list at all: equal whatever the rounding
    same = (own == 0) & (other == 0) & ~neither
    same_pair = (same[:, None] & same[None, :]) | (neither[:, None] & neither[None, :])
    ranked_first = neither[None, :] & ~neither[:, None]
    both = ~neither[:, None] & ~neither[None, :]
    return ranked_first | (both & _surely_less(key, key, rtol).T) | (same_pair & tie_before)
