"""Twin of ``decode``: attention of new queries over a compacted cache."""

from __future__ import annotations

import math

import torch


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    start: torch.Tensor | None = None,
    end: torch.Tensor | None = None,
    *,
    n: float = 1.0,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """n-softmax attention of the last Q tokens over the slots ``start <= s < end`` of a cache.

    The last Q of those slots belong to the queries themselves: query i sees slots below ``end - Q + 1 + i``.

    Parameters
    ----------
    query : Tensor [B, Hq, Q, D]
    key, value : Tensors [B, Hkv, C, D]
    start : Tensor [B] or [B, Hkv], int32, optional
        First slot of a row; default 0.
    end : 0-dim int32 Tensor, optional
        One past the last slot; default C.
    n : float
        n-softmax constant (Eq. 7).
    scale : float, optional
        Default ``D ** -0.5``.

    Returns
    -------
    out : Tensor [B, Hq, Q, D], float64
        Zero for a query that sees no slot.
    lse : Tensor [B, Hq, Q], float64
        Natural logsumexp without n; ``-inf`` for a query that sees no slot.
    """
    batch, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, capacity = key.shape[1], key.shape[2]
    group = num_heads // max(num_kv_heads, 1)
    scale = head_dim**-0.5 if scale is None else scale
    stop = capacity if end is None else int(end)
    first = torch.zeros(batch, num_kv_heads, dtype=torch.int64, device=key.device)
    if start is not None:
        first = first + (start if start.dim() == 2 else start[:, None]).long()
    first = first.repeat_interleave(group, dim=1)  # [B, Hq]

    slot = torch.arange(capacity, device=key.device)
    limit = stop - num_queries + 1 + torch.arange(num_queries, device=key.device)
    seen = (slot >= first[:, :, None, None]) & (slot < limit[:, None])  # [B, Hq, Q, C]
    logits = torch.matmul(
        query.double() * scale, key.double().repeat_interleave(group, dim=1).transpose(-1, -2)
    )
    logits = torch.where(seen, logits, -math.inf)
    lse = torch.logsumexp(logits, dim=-1)
    blind = lse == -math.inf
    log_n = math.log(n) if n > 0 else -math.inf
    safe_lse = torch.where(blind, torch.zeros_like(lse), lse)
    weights = torch.exp(logits - safe_lse[..., None]) * torch.sigmoid(safe_lse - log_n)[..., None]
    values = value.double().repeat_interleave(group, dim=1)
    out = weights.new_zeros((batch, num_heads, num_queries, head_dim))
    for i in range(num_queries):
        # a slot that a query does not see may hold anything, also nan
        visible = torch.where(seen[:, :, i, :, None], values, 0.0)
        out[:, :, i] = torch.matmul(weights[:, :, None, i], visible)[:, :, 0]
    return out, lse
