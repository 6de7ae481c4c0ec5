"""Which keys a row keeps: the last real tokens and the best candidates, within a budget of slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csp_ext.ops._call import call, same_device


def select(
    self: Tensor,
    cross: Tensor,
    modality: Tensor,
    query_modality: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """Choose the keys that each row keeps.

    The last `recent` real tokens are kept; the other real tokens are candidates, ranked in two lists by
    `self` and by `cross`. A row of at most `budget` real tokens is kept whole (with `k_self` and `k_cross`:
    of fewer than `budget`).

    Parameters
    ----------
    self, cross : Tensor [B, Hs, L]
        fp32, fp16, bf16 or (CPU) fp64 scores, as from :func:`csp_ext.score`; any strides. NaN ranks last.
    modality : Tensor [B, L], int8
        0 text, 1 image, further ids; -1 padding, anywhere: never kept.
    query_modality : Tensor [B, O], int8
        Of the observation window; -1: this query does not observe. A key ranks in the self list where some
        observing query of its modality sees it, in the cross list where one of another modality does.
    budget : int
        T >= 1, slots per row, recent ones included; T > L leaves slots free.
    recent : int, optional
        R <= T; by default O.
    cross_ratio : float
        rho in [0, 1], rounded to thousandths: the share of the selected keys that the cross list chooses. At
        0 and 1 the one list alone ranks and the other fills up.
    combine : {"intersection", "union", "calibrated"}
        With the 1-based ranks r^s, r^c, "intersection" keeps the T - R smallest
        max(r^s / (1 - rho), r^c / rho), "union" the smallest min; "calibrated" the largest
        (1 - rho) S / sum(S) + rho C / sum(C). A list that a key is not valid in does not count.
    k_self, k_cross : int, optional
        Both or neither. Given, the literal top-k masks of Eq. 2 are combined; a row may hold fewer than T.
    pool : {"none", "max", "past", "avg"}
        Smooths each list over the candidates inside runs of equal modality before it is ranked: each score
        becomes the maximum or the mean within `pool_kernel // 2` candidates on both sides, with "past" the
        maximum of it and the `pool_kernel // 2` before it.
    pool_kernel : int
        Odd.
    causal : bool
        Whether window query i, at position L - O + i, sees only the keys up to there.

    Returns
    -------
    indices : Tensor [B, Hs, T], int32
        Ascending positions; free slots are -1 and stand at the left.
    lengths : Tensor [B, Hs], int32
        Slots in use.

    Raises
    ------
    ValueError
        Naming the argument that does not fit and its value.

    Notes
    -----
    Eq. 2-3 of CSP (arXiv 2412.04652) and their exact-budget forms. Equal ranks and equal scores go to the
    higher unpooled self + cross, then to the later position. Not differentiable.
    """
    return call(
        torch.ops.csp.select,
        self,
        cross,
        modality,
        query_modality,
        budget=budget,
        recent=recent,
        cross_ratio=cross_ratio,
        combine=combine,
        k_self=k_self,
        k_cross=k_cross,
        pool=pool,
        pool_kernel=pool_kernel,
        causal=causal,
    )


@torch.library.register_fake("csp::select")
def _fake(
    self: Tensor,
    cross: Tensor,
    modality: Tensor,
    query_modality: Tensor,
    *,
    budget: int,
    **_options: Any,
) -> tuple[Tensor, Tensor]:
    same_device("select", self=self, cross=cross, modality=modality, query_modality=query_modality)
    batch, heads, _ = self.shape
    indices = self.new_empty((batch, heads, budget), dtype=torch.int32)
    return indices, self.new_empty((batch, heads), dtype=torch.int32)
