"""Twin of ``score`` (paper Eq. 1 and 7)."""

from __future__ import annotations

import math

import torch

from csp_ext.reference.segmented_column_sum import segmented_column_sum
from csp_ext.reference.visibility import visible_keys


def score(
    query: torch.Tensor,
    key: torch.Tensor,
    modality: torch.Tensor,
    *,
    query_modality: torch.Tensor | None = None,
    n: float = 1.0,
    scale: float | None = None,
    heads: str = "kv",
    causal: bool = True,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Self and cross scores of every key, summed over the observation window.

    The weight of key j for query i is ``softmax_ij * sigmoid(lse_i - log n)``, which is the n-softmax of
    Eq. 7; a row is normalised over all the keys it sees, whether or not they are kept later. The column sums
    are split by whether query and key share a modality (Eq. 1) and averaged over the query heads of a group.

    Parameters
    ----------
    query : Tensor [B, Hq, O, D]
        Post-RoPE queries of the last O positions.
    key : Tensor [B, Hkv, L, D]
        Post-RoPE keys; ``Hq`` is a multiple of ``Hkv``.
    modality : Tensor [B, L], int8
        -1: padding, never seen.
    query_modality : Tensor [B, O], int8, optional
        Default ``modality[:, -O:]``; -1: this query does not observe.
    n : float
        n-softmax constant.
    scale : float, optional
        Default ``D ** -0.5``.
    heads : {"kv", "shared"}
        Mean over the query heads of a KV head (Hs = Hkv) or over all query heads (Hs = 1).
    causal : bool
        Whether query i, at position L - O + i, sees only keys at or before it.
    lse : Tensor [B, Hq, O], optional
        Natural logsumexp of each row over its visible keys, without n; computed where absent.

    Returns
    -------
    (self, cross) : Tensors [B, Hs, L], float64
    """
    batch, num_heads, window, head_dim = query.shape
    num_kv_heads, length = key.shape[1], key.shape[2]
    if window > length:
        raise ValueError(f"query must hold at most L = {length} positions, got O = {window}")
    if query_modality is None:
        query_modality = modality[:, length - window :]
    group = num_heads // max(num_kv_heads, 1)
    scale = head_dim**-0.5 if scale is None else scale

    expanded = key.double().repeat_interleave(group, dim=1)  # [B, Hq, L, D]
    logits = torch.matmul(query.double() * scale, expanded.transpose(-1, -2))  # [B, Hq, O, L]
    seen = visible_keys(modality, window, causal)[:, None]
    logits = torch.where(seen, logits, -math.inf)
    row_lse = torch.logsumexp(logits, dim=-1) if lse is None else lse.double()
    log_n = math.log(n) if n > 0 else -math.inf
    # a row that sees nothing has lse = -inf and weighs nothing
    blind = row_lse == -math.inf
    safe_lse = torch.where(blind, torch.zeros_like(row_lse), row_lse)
    weights = torch.exp(logits - safe_lse[..., None]) * torch.sigmoid(safe_lse - log_n)[..., None]
    weights = torch.where(blind[..., None], torch.zeros_like(weights), weights)

    self_sum, cross_sum = segmented_column_sum(weights, query_modality, modality)  # [B, Hq, L]
    if heads == "shared":
        return self_sum.mean(dim=1, keepdim=True), cross_sum.mean(dim=1, keepdim=True)
    if heads != "kv":
        raise ValueError(f'heads must be "kv" or "shared", got {heads!r}')
    grouped = (batch, num_kv_heads, group, length)
    return self_sum.reshape(grouped).mean(dim=2), cross_sum.reshape(grouped).mean(dim=2)
