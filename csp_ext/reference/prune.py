"""Twin of ``prune``: ``score``, ``select`` and ``compact`` in a row."""

from __future__ import annotations

import torch

from csp_ext.reference.compact import compact
from csp_ext.reference.score import score
from csp_ext.reference.select import select


def prune(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    modality: torch.Tensor,
    *,
    budget: int,
    recent: int | None = None,
    query_modality: torch.Tensor | None = None,
    n: float = 1.0,
    scale: float | None = None,
    heads: str = "kv",
    causal: bool = True,
    lse: torch.Tensor | None = None,
    cross_ratio: float = 0.5,
    combine: str = "intersection",
    k_self: int | None = None,
    k_cross: int | None = None,
    pool: str = "none",
    pool_kernel: int = 7,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prune the cache of one layer; the arguments are those of ``score`` and ``select``.

    Returns
    -------
    (key, value) : Tensors [B, Hkv, T, D]
        In the dtype of the inputs.
    indices : Tensor [B, Hs, T], int32
    lengths : Tensor [B, Hs], int32
    """
    if query_modality is None:
        query_modality = modality[:, modality.shape[1] - query.shape[2] :]
    self_score, cross_score = score(
        query,
        key,
        modality,
        query_modality=query_modality,
        n=n,
        scale=scale,
        heads=heads,
        causal=causal,
        lse=lse,
    )
    indices, lengths = select(
        self_score,
        cross_score,
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
    new_key, new_value = compact(key, value, indices)
    return new_key, new_value, indices, lengths
