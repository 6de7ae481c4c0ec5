"""What a forward brings to its cache: tokens, and of what modality they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csp_ext.integration.modality import modality_of_embeddings, modality_of_ids
from csp_ext.integration.prompt import Prompt


@dataclass(frozen=True)
class Incoming:
    """The arguments of one forward.

    Attributes
    ----------
    bound : dict
        By name.
    model : PreTrainedModel
        Whose forward it is.
    placeholders : dict
        The modality of each placeholder id.
    """

    bound: dict[str, Any]
    model: Any
    placeholders: dict[int, int]

    @property
    def fresh(self) -> Any:
        """What is added to the cache: ids [B, q] or embeddings [B, q, hidden]; None for neither."""
        ids = self.bound.get("input_ids")
        return self.bound.get("inputs_embeds") if ids is None else ids

    @property
    def mask(self) -> Any:
        """The attention mask: 2-D, 4-D, a dict of masks by type of layer, or None."""
        return self.bound.get("attention_mask")

    def modality(self, prompt: Prompt, seen: int, length: int) -> Tensor | None:
        """Return the modality [B, length] of a prompt that is complete now, None where it cannot be seen."""
        ids: Any = self.bound.get("input_ids")
        fresh = self.fresh
        modality = prompt.modality_for(fresh.shape[0], self.placeholders, fresh.device)
        if modality is None and ids is not None and seen == 0:
            modality = modality_of_ids(ids[:, :length], self.placeholders)
        if modality is None and self.bound.get("mm_token_type_ids") is not None:
            types = self.bound["mm_token_type_ids"]
            modality = types[:, :length].to(torch.int8) if types.shape[1] >= length else None
        if modality is None and ids is None and seen == 0:
            modality = self._embedded()
            modality = None if modality is None else modality[:, :length]
        return modality

    def kinds(self, prompt: Prompt, seen: int) -> Tensor:
        """Return the modality [B, q] of tokens behind `seen` others; what cannot be told is text."""
        ids, known, fresh = self.bound.get("input_ids"), prompt.modality, self.fresh
        if known is not None and known.shape[1] == seen + fresh.shape[1]:
            return known[:, seen:].to(torch.int8).repeat_interleave(len(fresh) // len(known), dim=0)
        if ids is not None:
            return modality_of_ids(ids, self.placeholders)
        embedded = self._embedded()
        if embedded is not None:
            return embedded
        return torch.zeros(fresh.shape[:2], dtype=torch.int8, device=fresh.device)

    def _embedded(self) -> Tensor | None:
        """Return the modality of embeddings that come with images, None where none come."""
        if self.bound.get("pixel_values") is None and not self.bound.get("mm_encoder_outputs"):
            return None
        table = self.model.get_input_embeddings()
        return modality_of_embeddings(self.bound["inputs_embeds"], table, self.placeholders)
