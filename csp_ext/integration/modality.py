"""Which prompt positions are text, image, video or audio, and which are padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TEXT, IMAGE, VIDEO, AUDIO = range(4)
PADDING = -1

# Model families spell the placeholder id of a modality with one of these endings.
_NAMES = {"image": IMAGE, "video": VIDEO, "audio": AUDIO}
_ENDINGS = ("token_id", "token_index")


def placeholder_ids(config: Any) -> dict[int, int]:
    """Return the placeholder token ids of a model config and the modality each stands for."""
    found: dict[int, int] = {}
    for name, modality in _NAMES.items():
        for ending in _ENDINGS:
            token = getattr(config, f"{name}_{ending}", None)
            if isinstance(token, int):
                found[token] = modality
    return found


def modality_of_ids(ids: Tensor, placeholders: dict[int, int]) -> Tensor:
    """Return the modality of each token id, int8 of the shape of `ids`; no host synchronisation."""
    modality = torch.zeros_like(ids, dtype=torch.int8)
    for token, value in placeholders.items():
        modality.masked_fill_(ids == token, value)
    return modality


def modality_of_embeddings(
    embeddings: Tensor, table: torch.nn.Module, placeholders: dict[int, int]
) -> Tensor:
    """Return the modality of embedded placeholders [B, L, hidden], found as the models find them."""
    modality = torch.zeros(embeddings.shape[:2], dtype=torch.int8, device=embeddings.device)
    for token, value in placeholders.items():
        row = table(torch.tensor(token, device=embeddings.device)).to(embeddings.dtype)
        modality.masked_fill_((embeddings == row).all(-1), value)
    return modality


def real_tokens(attention_mask: Any, length: int) -> Tensor | None:
    """Return which of the first `length` positions are not padding, bool [B, length], or None for all.

    A 4-D mask (or a dict of them, one per layer type) tells it in its last query row, where causality hides
    nothing.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention")
    if not isinstance(attention_mask, Tensor):
        return None
    if attention_mask.ndim == 4:
        attention_mask = attention_mask[:, 0, -1]
        real = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    else:
        real = attention_mask != 0
    # A mask shorter than the prompt hides the rest, as it does in transformers.
    return torch.nn.functional.pad(real, (0, max(0, length - real.shape[1])))[:, :length]
