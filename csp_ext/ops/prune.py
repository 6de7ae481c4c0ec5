"""prune: score, select and compact in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csp_ext.ops._call import call, same_device


def prune(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    modality: Tensor,
    *,
    budget: int,
    recent: int | None = None,
    query_modality: Tensor | None = None,
    n: float = 1.0,
    scale: float | None = None,
    heads: str = "kv",
    causal: bool = True,
    lse: Tensor | None = None,
    cross_ratio: float = 0.5,
    combine: str = "intersection",
    k_self: int | None = None,
    k_cross: int | None = None,
    pool: str = "none",
    pool_kernel: int = 7,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prune the cache of one layer: :func:`score`, :func:`select` and :func:`compact`, bit for bit.

    Parameters
    ----------
    query : Tensor [B, Hq, O, D]
        The observation window: post-RoPE queries of the last O positions, O <= L. fp32, fp16, bf16 or
        (CPU) fp64.
    key : Tensor [B, Hkv, L, D]
        Post-RoPE keys in the dtype of `query`; unit stride in D.
    value : Tensor [B, Hkv, L, Dv]
        Same dtype; unit stride in Dv.
    modality : Tensor [B, L], int8
        0 text, 1 image, further ids; -1 padding, anywhere: never attended, never kept.
    budget : int
        T >= 1, slots per row, recent ones included; T > L leaves slots free.
    recent : int, optional
        R <= T: the last R real tokens are kept; by default O.
    query_modality : Tensor [B, O], int8, optional
        Default ``modality[:, -O:]``; -1: this query does not observe.
    n, scale, heads, causal, lse
        As in :func:`csp_ext.score`.
    cross_ratio, combine, k_self, k_cross, pool, pool_kernel
        As in :func:`csp_ext.select`.

    Returns
    -------
    key : Tensor [B, Hkv, T, D]
    value : Tensor [B, Hkv, T, Dv]
        The kept rows, in the dtype of the inputs; zeros in free slots.
    indices : Tensor [B, Hs, T], int32
        Their positions, ascending; free slots are -1 and stand at the left.
    lengths : Tensor [B, Hs], int32
        Slots in use.

    Raises
    ------
    ValueError
        Naming the argument that does not fit and its value.

    Notes
    -----
    Algorithm 1 of CSP (arXiv 2412.04652) for one layer. Not differentiable.
    """
    return call(
        torch.ops.csp.prune,
        query,
        key,
        value,
        modality,
        budget=budget,
        recent=recent,
        query_modality=query_modality,
        n=n,
        scale=scale,
        heads=heads,
        causal=causal,
        lse=lse,
        cross_ratio=cross_ratio,
        combine=combine,
        k_self=k_self,
        k_cross=k_cross,
        pool=pool,
        pool_kernel=pool_kernel,
    )


def fake_selection(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    modality: Tensor,
    *,
    budget: int,
    query_modality: Tensor | None = None,
    heads: str = "kv",
    lse: Tensor | None = None,
    **_options: Any,
) -> tuple[Tensor, Tensor]:
    """Return the empty indices and lengths of ``prune`` and ``prune_``."""
    same_device(
        op,
        query=query,
        key=key,
        modality=modality,
        query_modality=query_modality,
        lse=lse,
        value=value,
    )
    score_heads = 1 if heads == "shared" else key.shape[1]
    return (
        key.new_empty((key.shape[0], score_heads, budget), dtype=torch.int32),
        key.new_empty((key.shape[0], score_heads), dtype=torch.int32),
    )


@torch.library.register_fake("csp::prune")
def _fake(
    query: Tensor, key: Tensor, value: Tensor, modality: Tensor, *, budget: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    selected = fake_selection("prune", query, key, value, modality, budget=budget, **options)
    batch, num_kv_heads = key.shape[0], key.shape[1]
    return (
        key.new_empty((batch, num_kv_heads, budget, key.shape[3])),
        value.new_empty((batch, num_kv_heads, budget, value.shape[3])),
        *selected,
    )
