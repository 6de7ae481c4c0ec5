"""Twin of ``compact`` (paper Eq. 4)."""

from __future__ import annotations

import torch


def compact(
    key: torch.Tensor, value: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the rows of a cache that ``indices`` names into new tensors (Eq. 4).

    Parameters
    ----------
    key, value : Tensors [B, Hkv, L, D]
    indices : Tensor [B, Hs, T], int32
        Hs is Hkv, or 1 for every head alike; -1 gives a row of zeros.

    Returns
    -------
    (key, value) : Tensors [B, Hkv, T, D]
        In the dtype of the inputs, bit-exact.
    """
    wanted = indices.long().expand(-1, key.shape[1], -1)  # [B, Hkv, T]
    free = (wanted < 0)[..., None]
    out = []
    for cache in (key, value):
        if cache.shape[2] == 0:
            out.append(cache.new_zeros((*wanted.shape, cache.shape[3])))
            continue
        rows = wanted.clamp_min(0)[..., None].expand(-1, -1, -1, cache.shape[3])
        out.append(torch.gather(cache, 2, rows).masked_fill(free, 0))
    return out[0], out[1]
