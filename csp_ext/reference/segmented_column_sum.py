"""Twin of ``segmented_column_sum`` (paper Eq. 1)."""

from __future__ import annotations

import torch


def segmented_column_sum(
    attn: torch.Tensor, query_modality: torch.Tensor, key_modality: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum each column of an attention matrix over the queries of its own and of the other modalities (Eq. 1).

    Parameters
    ----------
    attn : Tensor [B, H, O, N]
        Attention weights of O queries over N keys.
    query_modality : Tensor [B, O], int8
        A negative id: this query does not observe.
    key_modality : Tensor [B, N], int8
        A negative id: padding, whose sums are zero.

    Returns
    -------
    (self, cross) : Tensors [B, H, N], float64
    """
    queries = query_modality[:, :, None]  # [B, O, 1]
    keys = key_modality[:, None, :]  # [B, 1, N]
    counts = (queries >= 0) & (keys >= 0)  # [B, O, N]
    same = counts & (queries == keys)
    other = counts & (queries != keys)
    weights = attn.double()
    zero = weights.new_zeros(())
    # where, not a product: a weight that does not count must not leak through as nan
    self_sum = torch.where(same[:, None], weights, zero).sum(dim=2)
    cross_sum = torch.where(other[:, None], weights, zero).sum(dim=2)
    return self_sum, cross_sum
