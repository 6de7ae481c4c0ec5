"""Putting dropped tokens into the kept ones that they resemble (LOOK-M; METHODS B.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MERGES = ("none", "average", "weighted", "pivotal")
TILE = 128  # positions whose similarities to all slots are in memory at a time


def dropped(real: Tensor, slots: Tensor) -> Tensor:
    """Return which real positions [B, L] stand in none of the slots [B, H, S]: bool [B, H, L]."""
    rows, heads, _ = slots.shape
    length = real.shape[1]
    # A free slot points behind the row.
    place = torch.where(slots >= 0, slots, length).long()
    left = F.pad(real, (0, 1))[:, None].expand(rows, heads, -1)
    return left.scatter(-1, place, False)[..., :length]


def nearest(key: Tensor, kept_key: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine similarity of every position to the kept key most like it, and that key's slot.

    Parameters
    ----------
    key : Tensor
        [B, H, L, D], rotated.
    kept_key : Tensor
        [B, H, S, D], what the slots hold.
    slots : Tensor
        int32 [B, H, S], -1: never the answer.

    Returns
    -------
    tuple
        ([B, H, L] float32 or float64, -inf where every slot is free; [B, H, L] int64).
    """
    dtype = torch.promote_types(key.dtype, torch.float32)
    directions = F.normalize(kept_key.to(dtype), dim=-1).mT
    free = (slots < 0)[:, :, None]
    best = []
    for start in range(0, key.shape[2], TILE):
        tile = F.normalize(key[:, :, start : start + TILE].to(dtype), dim=-1)
        best.append((tile @ directions).masked_fill(free, -torch.inf).max(-1))
    return torch.cat([tile.values for tile in best], -1), torch.cat([tile.indices for tile in best], -1)


def resembling(similarity: Tensor, gone: Tensor) -> Tensor:
    """Return which ranks [B, L] merge: their mean similarity over the heads is at least the row's mean.

    Parameters
    ----------
    similarity : Tensor
        [B, H, L], of each position.
    gone : Tensor
        bool [B, H, L], the dropped positions, equally many in every head. The r-th of a head has rank r, and
        the r-th of the heads may be different tokens.
    """
    ranked = by_rank(similarity.masked_fill(~gone, 0), gone).mean(1)
    count = gone[:, 0].sum(-1, keepdim=True)
    threshold = ranked.sum(-1, keepdim=True) / count.clamp_min(1)
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    return (ranked >= threshold) & (rank < count)


def by_rank(of_position: Tensor, gone: Tensor) -> Tensor:
    """Move what belongs to the dropped positions [B, H, L] to the front, in order; zeros behind."""
    place = torch.where(gone, ranks(gone), gone.shape[-1])
    return F.pad(torch.zeros_like(of_position), (0, 1)).scatter(-1, place, of_position)[..., :-1]


def ranks(gone: Tensor) -> Tensor:
    """Return how many dropped positions stand before each position, int64 [B, H, L]."""
    return gone.cumsum(-1) - gone.long()


def shifted(target: Tensor, gone: Tensor, merging: Tensor) -> tuple[Tensor, Tensor]:
    """Return targets and participation as LOOK-M's released averaging has them.

    It adds the r-th of all dropped tokens to the target of the r-th merging one.

    Parameters
    ----------
    target : Tensor
        [B, H, L] int64.
    gone : Tensor
        bool [B, H, L].
    merging : Tensor
        bool [B, L], by rank.

    Returns
    -------
    tuple
        ([B, H, L] int64, bool [B, H, L]).
    """
    order = merging.logical_not().to(torch.uint8).sort(dim=-1, stable=True).indices
    moved = by_rank(target, gone).gather(-1, order[:, None].expand_as(target))
    rank = ranks(gone)
    return moved.gather(-1, rank), gone & (rank < merging.sum(-1)[:, None, None])


def merged(kept: Tensor, tokens: Tensor, target: Tensor, weight: Tensor, own: float) -> Tensor:
    """Return the kept tokens with others merged in.

    With the n_c tokens e whose target is c: ``(x_c (1 + own n_c) + sum weight_e x_e) / (1 + n_c)``.

    Parameters
    ----------
    kept : Tensor
        [B, H, S, D].
    tokens : Tensor
        [B, H, L, D], the whole prompt.
    target : Tensor
        [B, H, L] int64; -1: this token is not merged.
    weight : Tensor
        [B, H, L] float32 or float64.
    own : float
        What a kept token adds of itself for every token it takes in.
    """
    total = kept.to(weight.dtype)
    count = total.new_zeros(total.shape[:-1])
    slot = torch.arange(kept.shape[2], device=kept.device)[:, None]
    added = torch.zeros_like(total)
    for start in range(0, tokens.shape[2], TILE):
        tile = slice(start, start + TILE)
        # A matrix product adds in the same order every time; scattering does not on a GPU.
        chosen = (target[:, :, None, tile] == slot).to(weight.dtype)  # [B, H, S, tile]
        count += chosen.sum(-1)
        # What padding holds may be NaN.
        others = tokens[:, :, tile].to(weight.dtype).masked_fill(target[:, :, tile, None] < 0, 0)
        added += (chosen * weight[:, :, None, tile]) @ others
    count = count[..., None]
    return ((total * (1 + own * count) + added) / (1 + count)).to(kept.dtype)
