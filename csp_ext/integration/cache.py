"""The cache layer that may hold a pruned prompt, and how it gets into a stock cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from csp_ext.dispatch import implementation_for
from csp_ext.integration.front import Front

if TYPE_CHECKING:
    from csp_ext.integration.growth import Growth
    from csp_ext.integration.prompt import Plan
    from csp_ext.methods.base import Renewal

# The layer updated last in this thread: the attention function is called next, and is not given the cache.
_LATEST: ContextVar[weakref.ref[PrunedLayer] | None] = ContextVar("csp_latest_layer", default=None)


class PrunedLayer(DynamicLayer):
    """A dynamic cache layer whose prompt may have been compacted into `slots` slots, new tokens after them.

    Its length is the number of tokens *seen* and its mask sizes are (stored + q, seen - stored), so that
    positions, masks and the slicing of prompts in ``generate`` go on from the true length.
    """

    keys: Any  # [B, Hkv, S, D], None before the first update
    values: Any
    buffered = False  # what is kept of a prompt is copied into a buffer

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.front: Front | None = None  # the pruned prompt; None: nothing was pruned
        self.growth: Growth | None = None  # what pruning again takes; None: that does not happen
        self.plan: Plan | None = None  # set for the forward that completes a prompt
        self.buffer = 0  # keep that many last queries, for a prompt that comes in chunks or is recorded
        self.queries: Tensor | None = None  # [B, Hq, <= buffer, D]
        self.scale: float | None = None  # of the attention that the queries were seen in
        self.causal = True
        self.attended = False  # the hook saw this forward, so the mask will be ours
        self.own = False  # the model attends with csp_ext's own decode where it can
        self.settled = False  # what this cache holds is not to be pruned any more

    @property
    def slots(self) -> int:
        """Physical slots of the pruned prompt, the sink included; 0: nothing was pruned."""
        return 0 if self.front is None else self.front.slots

    @property
    def bias(self) -> Tensor | None:
        """Additive mask of the pruned prompt, [B, 1 or Hq, 1, slots]; None: every slot is plainly visible."""
        return None if self.front is None else self.front.bias

    @classmethod
    def adopt(cls, stock: DynamicLayer) -> PrunedLayer:
        """Return a layer that goes on from a stock one, sharing its tensors."""
        layer = cls()
        if stock.keys is not None and stock.values is not None:
            layer.lazy_initialization(stock.keys, stock.values)
            layer.keys, layer.values = stock.keys, stock.values
            layer.seen = stock.get_seq_length()
        return layer

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._check_attended()
        self.seen += key_states.shape[-2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        _LATEST.set(weakref.ref(self))
        return keys, values

    def _check_attended(self) -> None:
        """Raise where the pruned prompt has hidden slots and the attention that follows is not ours."""
        if self.front is not None and self.front.hides and not self.attended:
            raise RuntimeError(
                "this cache was pruned by csp_ext and has slots that a stock attention mask does not hide; "
                "continue it with the model while csp_ext.apply(model) is active"
            )
        if self.growth is not None and not self.attended:
            self.growth = None  # these tokens' queries are not seen, so it can be pruned no more
        self.attended = False

    def get_seq_length(self) -> int:
        return self.seen

    def written(self) -> int:
        """Return how many physical slots are in use."""
        return self.keys.shape[-2] if self.is_initialized else 0

    def after(self) -> int:
        """Return how many tokens after the pruned prompt are stored."""
        return self.written() - self.slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        stored = self.written()
        return stored + query_length, self.seen - stored

    def replace_prompt(self, key: Tensor, value: Tensor, length: int, front: Front) -> None:
        """Put compacted tensors [B, Hkv, slots, D] in the place of the first `length` tokens."""
        tail = self.keys.shape[-2] - length
        self.keys = torch.cat([key, self.keys[:, :, length:]], dim=-2) if tail else key
        self.values = torch.cat([value, self.values[:, :, length:]], dim=-2) if tail else value
        self.front = front

    def keep_prompt(self, length: int, front: Front) -> None:
        """Note that the first `length` tokens, `front`, are a prompt that stays whole."""
        # A later turn may yet complete a prompt to prune.
        self.front = None if front.ring is None else Front(0, ring=front.ring)

    def grows(self, renewal: Renewal) -> bool:
        """Say whether the layer is to be pruned again while it grows."""
        return True

    def sink(self) -> int:
        """Return how many slots in front of the tokens of a growing layer are a sink, 0 or 1."""
        assert self.growth is not None
        return max(0, self.slots - self.growth.kinds.shape[-1])

    def renew(self, places: Tensor, front: Front, written: int) -> None:
        """Keep of the `written` slots those in `places`, int32 [B, Hs, slots], -1: zeros, seen as `front`."""
        self.keys, self.values = implementation_for(self.keys).compact(self.keys, self.values, places)
        self.front = front

    def remember(self, query: Tensor, scale: float | None, causal: bool) -> None:
        """Keep the last `buffer` queries of a prompt, and how they attend."""
        self.scale, self.causal = scale, causal
        if self.queries is not None:
            query = torch.cat([self.queries, query], dim=-2)
        self.queries = query[:, :, max(0, query.shape[-2] - self.buffer) :]

    def crop(self, tokens_to_remove: int) -> None:
        # Before transformers 5.14 a positive argument is the length to crop to.
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if not self.is_initialized or remove == 0:
            return
        if self.slots and remove > self.after():
            raise ValueError(
                f"crop would remove {remove} tokens, only the {self.after()} after the pruned prompt can go"
            )
        self._forget(remove)
        self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]
        self.queries = None if self.queries is None else self.queries[..., :-remove, :]
        self.seen -= remove

    def _forget(self, tokens: int) -> None:
        """Drop what is remembered of the last `tokens` ones, before they go themselves."""
        if self.growth is not None and self.front is not None and self.front.ring is not None:
            self.front.ring.crop(tokens)
            self.growth.crop(self.written() - self.sink() - tokens)

    def reset(self) -> None:
        # Emptied by hand: older versions of transformers would zero tensors that a new prompt must not see.
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = self.buffer = 0
        self.front = self.growth = self.plan = self.queries = None
        self.settled = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._each_row(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._each_row(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._each_row(lambda tensor: tensor[indices])

    def _each_row(self, take: Callable[[Tensor], Tensor]) -> None:
        """Do to the rows of what belongs to a sequence as was done to its keys."""
        if self.front is not None:
            self.front.each(take)
        if self.growth is not None:
            self.growth.each(take)
        self.queries = None if self.queries is None else take(self.queries)


def updated_layer(key: Tensor) -> PrunedLayer | None:
    """Return the layer that has just handed out `key`, or None where a stock cache or no cache did."""
    reference = _LATEST.get()
    layer = reference() if reference is not None else None
    return layer if layer is not None and layer.keys is key else None


def adopt_cache(cache: Any, text_config: Any) -> str:
    """Swap every full-attention layer of a stock cache for a :class:`PrunedLayer`.

    Returns
    -------
    str
        Why the cache cannot be pruned; empty where it can. A refused cache is left as it was.
    """
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        return f"a {type(cache).__name__} is not a cache of a decoder-only model"
    if any(isinstance(layer, PrunedLayer) for layer in cache.layers):
        return ""
    if cache.offloading:
        return "an offloaded cache moves its tensors away between layers"
    layers = list(cache.layers)
    if cache.layer_class_to_replicate is not DynamicLayer and DynamicLayer not in map(type, layers):
        return f"a {type(cache).__name__} has no plain dynamic layers"
    template = DynamicCache(config=text_config).layers
    # A cache made without a config creates its layers on the fly: make the ones a config would have given.
    if cache.layer_class_to_replicate is DynamicLayer:
        layers += template[len(layers) :]
    if len(layers) != len(template):
        return f"it has {len(layers)} layers, the model has {len(template)}"
    for index, (layer, model) in enumerate(zip(layers, template, strict=True)):
        if type(model) is DynamicLayer and type(layer) is not DynamicLayer:
            return f"its layer {index} is a {type(layer).__name__}"
        if type(model) is not DynamicLayer and type(layer) is DynamicLayer:
            return f"its layer {index} is not of the model's type; use DynamicCache(config=model.config)"
    cache.layers = [PrunedLayer.adopt(layer) if type(layer) is DynamicLayer else layer for layer in layers]
    cache.layer_class_to_replicate = None
    return ""


def pruned_layers(cache: Cache) -> list[PrunedLayer]:
    """Return the layers of an adopted cache that may be pruned."""
    return [layer for layer in cache.layers if isinstance(layer, PrunedLayer)]


def prunable_count(text_config: Any) -> int:
    """Return the number of full-attention layers a cache of this decoder has."""
    return sum(type(layer) is DynamicLayer for layer in DynamicCache(config=text_config).layers)
