"""Prompts through flash-attn, whose kernel hands back the log-sum-exp that the scores are made from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import flash_attention_mask, sdpa_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BASE = "flash_attention_2"
# What a model may ask for that changes which keys a query sees, or their logits.
_OPTIONS = ("sliding_window", "softcap", "s_aux", "is_causal", "cu_seq_lens_q", "cu_seq_lens_k", "cache")


def mask_for(**options: Any) -> Tensor | None:
    """Return the mask of a forward: flash-attn's 2-D one, or sdpa's where a buffer has free slots to hide.

    Only a buffer counts its tokens on the device. What it holds is never flash-attn's to attend to.
    """
    make = sdpa_mask if isinstance(options.get("q_offset"), Tensor) else flash_attention_mask
    return make(**options)


def visible(mask: Tensor | None, query: Tensor, stored: int, causal: bool) -> Tensor | None:
    """Return what flash-attn's mask, 2-D or None, shows to new queries [B, Hq, q, D]: bool [B, 1, q, S].

    A mask of sdpa's kind stays as it is; None where the queries are causal and nothing else is hidden.
    """
    queries = query.shape[-2]
    if mask is None and not causal and queries > 1:
        return torch.ones(1, 1, queries, stored, dtype=torch.bool, device=query.device)
    if mask is None or mask.ndim == 4:
        return mask
    keys = mask.shape[-1]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=mask.device)
    return mask[:, None, None].bool() & (seen.tril(keys - queries) if causal else seen)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers does under "flash_attention_2", a name that its own function asks the model for.

    Parameters and results are those of every attention function; a 4-D mask goes to sdpa.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    options = dict(kwargs)
    causal = options.pop("is_causal", None)
    width, own_width = query.shape[-1], value.shape[-1]
    if own_width != width:
        value = torch.nn.functional.pad(value, (0, width - own_width))
    output = _flash_attention_forward(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask,
        query_length=query.shape[2],
        is_causal=module.is_causal if causal is None else causal,
        softmax_scale=options.pop("scaling", None),
        target_dtype=get_target_dtype(query, module),
        attn_implementation=BASE,
        **options,
    )[..., :own_width]
    return output, None


def attend_with_lse(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attend as :func:`attend`, and return the log-sum-exp of the logits in the place of the weights.

    Returns
    -------
    output : Tensor [B, q, Hq, D]
    lse : Tensor [B, Hq, q] or None
        Natural logarithm, over the keys that a query sees, -inf for padding; None where the model wants more
        than plain attention, or where flash-attn does not say.
    """
    target = get_target_dtype(query, module)
    plain = (
        query.dtype == key.dtype == value.dtype
        and target in (None, query.dtype)
        and query.shape[-1] == value.shape[-1]
        and not kwargs.get("dropout")
        and all(kwargs.get(name) is None for name in _OPTIONS)
    )
    whole = attention_mask is None or (attention_mask.ndim == 2 and query.shape[2] == key.shape[2])
    if not plain or not whole:
        return attend(module, query, key, value, attention_mask, **kwargs)[0], None
    from flash_attn import flash_attn_func

    options = {"softmax_scale": kwargs.get("scaling"), "causal": module.is_causal, "return_attn_probs": True}
    states = tuple(tensor.transpose(1, 2) for tensor in (query, key, value))
    if attention_mask is None:
        output, lse, _ = flash_attn_func(*states, **options)
        return output, lse
    return _unpadded(states, attention_mask, options)


def _unpadded(
    states: tuple[Tensor, ...], mask: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Attend with the real tokens of [B, L, H, D] one row behind the other, as flash-attn wants a batch."""
    from flash_attn import flash_attn_varlen_func

    rows, length, heads, _ = states[0].shape
    lengths = mask.sum(-1, dtype=torch.int32)
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max())
    place = mask.flatten().nonzero().flatten()
    packed = (tensor.flatten(0, 1)[place] for tensor in states)
    real, real_lse, _ = flash_attn_varlen_func(*packed, starts, starts, longest, longest, **options)
    output = real.new_zeros(rows * length, *real.shape[1:])
    output[place] = real
    output = output.view(rows, length, *real.shape[1:])
    if real_lse.shape != (heads, place.numel()):  # 2.5 and older: one padded row per sequence
        return output, None
    lse = real_lse.new_full((heads, rows * length), -torch.inf)
    lse[:, place] = real_lse
    return output, lse.view(heads, rows, length).transpose(0, 1)
