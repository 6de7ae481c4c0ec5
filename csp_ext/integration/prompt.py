"""What is known of a prompt when its last token comes in, and the prune that is decided on it."""

from __future__ import annotations

import itertools
import weakref
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from csp_ext.config import CSPConfig, ResolvedConfig
from csp_ext.dispatch import implementation_for
from csp_ext.integration.cache import PrunedLayer, visibility_bias
from csp_ext.integration.modality import PADDING, modality_of_ids
from csp_ext.integration.stats import LayerStats, PruneStats
from csp_ext.selection import select_tokens, window_modality, window_span


@dataclass
class Prompt:
    """A prompt announced by ``generate`` or by :meth:`Handle.prompt`, before any forward has seen it.

    Attributes
    ----------
    owner : object
        The handle whose model it is for.
    length : int or None
        Tokens the cache will hold when the prompt is complete, earlier turns included.
    ids : Tensor or None
        [B, length] token ids, where they are known for the whole prompt.
    modality : Tensor or None
        [B, length], given by the user; wins over `ids`.
    single : bool
        One prompt, of the first cache that comes (``generate``), rather than every prompt of a block.
    reached : bool
        Whether some forward completed it.
    """

    owner: object
    length: int | None
    ids: Tensor | None = None
    modality: Tensor | None = None
    single: bool = False
    reached: bool = False
    cache: weakref.ref[Any] | None = None

    def is_of(self, cache: Any) -> bool:
        """Say whether this cache holds the prompt; guidance runs prompts of its own inside ``generate``."""
        if self.single and self.cache is None:
            self.cache = weakref.ref(cache)
        return self.cache is None or self.cache() is cache

    def modality_for(self, rows: int, placeholders: dict[int, int], device: torch.device) -> Tensor | None:
        """Return the modality [rows, length] int8; beams and returned sequences repeat each row."""
        known = self.modality
        if known is None and self.ids is not None:
            known = modality_of_ids(self.ids, placeholders)
        if known is None or known.shape[1] != self.length or rows % known.shape[0]:
            if self.modality is not None:
                raise ValueError(
                    f"modality has shape {tuple(self.modality.shape)}, the prompt is {rows} x {self.length}"
                )
            return None
        return known.to(device, torch.int8).repeat_interleave(rows // known.shape[0], dim=0)


ANNOUNCED: ContextVar[Prompt | None] = ContextVar("csp_announced_prompt", default=None)


@dataclass
class Plan:
    """The prune of one complete prompt, the same for every layer.

    Attributes
    ----------
    length : int
        L, the tokens of the prompt, padding included.
    modality : Tensor
        [B, L] int8, -1 padding.
    window : Tensor
        [B, O] int8, the modality of the last O queries, -1 where one does not observe.
    config : ResolvedConfig
        Sizes for the longest row.
    prunes : bool
        Whether any row loses a token.
    slots : int
        Physical slots per row and head without the sink: T, or more where a text-only row is left whole.
    whole : Tensor or None
        bool [B], the rows left whole.
    plain : bool
        Nothing in the pruned prompt has to be hidden from anyone.
    """

    length: int
    modality: Tensor
    window: Tensor
    config: ResolvedConfig
    stats: PruneStats
    prunes: bool
    slots: int
    whole: Tensor | None
    plain: bool

    @classmethod
    def make(cls, modality: Tensor, real: Tensor | None, config: CSPConfig) -> Plan:
        """Decide on a prompt; reads the device only for what no shape tells: padding and rows without images.

        Parameters
        ----------
        modality : Tensor
            [B, L] int8.
        real : Tensor or None
            bool [B, L], the positions that are not padding; None: all of them.
        config : CSPConfig
            As the user gave it.
        """
        rows, length = modality.shape
        counts, left_padded = [length] * rows, True
        if real is not None:
            modality = modality.masked_fill(~real, PADDING)
            counts = real.sum(-1).tolist()
            left_padded = bool((real[:, 1:] >= real[:, :-1]).all())
        sizes = config.resolve(max(counts))
        over = [count >= sizes.prune_from for count in counts]
        whole, slots = None, sizes.budget
        if config.text_only == "leave":
            text_only = (modality <= 0).all(-1)
            left = text_only.tolist()
            if any(left):
                whole = text_only
                slots = max([slots, *itertools.compress(counts, left)])
                over = [loses and not stays for loses, stays in zip(over, left, strict=True)]
        span = None if left_padded else window_span(modality, sizes)
        exact = sizes.k_self is None and whole is None
        return cls(
            length=length,
            modality=modality,
            window=window_modality(modality, sizes, span=span),
            config=sizes,
            stats=PruneStats(),
            prunes=any(over),
            slots=slots,
            whole=whole,
            plain=left_padded and exact and all(over) and config.decode_n in (0, 1),
        )

    @torch.no_grad()
    def select(self, query: Tensor, key: Tensor, scale: float | None, causal: bool) -> Tensor:
        """Return the kept positions, int32 [B, Hs, slots], ascending, -1 free.

        Parameters
        ----------
        query : Tensor
            [B, Hq, O or more, D], the last queries of the prompt.
        key : Tensor
            [B, Hkv, L, D].
        scale, causal
            Of the model's attention.
        """
        # A later turn may be shorter than the window: only its own queries are there to observe.
        window = self.window[:, max(0, self.window.shape[1] - query.shape[2]) :].to(key.device)
        modality = self.modality.to(key.device)
        indices, _ = select_tokens(
            query.to(key.dtype), key, modality, self.config, query_modality=window, scale=scale, causal=causal
        )
        if self.whole is None:
            return indices
        positions = torch.arange(self.length, dtype=torch.int32, device=key.device)
        real = torch.where(modality >= 0, positions, PADDING).sort(-1).values[:, None, -self.slots :]
        indices = torch.nn.functional.pad(indices, (self.slots - indices.shape[-1], 0), value=PADDING)
        return torch.where(self.whole.to(key.device)[:, None, None], real, indices)

    def carry_out(
        self, index: int, layer: PrunedLayer, query: Tensor, scale: float | None, causal: bool
    ) -> None:
        """Replace the prompt of one layer by its kept tokens, and note what was kept."""
        keys, values = layer.keys[:, :, : self.length], layer.values[:, :, : self.length]
        before = after = keys.nbytes + values.nbytes
        indices = None
        if self.prunes:
            indices = self.select(query, keys, scale, causal)
            kept = indices >= 0
            slots, visible, n = indices, kept, self.config.config.decode_n
            if n > 0:
                # Compacting a -1 gives zeros: that is the sink. Only rows that dropped a token see it.
                real = (self.modality.to(keys.device) >= 0).sum(-1)[:, None, None]
                visible = torch.cat([kept.sum(-1, keepdim=True) < real, kept], dim=-1)
                slots = torch.nn.functional.pad(indices, (1, 0), value=PADDING)
            bias = None if self.plain else visibility_bias(visible, n, query.shape[1], query.dtype)
            key, value = implementation_for(keys).compact(keys, values, slots)
            layer.replace_prompt(key, value, self.length, bias)
            after = key.nbytes + value.nbytes
        layer.plan = layer.queries = None
        self.stats.layers.append(LayerStats(index, before, after, self.modality, indices))
