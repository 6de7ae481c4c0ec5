"""Twin of ``prune_``: ``prune``, and its results over the first T slots."""

from __future__ import annotations

from typing import Any

import torch

from csp_ext.reference.prune import prune


def prune_(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    modality: torch.Tensor,
    *,
    budget: int,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prune the cache of one layer in place; the options are those of ``prune``.

    Parameters
    ----------
    key, value : Tensors [B, Hkv, L, D]
        Changed in place; slots from T on stay as they are.
    budget : int
        T in [1, L].

    Returns
    -------
    indices : Tensor [B, Hs, T], int32
    lengths : Tensor [B, Hs], int32
    """
    if budget > key.shape[2]:
        raise ValueError(f"budget must be at most key's L = {key.shape[2]} in place, got {budget}")
    new_key, new_value, indices, lengths = prune(query, key, value, modality, budget=budget, **options)
    key[:, :, :budget], value[:, :, :budget] = new_key, new_value
    return indices, lengths
