"""The named attention functions: the model's own kernel, and a prune right after a prompt's last token."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from csp_ext.integration.cache import PrunedLayer, updated_layer
from csp_ext.integration.front import Front

# A name here must contain neither "flash" nor a slash: transformers takes those for kernels of its own.
IMPLEMENTATIONS = {"eager": "csp_eager", "sdpa": "csp_sdpa"}
PRUNE_RANGE = "csp::prune_layer"  # what a profile calls scoring, selecting and compacting a layer
OWN = "csp"  # sdpa for prompts, csp_ext's decode behind a pruned one
_MASKS: dict[str, Callable[..., Any]] = {"csp_eager": eager_mask, "csp_sdpa": sdpa_mask, OWN: sdpa_mask}
# What a model may ask of its attention that decode does not do.
_FOREIGN = ("softcap", "s_aux", "position_bias")

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def _stock(base: str, module: Any) -> Attention:
    """Return the function that `base` means for this module; "eager" is the one of the model's own file."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def _attend(
    base: str,
    own: bool,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend with the stock kernel; prune the layer's cache where this forward completes a prompt.

    Parameters
    ----------
    base : str
        The stock implementation behind the name.
    own : bool
        Whether csp_ext's own kernel attends to pruned prompts.
    module : torch.nn.Module
        The attention module.
    query : Tensor
        [B, Hq, q, D], after RoPE.
    key, value : Tensor
        [B, Hkv, S, D], what the cache handed out.
    attention_mask : Tensor or None
        Of the stock implementation's kind.

    Returns
    -------
    tuple
        (output [B, q, Hq, D], attention weights or None).
    """
    stock = _stock(base, module)
    front = getattr(key, "csp_front", None)
    if front is not None:
        return _behind(stock, front, own, module, query, key, value, attention_mask, **kwargs)
    # A graph cannot read a context variable, and knows a sliding layer, which is never pruned, without it.
    sliding = torch.compiler.is_compiling() and kwargs.get("sliding_window") is not None
    layer = None if sliding else updated_layer(key)
    if layer is None:
        return stock(module, query, key, value, attention_mask, **kwargs)
    if layer.plan is not None:
        return _complete(stock, layer, own, module, query, key, value, attention_mask, **kwargs)
    if layer.buffer:
        layer.remember(query, *_attends(module, kwargs))
    elif layer.front is not None:
        return _behind(stock, layer.front, own, module, query, key, value, attention_mask, **kwargs)
    return stock(module, query, key, value, attention_mask, **kwargs)


def _behind(
    stock: Attention,
    front: Front,
    own: bool,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend to a pruned prompt and what follows it: with our own kernel, or the stock one and a mask."""
    scale, causal = _attends(module, kwargs)
    if (
        own
        and front.takes(query, key, value)
        and (causal or query.shape[-2] == 1)
        and all(kwargs.get(name) is None for name in _FOREIGN)
    ):
        return front.attend(query, key, value, scale), None
    mask = front.mask(attention_mask, query, key.shape[-2])
    key, value = front.with_sink(key, value)
    return stock(module, query, key, value, mask, **kwargs)


def _complete(
    stock: Attention,
    layer: PrunedLayer,
    own: bool,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend to the whole prompt, prune, and let drafted tokens behind the prompt see the pruned cache."""
    plan = layer.plan
    assert plan is not None
    length = plan.length
    drafts = layer.seen - length if plan.prunes else 0
    prompt, tail = query[:, :, : query.shape[2] - drafts], query[:, :, query.shape[2] - drafts :]
    mask = attention_mask
    if drafts and mask is not None:
        mask = mask[..., : prompt.shape[2], :length]
    stored = length if drafts else key.shape[2]
    output = stock(module, prompt, key[:, :, :stored], value[:, :, :stored], mask, **kwargs)
    scale, causal = _attends(module, kwargs)
    if layer.buffer:
        layer.remember(prompt, scale, causal)
        layer.buffer = 0
    window = prompt if layer.queries is None else layer.queries
    with record_function(PRUNE_RANGE):
        plan.carry_out(module.layer_idx, layer, window, scale, causal)
    if not drafts:
        return output
    assert layer.front is not None
    if attention_mask is not None:
        attention_mask = attention_mask[..., prompt.shape[2] :, length:]
    drafted, _ = _behind(
        stock, layer.front, own, module, tail, layer.keys, layer.values, attention_mask, **kwargs
    )
    return torch.cat([output[0], drafted], dim=1), None


def _attends(module: Any, kwargs: dict[str, Any]) -> tuple[float | None, bool]:
    """Return the scale of the logits and whether the attention is causal."""
    return kwargs.get("scaling"), getattr(module, "is_causal", True)


def _attend_eager(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attend("eager", False, module, *args, **kwargs)


def _attend_sdpa(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attend("sdpa", False, module, *args, **kwargs)


def _attend_own(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attend("sdpa", True, module, *args, **kwargs)


_FUNCTIONS: dict[str, Attention] = {"csp_eager": _attend_eager, "csp_sdpa": _attend_sdpa, OWN: _attend_own}


def register() -> None:
    """Make the names known to transformers; a name without a mask function would get no mask at all."""
    for name, function in _FUNCTIONS.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _MASKS[name])
