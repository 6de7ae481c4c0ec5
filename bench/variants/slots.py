"""A slot beside the kept keys that stands for those that were dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from csp_ext.integration.cache import PrunedLayer, pruned_layers
from csp_ext.integration.front import Front, visibility_bias
from csp_ext.integration.recording import Recording
from csp_ext.integration.stats import PruneStats

OBSERVING = 8
KINDS = ("one", "calibrated", "residual")


def with_slot(recording: Recording, cache: DynamicCache, stats: PruneStats, kind: str) -> DynamicCache:
    """Return a pruned cache with one slot more, in front.

    Parameters
    ----------
    recording : Recording
        Of prompts without padding.
    cache, stats
        What it was pruned to.
    kind : {"one", "calibrated", "residual"}
        "one": an all-zero key and value of logit 0, the n-softmax with n = 1. "calibrated": its logit is, for
        each head, what the last 8 queries gave to the dropped keys: the mean of the logarithm. "residual":
        also, its value is the mean of the dropped values, weighted by that attention.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    layers = []
    for whole, pruned, kept in zip(*map(pruned_layers, (recording.cache, cache)), stats.layers, strict=True):
        layer = PrunedLayer.adopt(pruned)
        rows, heads, _, size = layer.keys.shape
        mass, value = dropped(whole, kept.indices)
        if kind == "one":
            mass = torch.zeros_like(mass)
        zeros = layer.keys.new_zeros(rows, heads, 1, size)
        layer.keys = torch.cat([zeros, layer.keys], 2)
        layer.values = torch.cat([value[:, :, None] if kind == "residual" else zeros, layer.values], 2)
        layer.settled = True
        visible = torch.nn.functional.pad(kept.indices >= 0, (1, 0), value=True)
        bias = visibility_bias(visible, 0.0, mass.shape[1], mass.dtype).expand(-1, mass.shape[1], -1, -1)
        bias = torch.cat([mass[..., None, None], bias[..., 1:]], -1)
        layer.front = Front(kept.indices.shape[-1] + 1, bias=bias)
        layers.append(layer)
    copy: Any = DynamicCache()
    copy.layers = layers
    copy.layer_class_to_replicate = None
    return copy


def dropped(layer: PrunedLayer, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a prune of a recorded layer took away from its last queries.

    Parameters
    ----------
    layer : PrunedLayer
        Whole, with its queries.
    kept : Tensor
        int32 [B, 1 or Hkv, T], -1 free.

    Returns
    -------
    mass : Tensor
        [B, Hq], the mean of the logarithm of the dropped keys' sum of exponentials.
    value : Tensor
        [B, Hkv, D], the mean of the dropped values under the attention to them.
    """
    assert layer.queries is not None
    rows, heads, length, size = layer.keys.shape
    query = layer.queries[:, :, -OBSERVING:].reshape(rows, heads, -1, OBSERVING, size)
    scale = size**-0.5 if layer.scale is None else layer.scale
    logits = query @ layer.keys[:, :, None].transpose(3, 4) * scale  # [B, Hkv, G, O, L]
    gone = torch.ones(rows, heads, length + 1, dtype=torch.bool)
    # A free slot points behind the last key.
    where = torch.where(kept >= 0, kept, length).long().expand(-1, heads, -1)
    gone = gone.scatter_(2, where, False)[:, :, None, None, :length]
    seen = torch.arange(length) <= torch.arange(length - OBSERVING, length)[:, None]
    logits = logits.masked_fill(~(gone & seen), -torch.inf)
    total = logits.logsumexp(-1, keepdim=True)
    weights = (logits - total).exp().mean((2, 3))  # [B, Hkv, L]
    return total.mean((3, 4)).flatten(1), (weights[:, :, None] @ layer.values)[:, :, 0]
