"""The attention weights of the observation window, self and cross, counted on a logarithmic scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from csp_ext.config import slots_of
from csp_ext.integration.cache import PrunedLayer, pruned_layers
from csp_ext.integration.recording import Recording
from csp_ext.selection import QUESTION_MOST, observing

# Bins of the decimal logarithm of a weight; what is smaller falls into the first.
LOWEST, BINS_PER_DECADE = -16, 10
BINS = -LOWEST * BINS_PER_DECADE
SELF, CROSS = 0, 1
# Query positions whose logits are held at a time.
TILE = 32


def window_size(window: float | int | str, length: int) -> int | str:
    """Return the observation window for a prompt of `length` tokens, a share of it as a number of tokens."""
    return window if isinstance(window, str) else slots_of(window, length)


def queries_needed(window: float | int | str, length: int) -> int:
    """Return how many of a prompt's last queries a recording must keep, padding at the left."""
    size = window_size(window, length)
    return min(length, QUESTION_MOST if isinstance(size, str) else size)


@torch.no_grad()
def weight_counts(recording: Recording, window: float | int | str) -> Tensor:
    """Count the attention weights of a recorded prompt by size.

    A weight belongs to a query of the window and a key that it sees, under the ordinary softmax over all keys
    that it sees. It is a self weight if both are of one modality, a cross weight otherwise. The weights of
    a few queries are held at a time, never those of the whole prompt.

    Parameters
    ----------
    recording : Recording
        With at least the queries of the window.
    window : float, int or "question"
        Which queries: the last tokens of a row, as a share of the longest prompt or a number, or the text
        after its last image.

    Returns
    -------
    Tensor
        int64 [layers, Hq, 2, BINS] on the CPU; self and cross; bin i holds the decimal logarithms from
        ``LOWEST + i / BINS_PER_DECADE``.

    Raises
    ------
    ValueError
        If the recording lacks queries of the window.
    """
    modality = recording.modality
    watching = observing(modality, window_size(window, int((modality >= 0).sum(-1).amax())))
    positions = watching.any(0).nonzero()[:, 0]
    layers = [_layer_counts(layer, modality, watching, positions) for layer in pruned_layers(recording.cache)]
    return torch.stack(layers)


def _layer_counts(layer: PrunedLayer, modality: Tensor, watching: Tensor, positions: Tensor) -> Tensor:
    """Return int64 [Hq, 2, BINS]; `watching` is bool [B, L], `positions` int64 [O], where any row watches."""
    queries, keys = layer.queries, layer.keys
    assert queries is not None
    heads, length, groups = queries.shape[1], keys.shape[2], queries.shape[1] // keys.shape[1]
    first = length - queries.shape[2]
    if len(positions) and int(positions[0]) < first:
        raise ValueError(
            f"the window begins at position {int(positions[0])}, the recording has queries from {first} on"
        )
    scale = keys.shape[-1] ** -0.5 if layer.scale is None else layer.scale
    modality, watching = modality.to(keys.device), watching.to(keys.device)
    keys = keys.float().transpose(-1, -2)[:, :, None]  # [B, Hkv, 1, D, L]
    counts = torch.zeros(heads * 2 * BINS + 1, dtype=torch.int64, device=keys.device)
    every_key = torch.arange(length, device=keys.device)
    head = torch.arange(heads, device=keys.device).view(-1, 1, 1)
    for tile in positions.to(keys.device).split(TILE):
        query = queries[:, :, tile - first].float().unflatten(1, (-1, groups))  # [B, Hkv, G, tile, D]
        logits = (query @ keys).flatten(1, 2) * scale  # [B, Hq, tile, L]
        seen = (modality >= 0)[:, None] & watching[:, tile, None]
        if layer.causal:
            seen = seen & (every_key <= tile[:, None])
        logits = logits.masked_fill(~seen[:, None], -math.inf)
        log10 = (logits - logits.logsumexp(-1, keepdim=True)) / math.log(10)
        bins = ((log10 - LOWEST) * BINS_PER_DECADE).nan_to_num(0.0).clamp(0, BINS - 1).long()
        cross = (modality[:, tile, None] != modality[:, None]).long()[:, None]
        # Pairs that do not see each other go into a place of their own, at the end.
        slot = ((head * 2 + cross) * BINS + bins).masked_fill(~seen[:, None], heads * 2 * BINS)
        counts += torch.bincount(slot.flatten(), minlength=len(counts))
    return counts[:-1].view(heads, 2, BINS).cpu()


def mean_weights(counts: Tensor) -> Tensor:
    """Return the mean weight of each histogram [..., BINS] by its bins' middles; NaN where it is empty."""
    middle = LOWEST + (torch.arange(BINS) + 0.5) / BINS_PER_DECADE
    return (counts * 10.0**middle).sum(-1) / counts.sum(-1)
