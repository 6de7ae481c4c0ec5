"""Twin of ``compact_`` (paper Eq. 4, in place)."""

from __future__ import annotations

import torch

from csp_ext.reference.compact import compact


def compact_(key: torch.Tensor, value: torch.Tensor, indices: torch.Tensor) -> None:
    """Write the rows of a cache that ``indices`` names over its first T slots (Eq. 4).

    Parameters
    ----------
    key, value : Tensors [B, Hkv, L, D]
        Changed in place; slots from T on stay as they are.
    indices : Tensor [B, Hs, T], int32
        T <= L; Hs is Hkv, or 1 for every head alike; -1 gives a row of zeros.
    """
    budget = indices.shape[2]
    if budget > key.shape[2]:
        raise ValueError(f"indices must name at most key's L = {key.shape[2]} rows, got T = {budget}")
    for cache, rows in zip((key, value), compact(key, value, indices), strict=True):
        cache[:, :, :budget] = rows
