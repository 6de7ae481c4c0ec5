"""Which key a window query can see: the one rule behind ``score`` and the validity of ``select``."""

from __future__ import annotations

import torch


def visible_keys(modality: torch.Tensor, num_queries: int, causal: bool) -> torch.Tensor:
    """Say which keys the last ``num_queries`` positions see.

    Window query i stands at position ``L - O + i``; it sees the real keys at or before that position, or
    every real key where ``causal`` is false.

    Parameters
    ----------
    modality : Tensor [B, L], int8
    num_queries : int
        O, the size of the observation window.
    causal : bool

    Returns
    -------
    Tensor [B, O, L], bool
    """
    length = modality.shape[1]
    real = (modality >= 0)[:, None, :].expand(-1, num_queries, -1)
    if not causal:
        return real
    key_position = torch.arange(length, device=modality.device)
    query_position = torch.arange(num_queries, device=modality.device) + (length - num_queries)
    return real & (key_position[None, :] <= query_position[:, None])
