"""Tokens behind a complete prompt: whether they fit, what hides them, and of what modality they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from csp_ext.integration.cache import PrunedLayer
from csp_ext.integration.modality import PADDING
from csp_ext.integration.static import StaticPrunedLayer


def check_turn(layers: list[PrunedLayer], fresh: Tensor | None, mask: Any) -> None:
    """Check that new tokens fit into a static cache, and whether a mask hides any of them from ``decode``.

    Parameters
    ----------
    layers : list
        Of a cache whose prompt is complete.
    fresh : Tensor or None
        What is to be appended, ids [B, q] or embeddings [B, q, hidden].
    mask : Tensor or dict or None
        Of the model's forward.
    """
    first = layers[0]
    if fresh is None or first.front is None:
        return
    queries = fresh.shape[1]
    if isinstance(first, StaticPrunedLayer) and queries > first.free():
        instead = "make it with a larger max_new_tokens"
        if first.growth is not None:
            instead = "with decode_interval it is never larger; use a dynamic cache, or give fewer at a time"
        raise ValueError(
            f"the static cache has room for {first.free()} more tokens, got {queries}; {instead}"
        )
    if not first.own or mask is None or not first.front.clean:
        return
    after = first.after()
    before = int(first.get_seq_length()) - after
    columns = first.columns if isinstance(first, StaticPrunedLayer) else after + queries
    clean = clean_turn(mask, queries, before, after + queries, columns)
    for layer in layers:
        if layer.front is not None:
            layer.front.clean = clean


def refuse_old_mask(layer: PrunedLayer, mask: Any) -> None:
    """Raise where a mask over the slots of a static cache was made before a prune that moved them."""
    mask = _of_full_attention(mask)
    if isinstance(layer, StaticPrunedLayer) and isinstance(mask, Tensor) and mask.ndim == 4:
        raise ValueError(
            "the static cache was full and has been pruned again, which moved its slots; make the 4-D "
            "attention_mask anew, or call cache.make_room() before you make one"
        )


def note_turn(layers: list[PrunedLayer], kinds: Tensor, mask: Any, seen: int) -> None:
    """Have layers that are pruned again remember of what modality new tokens are; reads the device.

    Parameters
    ----------
    layers : list
        Of a cache that grows.
    kinds : Tensor
        int8 [B, q].
    mask : Tensor or dict or None
        Of the model's forward: 2-D over all tokens seen, or 4-D over the slots. What it hides is padding.
    seen : int
        Tokens before these.
    """
    first = layers[0]
    assert first.growth is not None
    written = first.written()
    mask = _of_full_attention(mask)
    hidden = None
    if isinstance(mask, Tensor):
        shown = mask if mask.ndim == 2 else mask[:, 0, -1]
        last = shown.shape[1] - kinds.shape[1]  # where a cache without free slots holds them
        begin = seen if mask.ndim == 2 else written if isinstance(first, StaticPrunedLayer) else last
        shown = shown[:, begin : begin + kinds.shape[1]]
        hidden = ~shown if shown.dtype == torch.bool else (shown == 0 if mask.ndim == 2 else shown != 0)
        if hidden.shape != kinds.shape or not bool(hidden.any()):
            hidden = None
    after = written - first.sink() - first.growth.kinds.shape[-1]
    for layer in layers:
        assert layer.growth is not None
        layer.growth.note(kinds if hidden is None else kinds.masked_fill(hidden, PADDING), after)
        if hidden is not None:
            layer.growth.padded = True
            # The columns of a mask over all tokens do not fit what a prune leaves of them.
            layer.growth.decoding = replace(layer.growth.decoding, plain=False)


def _of_full_attention(mask: Any) -> Any:
    """Return the mask of the layers that may be pruned, where there is one per type."""
    return mask.get("full_attention") if isinstance(mask, dict) else mask


def clean_turn(mask: Any, queries: int, first: int, after: int, columns: int) -> bool:
    """Say whether a mask hides only what is still to come from new queries, among the tokens after a prompt.

    Reads the device.

    Parameters
    ----------
    mask : Tensor or dict or None
        Of the model's forward: 2-D over all tokens seen, or 4-D over the slots.
    queries : int
        New queries q.
    first : int
        Tokens of the prompt: where the later tokens begin in a 2-D mask.
    after : int
        Tokens after the prompt, the q new ones included.
    columns : int
        Slots after the prompt: the last columns of a 4-D mask.
    """
    mask = _of_full_attention(mask)
    if not isinstance(mask, Tensor):
        return True
    if mask.ndim == 2:
        return bool((mask[:, first:] != 0).all())
    if mask.shape[-1] < columns:
        return False
    visible = mask[..., mask.shape[-1] - columns :]
    visible = visible if visible.dtype == torch.bool else visible == 0
    column = torch.arange(columns, device=mask.device)
    newest = torch.arange(after - queries, after, device=mask.device)[:, None]
    return bool((visible == (column <= newest)).all())
