"""prune_: score, select and compact_ in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csp_ext.ops._call import call
from csp_ext.ops._in_place import register_in_place
from csp_ext.ops.prune import fake_selection


def prune_(
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
) -> tuple[Tensor, Tensor]:
    """Prune the cache of one layer in place: :func:`score`, :func:`select` and :func:`compact_`, bit for bit.

    Afterwards ``key[:, :, :T]`` and ``value[:, :, :T]`` equal the results of :func:`csp_ext.prune`; the other
    slots stay as they are.

    Parameters
    ----------
    query : Tensor [B, Hq, O, D]
        The observation window: post-RoPE queries of the last O positions, O <= L. fp32, fp16, bf16 or
        (CPU) fp64.
    key : Tensor [B, Hkv, L, D]
        Post-RoPE keys in the dtype of `query`; unit stride in D and no two elements in one place. Changed in
        place.
    value : Tensor [B, Hkv, L, Dv]
        Same dtype; unit stride in Dv. Clear of `key` in memory, or beside it in a wider tensor, as
        ``wide[..., :D]`` and ``wide[..., D:]`` are. Changed in place.
    modality : Tensor [B, L], int8
        0 text, 1 image, further ids; -1 padding, anywhere: never attended, never kept.
    budget : int
        T in [1, L], slots per row, recent ones included.
    recent, query_modality, n, scale, heads, causal, lse, cross_ratio, combine, k_self, k_cross, pool, \
pool_kernel
        As in :func:`csp_ext.prune`.

    Returns
    -------
    indices : Tensor [B, Hs, T], int32
        Where the rows in the first T slots stood, ascending; free slots are -1 and stand at the left.
    lengths : Tensor [B, Hs], int32
        Slots in use.

    Raises
    ------
    ValueError
        Naming the argument that does not fit and its value; `key` and `value` then are as they were.

    Notes
    -----
    Algorithm 1 of CSP (arXiv 2412.04652) for one layer. Allocates `indices`, `lengths` and the scratch of
    :func:`csp_ext.prune`, nothing of the cache's size. Not differentiable: `key` and `value` must not require
    a gradient where gradients are recorded.
    """
    return call(
        torch.ops.csp.prune_,
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


@torch.library.register_fake("csp::prune_")
def _fake(
    query: Tensor, key: Tensor, value: Tensor, modality: Tensor, *, budget: int, **options: Any
) -> tuple[Tensor, Tensor]:
    return fake_selection("prune_", query, key, value, modality, budget=budget, **options)


register_in_place("prune_", instead="csp_ext.select and csp_ext.compact")
