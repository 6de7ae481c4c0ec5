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

from csp_ext.integration import flash
from csp_ext.integration.cache import PrunedLayer, updated_layer
from csp_ext.integration.front import Front, additive

# A name here must contain neither "flash" nor a slash: transformers takes those for kernels of its own.
IMPLEMENTATIONS = {"eager": "csp_eager", "sdpa": "csp_sdpa", flash.BASE: "csp_fa2"}
PRUNE_RANGE = "csp::prune_layer"  # what a profile calls scoring, selecting and compacting a layer
OWN = "csp"  # sdpa for prompts, csp_ext's decode behind a pruned one
_MASKS: dict[str, Callable[..., Any]] = {
    "csp_eager": eager_mask,
    "csp_sdpa": sdpa_mask,
    "csp_fa2": flash.mask_for,
    OWN: sdpa_mask,
}
# What a model may ask of its attention that decode does not do.
_FOREIGN = ("softcap", "s_aux", "position_bias")

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def _stock(base: str, module: Any) -> Attention:
    """Return the function that `base` means for this module; "eager" is the one of the model's own file."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return flash.attend if base == flash.BASE else ALL_ATTENTION_FUNCTIONS[base]


def _foreign(kwargs: dict[str, Any]) -> bool:
    return any(kwargs.get(name) is not None for name in _FOREIGN)


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
    front = getattr(key, "csp_front", None)
    if front is not None:
        return _behind(base, front, own, module, query, key, value, attention_mask, **kwargs)
    # A graph cannot read a context variable, and knows a sliding layer, which is never pruned, without it.
    sliding = torch.compiler.is_compiling() and kwargs.get("sliding_window") is not None
    layer = None if sliding else updated_layer(key)
    stock = _stock(base, module)
    if layer is None:
        return stock(module, query, key, value, attention_mask, **kwargs)
    if layer.plan is not None:
        return _complete(base, layer, own, module, query, key, value, attention_mask, **kwargs)
    if layer.buffer:
        layer.remember(query, *_attends(module, kwargs))
    elif layer.front is not None:
        return _behind(base, layer.front, own, module, query, key, value, attention_mask, **kwargs)
    return stock(module, query, key, value, attention_mask, **kwargs)


def _behind(
    base: str,
    front: Front,
    own: bool,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend to a pruned prompt and what follows it: with our own kernel, or the stock one and a mask.

    A prompt that is whole until the cache has grown (no slots) is the stock kernel's as it stands.
    """
    if front.ring is not None:
        front.ring.write(query)
    if not front.slots:
        return _stock(base, module)(module, query, key, value, attention_mask, **kwargs)
    scale, causal = _attends(module, kwargs)
    if own and front.takes(query, key, value) and (causal or query.shape[-2] == 1) and not _foreign(kwargs):
        return front.attend(query, key, value, scale), None
    if base == flash.BASE:  # takes no mask of this kind; sdpa knows no foreign options
        base = "eager" if _foreign(kwargs) else "sdpa"
        attention_mask = flash.visible(attention_mask, query, key.shape[-2], causal)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = additive(attention_mask, query.dtype)
    mask = front.mask(attention_mask, query, key.shape[-2])
    key, value = front.with_sink(key, value)
    return _stock(base, module)(module, query, key, value, mask, **kwargs)


def _complete(
    base: str,
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
    mask = _part(attention_mask, slice(prompt.shape[2]), slice(length)) if drafts else attention_mask
    stored = length if drafts else key.shape[2]
    states = prompt, key[:, :, :stored], value[:, :, :stored]
    weights = lse = None
    if base == flash.BASE:
        output, lse = flash.attend_with_lse(module, *states, mask, **kwargs)
    else:
        output, weights = _stock(base, module)(module, *states, mask, **kwargs)
    scale, causal = _attends(module, kwargs)
    if layer.buffer:
        layer.remember(prompt, scale, causal)
        layer.buffer = 0
    window = prompt
    if layer.queries is not None:
        window, lse = layer.queries, None  # of earlier forwards, too
    with record_function(PRUNE_RANGE):
        plan.carry_out(module.layer_idx, layer, window, scale, causal, lse)
    if not drafts:
        return output, weights
    assert layer.front is not None
    mask = _part(attention_mask, slice(prompt.shape[2], None), slice(length, None))
    drafted, _ = _behind(base, layer.front, own, module, tail, layer.keys, layer.values, mask, **kwargs)
    return torch.cat([output, drafted], dim=1), None


def _part(mask: Tensor | None, queries: slice, keys: slice) -> Tensor | None:
    """Return the mask of some queries and keys; flash-attn's has no queries."""
    if mask is None or mask.ndim == 2:
        return mask if mask is None else mask[:, keys]
    return mask[..., queries, keys]


def _attends(module: Any, kwargs: dict[str, Any]) -> tuple[float | None, bool]:
    """Return the scale of the logits and whether the attention is causal."""
    return kwargs.get("scaling"), getattr(module, "is_causal", True)


def _attend_eager(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attend("eager", False, module, *args, **kwargs)


def _attend_sdpa(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attend("sdpa", False, module, *args, **kwargs)


def _attend_flash(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attend(flash.BASE, True, module, *args, **kwargs)


def _attend_own(module: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return _attend("sdpa", True, module, *args, **kwargs)


_FUNCTIONS: dict[str, Attention] = {
    "csp_eager": _attend_eager,
    "csp_sdpa": _attend_sdpa,
    "csp_fa2": _attend_flash,
    OWN: _attend_own,
}


def register() -> None:
    """Make the names known to transformers; a name without a mask function would get no mask at all."""
    for name, function in _FUNCTIONS.items():
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, _MASKS[name])
