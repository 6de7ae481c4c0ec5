"""What is known of a prompt when its last token comes in, and the prune that is decided on it."""

from __future__ import annotations

import itertools
import weakref
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from csp_ext.dispatch import has_decode, implementation_for
from csp_ext.integration.cache import PrunedLayer
from csp_ext.integration.front import Decoding, Front
from csp_ext.integration.growth import Growth
from csp_ext.integration.modality import PADDING, modality_of_ids
from csp_ext.integration.stats import LayerStats, PruneStats
from csp_ext.methods.base import Layer, Method, Selection
from csp_ext.methods.full import Full

if TYPE_CHECKING:
    from csp_ext.integration.recording import Recording


@dataclass
class Prompt:
    """A prompt announced by ``generate`` or by :meth:`Handle.prompt`, before any forward has seen it.

    Attributes
    ----------
    owner : object
        The handle whose model it is for.
    length : int or None
        Tokens the cache will hold when it is pruned, earlier turns included.
    delay : int
        How many of them are generated.
    ids : Tensor or None
        [B, length - delay] token ids, where they are known for the whole prompt.
    modality : Tensor or None
        [B, length - delay], given by the user; wins over `ids`.
    single : bool
        One prompt, of the first cache that comes (``generate``), rather than every prompt of a block.
    to_come : int
        Tokens that ``generate`` may feed after it.
    recording : Recording or None
        What takes the prompt down instead of pruning it.
    reached : bool
        Whether some forward completed it.
    """

    owner: object
    length: int | None
    delay: int = 0
    ids: Tensor | None = None
    modality: Tensor | None = None
    single: bool = False
    to_come: int = 0
    recording: Recording | None = None
    reached: bool = False
    cache: weakref.ref[Any] | None = None

    def put_off(self, delay: int) -> None:
        """Have the cache pruned only when it holds `delay` generated tokens, too."""
        if self.length is not None:
            self.length, self.delay = self.length + delay, delay

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
        length = None if self.length is None else self.length - self.delay
        if known is None or known.shape[1] != length or rows % known.shape[0]:
            if self.modality is not None:
                raise ValueError(
                    f"modality has shape {tuple(self.modality.shape)}, the prompt is {rows} x {length}"
                )
            return None
        # What is generated is text.
        known = torch.nn.functional.pad(known, (0, self.delay))
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
    selection : Selection
        What the method decided for this prompt.
    layers : int
        How many layers will be pruned.
    decode_n : float
        n-softmax constant of the attention over the pruned prompt.
    prunes : bool
        Whether any row loses a token.
    slots : int
        Fewest physical slots per row and head, without the sink: what the rows left whole need.
    whole : Tensor or None
        bool [B], the rows left whole.
    left_padded : bool
        All padding of the prompt stands at the left.
    plain : bool
        The padding stands at the left, and every row and head fills its slots and has dropped a token.
    masked : bool
        The model's attention hides all that is padding here; a modality given by hand may say more.
    """

    length: int
    modality: Tensor
    selection: Selection
    layers: int
    decode_n: float
    stats: PruneStats
    prunes: bool
    slots: int
    whole: Tensor | None
    left_padded: bool
    plain: bool
    masked: bool = True

    @classmethod
    def make(cls, modality: Tensor, real: Tensor | None, method: Method, layers: int) -> Plan:
        """Decide on a prompt; reads the device only for what no shape tells: padding and rows without images.

        Parameters
        ----------
        modality : Tensor
            [B, L] int8.
        real : Tensor or None
            bool [B, L], the positions that are not padding; None: all of them.
        method : Method
            As the user gave it.
        layers : int
            How many layers will be pruned.
        """
        rows, length = modality.shape
        counts, left_padded = [length] * rows, True
        if real is not None:
            modality = modality.masked_fill(~real, PADDING)
            counts = real.sum(-1).tolist()
            left_padded = bool((real[:, 1:] >= real[:, :-1]).all())
        selection = method.start(modality, max(counts), left_padded)
        over = [count >= selection.prune_from for count in counts]
        whole, slots = None, 0
        if method.text_only == "leave":
            text_only = (modality <= 0).all(-1)
            left = text_only.tolist()
            if any(left):
                whole = text_only
                slots = max(itertools.compress(counts, left))
                over = [loses and not stays for loses, stays in zip(over, left, strict=True)]
        return cls(
            length=length,
            modality=modality,
            selection=selection,
            layers=layers,
            decode_n=method.decode_n,
            stats=PruneStats(),
            prunes=any(over),
            slots=slots,
            whole=whole,
            left_padded=left_padded,
            plain=left_padded and selection.exact and whole is None and all(over),
        )

    @torch.no_grad()
    def select(self, layer: Layer) -> Tensor:
        """Return the kept positions, int32 [B, Hs, slots], ascending, -1 free."""
        indices = self.selection.select(layer)
        if self.whole is None:
            return indices
        slots = max(self.slots, indices.shape[-1])
        positions = torch.arange(self.length, dtype=torch.int32, device=indices.device)
        real = torch.where(layer.modality >= 0, positions, PADDING).sort(-1).values[:, None, -slots:]
        indices = torch.nn.functional.pad(indices, (slots - indices.shape[-1], 0), value=PADDING)
        return torch.where(self.whole.to(indices.device)[:, None, None], real, indices)

    def carry_out(
        self,
        index: int,
        layer: PrunedLayer,
        query: Tensor,
        scale: float | None,
        causal: bool,
        lse: Tensor | None = None,
    ) -> None:
        """Replace the prompt of one layer by its kept tokens, and note what was kept.

        Parameters
        ----------
        index : int
            Of the decoder layer.
        layer : PrunedLayer
            Holds the whole prompt.
        query : Tensor
            [B, Hq, O or more, D], the last queries of the prompt.
        scale, causal
            Of the model's attention.
        lse : Tensor or None
            [B, Hq, O or more], what the attention found for these queries.
        """
        keys, values = layer.keys[:, :, : self.length], layer.values[:, :, : self.length]
        before = after = keys.nbytes + values.nbytes
        seen = Layer(
            query=query.to(keys.dtype),
            key=keys,
            value=values,
            modality=self.modality.to(keys.device),
            index=len(self.stats.layers),
            count=self.layers,
            scale=scale,
            causal=causal,
            lse=lse if self.masked else None,
        )
        indices = None
        decoding = Decoding(
            n=self.decode_n,
            own=layer.own and has_decode(keys),
            plain=self.plain,
            alike=self.selection.exact,
            heads=(query.shape[1], keys.shape[1]),
            dtype=query.dtype,
        )
        if self.prunes:
            indices = self.select(seen)
            kept = indices >= 0
            dropped = kept.sum(-1) < (seen.modality >= 0).sum(-1)[:, None]
            front = decoding.front(kept, dropped)
            # Compacting a -1 gives zeros: that is the sink.
            slots = torch.nn.functional.pad(indices, (decoding.sink, 0), value=PADDING)
            key, value = self._compacted(seen, slots, layer.buffered)
        else:
            front = self._whole(keys, decoding.own)
        layer.growth, renewal = None, self.selection.renewal
        if renewal is not None and layer.grows(renewal):
            layer.growth, front.ring = Growth.after(seen, indices, renewal, decoding, self.left_padded)
        if indices is not None:
            layer.replace_prompt(key, value, self.length, front)
            after = key.nbytes + value.nbytes
        else:
            layer.keep_prompt(self.length, front)
        layer.plan = layer.queries = None
        self.stats.layers.append(LayerStats(index, before, after, self.modality, indices))

    def _compacted(self, seen: Layer, slots: Tensor, buffered: bool) -> tuple[Tensor, Tensor]:
        """Return what stands in the slots, in place where it will be copied into a buffer anyway."""
        impl, count = implementation_for(seen.key), slots.shape[-1]
        free = not (seen.key.requires_grad or seen.value.requires_grad)
        if buffered and free and not self.selection.merges and count <= self.length:
            impl.compact_(seen.key, seen.value, slots)
            return seen.key[:, :, :count], seen.value[:, :, :count]
        key, value = impl.compact(seen.key, seen.value, slots)
        return self.selection.merge(seen, slots, key, value) if self.selection.merges else (key, value)

    @classmethod
    def untouched(cls, rows: int, length: int, device: torch.device) -> Plan:
        """Return the plan of a prompt that is left whole because it cannot be judged."""
        plan = cls.make(torch.zeros((rows, length), dtype=torch.int8, device=device), None, Full(), 0)
        plan.left_padded = False  # where its padding stands is not known
        return plan

    def _whole(self, key: Tensor, own: bool) -> Front:
        """Return how a prompt that loses nothing is seen."""
        front = Front(self.length)
        if own and self.left_padded:
            padding = (self.modality < 0).sum(-1, dtype=torch.int32).to(key.device)
            front.start = padding[:, None].expand(key.shape[:2]).contiguous()
        return front
