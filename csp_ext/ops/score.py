"""score: self and cross attention mass of every key, seen from the observation window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csp_ext.ops._call import accumulate_dtype, call, same_device


def score(
    query: Tensor,
    key: Tensor,
    modality: Tensor,
    *,
    query_modality: Tensor | None = None,
    n: float = 1.0,
    scale: float | None = None,
    heads: str = "kv",
    causal: bool = True,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum the window's n-softmax attention over its queries, split by modality.

    The attention matrix is never whole in memory: a thread holds at most 16 of its rows.

    Parameters
    ----------
    query : Tensor [B, Hq, O, D]
        The observation window: post-RoPE queries of the last O positions, O <= L. fp32, fp16, bf16 or
        (CPU) fp64, unit stride in D.
    key : Tensor [B, Hkv, L, D]
        Post-RoPE keys, same dtype, unit stride in D; Hq is a multiple of Hkv.
    modality : Tensor [B, L], int8
        0 text, 1 image, ...; negative: padding, never seen, and its key is never looked at.
    query_modality : Tensor [B, O], int8, optional
        Default ``modality[:, -O:]``; negative: this query does not observe.
    n : float
        n-softmax constant; 0 is the ordinary softmax.
    scale : float, optional
        Factor of the logits, default ``D ** -0.5``.
    heads : {"kv", "shared"}
        Mean over the query heads of each KV head (Hs = Hkv), or over all query heads (Hs = 1).
    causal : bool
        Whether window query i, at position L - O + i, sees only keys at or before it.
    lse : Tensor [B, Hq, O], optional
        Natural logsumexp of each row over the keys it sees, without n, in the dtype of the result; spares
        the pass that finds it. A row with -inf contributes nothing.

    Returns
    -------
    (self, cross) : Tensors [B, Hs, L]
        Attention from queries of the key's modality, and from those of other modalities. fp32; fp64 for
        fp64 inputs.

    Raises
    ------
    ValueError
        If a shape, dtype, stride or device does not fit, O > L, Hq is no multiple of Hkv, `n` is negative,
        `n` or `scale` is not finite, or `heads` is unknown.

    Notes
    -----
    Eq. 1 and 7 of CSP (arXiv 2412.04652): P = softmax * sigmoid(lse - log n). Not differentiable.
    """
    return call(
        torch.ops.csp.score,
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


@torch.library.register_fake("csp::score")
def _fake(
    query: Tensor,
    key: Tensor,
    modality: Tensor,
    *,
    query_modality: Tensor | None = None,
    heads: str = "kv",
    lse: Tensor | None = None,
    **_options: Any,
) -> tuple[Tensor, Tensor]:
    same_device("score", query=query, key=key, modality=modality, query_modality=query_modality, lse=lse)
    rows = 1 if heads == "shared" else key.shape[1]
    shape = (query.shape[0], rows, key.shape[2])
    dtype = accumulate_dtype(query.dtype)
    return query.new_empty(shape, dtype=dtype), query.new_empty(shape, dtype=dtype)
