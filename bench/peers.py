"""Other packages' ways of doing the same, where they are installed."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import torch
from clock import Side
from torch import Tensor, nn


def snapkv(query: Tensor, key: Tensor, value: Tensor, budget: int) -> Side | None:
    """Return the pruning step of kvpress's SnapKVPress for one layer, or None without kvpress.

    Window attention, pooling, top-k and gather of T rows; one score per key, where CSP has two. It takes
    hidden states: with an identity for its query projection and a rotation by 0 these are our queries. That
    rotation, a few small kernels over the window, is in its time.
    """
    if importlib.util.find_spec("kvpress") is None:
        return None
    from kvpress import SnapKVPress

    batch, num_heads, window, head_dim = query.shape
    config = SimpleNamespace(num_attention_heads=num_heads, num_key_value_heads=key.shape[1])
    layer: Any = nn.Module()
    layer.config, layer.head_dim, layer.q_proj = config, head_dim, nn.Identity()
    # it wants a prompt longer than the window, and looks at the window alone
    hidden = nn.functional.pad(query.transpose(1, 2).reshape(batch, window, -1), (0, 0, 1, 0))
    cosine = query.new_ones(batch, window, head_dim)
    rotation = {"position_embeddings": (cosine, torch.zeros_like(cosine))}
    press = SnapKVPress(compression_ratio=1 - (budget + 0.5) / key.shape[2], window_size=window)
    return torch.inference_mode()(lambda: press.compress(layer, hidden, key, value, None, rotation))


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Side:
    """Return torch's scaled_dot_product_attention over the same cache, heads grouped, no n-softmax."""
    grouped = query.shape[1] != key.shape[1]
    return lambda: nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=grouped)


def flash_attn(query: Tensor, key: Tensor, value: Tensor) -> Side | None:
    """Return flash-attn's decode kernel over the cache in its layout; None where it is not installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_with_kvcache

    new, keys, values = (tensor.transpose(1, 2).contiguous() for tensor in (query, key, value))
    return lambda: flash_attn_with_kvcache(new, keys, values, cache_seqlens=keys.shape[1])
