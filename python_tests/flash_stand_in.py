"""flash-attn's interface in plain torch, and transformers made to believe that it is installed.

Signatures, the alignment of the causal mask and the shapes of what comes back are those that flash-attn
documents; its kernels are not here. Unlike them this one also takes float32 and float64.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

CALLS: list[str] = []  # the functions called, in order


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attend with q [B, q, Hq, D] to k and v [B, S, Hkv, D]; the LSE is [B, Hq, q], float32."""
    CALLS.append("flash_attn_func")
    assert (dropout_p, alibi_slopes) == (0, None)
    output, lse = _attention(q, k, v, softmax_scale, causal, window_size, softcap)
    return (output, lse, None) if return_attn_probs else output


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attend within sequences that lie one behind the other, [total, H, D]; the LSE is [Hq, total]."""
    CALLS.append("flash_attn_varlen_func")
    assert (dropout_p, alibi_slopes, block_table) == (0, None, None)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    starts, key_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    assert (starts[-1], key_starts[-1]) == (q.shape[0], k.shape[0])
    assert max_seqlen_q == max(b - a for a, b in itertools.pairwise(starts))
    assert max_seqlen_k == max(b - a for a, b in itertools.pairwise(key_starts))
    output, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=_computed(q))
    for row in range(len(starts) - 1):
        own = slice(starts[row], starts[row + 1])
        keys = slice(key_starts[row], key_starts[row + 1])
        found, found_lse = _attention(
            q[None, own], k[None, keys], v[None, keys], softmax_scale, causal, window_size, softcap
        )
        output[own], lse[:, own] = found[0], found_lse[0]
    return (output, lse, None) if return_attn_probs else output


def _computed(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
) -> tuple[Tensor, Tensor]:
    assert q.dtype == k.dtype == v.dtype
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[2] % k.shape[2] == 0
    dtype, group = _computed(q), q.shape[2] // k.shape[2]
    query = q.to(dtype).transpose(1, 2)
    key, value = (t.to(dtype).transpose(1, 2).repeat_interleave(group, dim=1) for t in (k, v))
    logits = query @ key.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap > 0:
        logits = softcap * (logits / softcap).tanh()
    # The bottom right corner: the last query sees the last key.
    ahead = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
    right = 0 if causal else window_size[1]
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if right >= 0:
        hidden |= ahead > right
    if window_size[0] >= 0:
        hidden |= ahead < -window_size[0]
    logits = logits.masked_fill(hidden.to(logits.device), -torch.inf)
    output = logits.softmax(-1).nan_to_num(0) @ value
    return output.transpose(1, 2).to(q.dtype), logits.logsumexp(-1)


def flash_attn_with_kvcache(*args: Any, **kwargs: Any) -> Any:
    """Not to be called: caches are transformers' or ours."""
    raise AssertionError("flash-attn was asked to keep a cache")


@contextmanager
def installed() -> Iterator[list[str]]:
    """Have ``attn_implementation="flash_attention_2"`` accepted, on the CPU too; gives the calls."""
    import transformers.modeling_flash_attention_utils as utils

    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.__spec__ = ModuleSpec("flash_attn", None)  # others look whether it is there
    for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache):
        setattr(package, function.__name__, function)
    vars(padding).update(pad_input=utils._pad_input, unpad_input=utils._unpad_input)
    found = {
        "general_availability_check": lambda: True,
        "supported_devices": ((lambda: True, "cpu"),),
    }
    CALLS.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", package)
        patch.setitem(sys.modules, "flash_attn.bert_padding", padding)
        patch.setattr(utils, "is_flash_attn_2_available", lambda: True)
        patch.setattr(utils, "_loaded_implementation", None)
        for name, value in found.items():
            patch.setitem(utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2], name, value)
        yield CALLS
