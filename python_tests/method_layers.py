"""Layers of random tensors for tests of methods, and their attention in float64, one head at a time."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from csp_ext.methods import Layer
from csp_ext.methods.ranked import Ranked

# Per kind of padding two rows, each with its spans of padding.
PADDINGS: dict[str, list[list[tuple[int, int]]]] = {
    "none": [[], []],
    "left": [[], [(0, 9)]],
    "right": [[], [(110, 150)]],
    "inside": [[], [(0, 3), (40, 47), (145, 150)]],
}


def modality_of(padding: list[tuple[int, int]]) -> list[int]:
    """Return 150 tokens of text with two images and spans of padding."""
    row = [0] * 150
    row[10:35], row[50:70] = [1] * 25, [1] * 20
    for start, stop in padding:
        row[start:stop] = [-1] * (stop - start)
    return row


def make_layer(
    padding: str = "none",
    dtype: torch.dtype = torch.float32,
    shown: int = 150,
    causal: bool = True,
    scale: float | None = None,
) -> Layer:
    """Return a layer of random tensors with 4 query heads over 2 KV heads."""
    rows = [modality_of(spans) for spans in PADDINGS[padding]]
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, 150, 8)
    query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
    return Layer(
        (2 * query[:, :, 150 - shown :]).to(dtype),
        key[:, :2].to(dtype),
        value[:, :2].to(dtype),
        torch.tensor(rows, dtype=torch.int8),
        0,
        1,
        scale,
        causal,
    )


def selected(method: Ranked, layer: Layer) -> Tensor:
    longest = int((layer.modality >= 0).sum(-1).max())
    return method.start(layer.modality, longest, False).select(layer)


def head_attention(layer: Layer, row: int, head: int) -> tuple[Tensor, Tensor]:
    """Return the attention [Q, L] of a KV head, the mean of its group, and what each query sees."""
    length, shown = layer.key.shape[2], layer.query.shape[2]
    asks = torch.arange(length - shown, length)
    real = layer.modality[row] >= 0
    sees = real[asks][:, None] & real
    if layer.causal:
        sees &= torch.arange(length) <= asks[:, None]
    group = layer.query.shape[1] // layer.key.shape[1]
    scale = layer.key.shape[-1] ** -0.5 if layer.scale is None else layer.scale
    weights = []
    for query in layer.query[row, head * group : (head + 1) * group].double():
        logits = (query @ layer.key[row, head].double().T * scale).masked_fill(~sees, -torch.inf)
        weights.append(logits.softmax(-1).nan_to_num(0))
    return torch.stack(weights).mean(0), sees


def heads_of(layer: Layer) -> itertools.product:
    return itertools.product(range(layer.key.shape[0]), range(layer.key.shape[1]))
