"""The cache layer that may hold a pruned prompt, and how it gets into a stock cache."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

if TYPE_CHECKING:
    from csp_ext.integration.prompt import Plan

# The layer updated last in this thread: the attention function is called next, and is not given the cache.
_LATEST: ContextVar[weakref.ref[PrunedLayer] | None] = ContextVar("csp_latest_layer", default=None)


class PrunedLayer(DynamicLayer):
    """A dynamic cache layer whose prompt may have been compacted into `slots` slots, new tokens after them.

    Its length is the number of tokens *seen* and its mask sizes are (stored + q, seen - stored), so that
    positions, masks and the slicing of prompts in ``generate`` go on from the true length.
    """

    keys: Any  # [B, Hkv, S, D], None before the first update
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.slots = 0  # physical slots of the pruned prompt, the sink included; 0: nothing was pruned
        self.bias: Tensor | None = (
            None  # additive [B, 1 or Hq, 1, slots]; None: every slot is plainly visible
        )
        self.plan: Plan | None = None  # set for the forward that completes a prompt
        self.buffer = 0  # keep that many last queries, for a prompt that comes in chunks or is recorded
        self.queries: Tensor | None = None  # [B, Hq, <= buffer, D]
        self.scale: float | None = None  # of the attention that the queries were seen in
        self.causal = True
        self.attended = False  # the hook saw this forward, so the mask will be ours
        self.settled = False  # what this cache holds is not to be pruned any more

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
        if self.bias is not None and not self.attended:
            raise RuntimeError(
                "this cache was pruned by csp_ext and has slots that a stock attention mask does not hide; "
                "continue it with the model while csp_ext.apply(model) is active"
            )
        self.attended = False
        self.seen += key_states.shape[-2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        _LATEST.set(weakref.ref(self))
        return keys, values

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        stored = self.keys.shape[-2] if self.is_initialized else 0
        return stored + query_length, self.seen - stored

    def replace_prompt(self, key: Tensor, value: Tensor, length: int, bias: Tensor | None) -> None:
        """Put compacted tensors [B, Hkv, slots, D] in the place of the first `length` tokens."""
        tail = self.keys.shape[-2] - length
        self.keys = torch.cat([key, self.keys[:, :, length:]], dim=-2) if tail else key
        self.values = torch.cat([value, self.values[:, :, length:]], dim=-2) if tail else value
        self.slots, self.bias = key.shape[-2], bias

    def remember(self, query: Tensor, scale: float | None, causal: bool) -> None:
        """Keep the last `buffer` queries of a prompt, and how they attend."""
        self.scale, self.causal = scale, causal
        if self.queries is not None:
            query = torch.cat([self.queries, query], dim=-2)
        self.queries = query[:, :, max(0, query.shape[-2] - self.buffer) :]

    def mask(self, stock: Tensor | None, query: Tensor) -> Tensor | None:
        """Return the mask of new queries [B, Hq, q, D] over a pruned prompt and what follows it.

        `stock` is the model's mask of these queries: its last columns belong to the tokens after the prompt.
        None means causal, and that nothing is hidden from a single query.
        """
        length, stored = query.shape[-2], self.keys.shape[-2]
        if self.bias is None and (stock.shape[-1] == stored if stock is not None else length == 1):
            return stock
        recent = stored - self.slots
        if stock is None:
            visible = torch.ones(length, recent, dtype=torch.bool, device=query.device)
            after = _additive(visible.tril(recent - length)[None, None], query.dtype)
        else:
            after = stock[..., stock.shape[-1] - recent :]
            after = _additive(after, query.dtype) if after.dtype == torch.bool else after
        front = self.bias
        if front is None:
            front = after.new_zeros(1, 1, 1, self.slots)
        shape = (query.shape[0], max(front.shape[1], after.shape[1]), length, -1)
        return torch.cat([front.expand(shape), after.expand(shape).to(front.dtype)], dim=-1)

    def crop(self, tokens_to_remove: int) -> None:
        # Before transformers 5.14 a positive argument is the length to crop to.
        remove = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if not self.is_initialized or remove == 0:
            return
        after = self.keys.shape[-2] - self.slots
        if self.slots and remove > after:
            raise ValueError(
                f"crop would remove {remove} tokens, only the {after} after the pruned prompt can go"
            )
        self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]
        self.queries = None if self.queries is None else self.queries[..., :-remove, :]
        self.seen -= remove

    def reset(self) -> None:
        # Emptied by hand: older versions of transformers would zero tensors that a new prompt must not see.
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = self.slots = self.buffer = 0
        self.bias = self.plan = self.queries = None
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
        self.bias = None if self.bias is None else take(self.bias)
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


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros where `visible`, the lowest number of `dtype` elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, torch.finfo(dtype).min
    )


def visibility_bias(visible: Tensor, n: float, num_heads: int, dtype: torch.dtype) -> Tensor:
    """Return the additive mask [B, 1 or Hq, 1, slots] of a pruned prompt.

    Parameters
    ----------
    visible : Tensor
        bool [B, Hs, slots]; for n > 0 slot 0 is the sink, an all-zero key and value.
    n : float
        n-softmax constant (Eq. 7): a logit of log n on the sink puts n into the denominator.
    num_heads : int
        Hq: per-head masks are repeated to the query heads.
    dtype : torch.dtype
        Of the attention logits.
    """
    bias = _additive(visible, dtype)
    if n > 0:
        bias[..., 0] += math.log(n)
    if bias.shape[1] > 1:
        bias = bias.repeat_interleave(num_heads // bias.shape[1], dim=1)
    return bias[:, :, None]
