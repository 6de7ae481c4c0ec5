"""What a cache of fixed capacity has to know before a ``generate`` or a forward: room, and plain masks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from csp_ext.integration.cache import PrunedLayer, pruned_layers
from csp_ext.integration.growth import make_room
from csp_ext.integration.modality import PADDING
from csp_ext.integration.prompt import Plan, Prompt
from csp_ext.integration.static import CSPStaticCache, StaticPrunedLayer

_DEFAULT = 20  # new tokens of a generate() that is told no length


def setting(model: Any, kwargs: dict[str, Any], name: str) -> Any:
    """Return a generation parameter from where ``generate`` takes it, None where nobody set it."""
    for value in (
        kwargs.get(name),
        getattr(kwargs.get("generation_config"), name, None),
        getattr(model.generation_config, name, None),
    ):
        if value is not None:
            return value
    return None


def new_tokens(model: Any, kwargs: dict[str, Any], given: int) -> int:
    """Return how many tokens ``generate`` may append to the `given` positions passed to it."""
    count = setting(model, kwargs, "max_new_tokens")
    if count is not None:
        return int(count)
    length = setting(model, kwargs, "max_length")
    # A length that the prompt already has is transformers' own to refuse.
    return _DEFAULT if length is None else max(1, int(length) - given)


class StaticCaches:
    """The static caches of one model's ``generate`` calls.

    The buffers of one that nobody was given serve the next call.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._spare: deque[CSPStaticCache] = deque(maxlen=1)

    def prepare(
        self, kwargs: dict[str, Any], count: int, length: int, interval: int | None
    ) -> CSPStaticCache | None:
        """Put a static cache that was asked for by name into `kwargs`, check the room of one that was given.

        Parameters
        ----------
        kwargs : dict
            Of ``generate``; changed in place.
        count : int
            How many tokens it may append.
        length : int
            Of the whole prompt, earlier turns included.
        interval : int or None
            After how many tokens the method prunes a cache again.

        Returns
        -------
        CSPStaticCache or None
            None: the cache is of another kind.
        """
        given = kwargs.get("past_key_values")
        named = given is None and setting(self._model, kwargs, "cache_implementation") == "static"
        named = named and setting(self._model, kwargs, "use_cache") is not False
        if not (named or isinstance(given, CSPStaticCache)):
            return None
        if setting(self._model, kwargs, "prefill_chunk_size") is not None:
            # transformers would compile the chunks, too; where a prompt ends is decided outside of a graph.
            kwargs["disable_compile"] = True
        drafts = kwargs.get("assistant_model") is not None or bool(
            setting(self._model, kwargs, "prompt_lookup_num_tokens")
        )
        if given is not None and given.static:
            grows = given.grows  # decided by its first prompt
        else:
            grows = interval is not None and (given is None or interval <= given.max_new_tokens)
        if grows and drafts:
            raise ValueError(
                "generate: with decode_interval a static cache has no room for drafted tokens; "
                "use a dynamic cache"
            )
        if given is not None and not grows:
            # The last token is not fed; a first prompt takes no room.
            turn = length - int(given.get_seq_length()) if given.static else 0
            _check_room(given.free(), turn + count - 1)
        if given is not None:
            return given
        try:
            cache = self._spare.pop()  # at once: another thread may want it
        except IndexError:
            cache = None
        if cache is None or cache.max_new_tokens < count:
            cache = CSPStaticCache(self._model.config, max_new_tokens=count)
        kwargs["cache_implementation"], kwargs["past_key_values"] = None, cache
        return cache

    def keep(self, cache: CSPStaticCache) -> None:
        """Take back a cache that nobody was given."""
        cache.reset()
        self._spare.append(cache)

    def clear(self) -> None:
        """Forget the buffers."""
        self._spare.clear()


def _check_room(free: int, needed: int) -> None:
    if needed > free:
        raise ValueError(
            f"generate: the static cache has room for {free} more tokens, {needed} are needed; "
            "make it with a larger max_new_tokens"
        )


class KeepRoom(StoppingCriteria):
    """Called by ``generate`` after every token, outside of its graph: prunes a cache again where it is full.

    Stops nothing.
    """

    def __init__(self, prompt: Prompt, pruned: Callable[[], None]) -> None:
        self._prompt = prompt
        self._pruned = pruned  # called after a prune
        self._written: int | None = None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        cache = None if self._prompt.cache is None else self._prompt.cache()
        layers = [] if cache is None else pruned_layers(cache)
        if layers and layers[0].growth is not None:
            if self._written is None or not isinstance(layers[0], StaticPrunedLayer):
                self._written = layers[0].written()
            else:
                self._written += 1  # what reading it from the device would say
            if make_room(layers, 1, self._written):
                self._written = layers[0].slots
                self._pruned()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def leave_whole(layers: list[PrunedLayer], fresh: Tensor, needed: int) -> None:
    """Have the layers of a static cache keep all of a prompt that `fresh` completes and cannot be pruned.

    Raises
    ------
    ValueError
        Where `needed` tokens will follow that there is no room for: the cache does not grow, after all.
    """
    first = layers[0]
    assert isinstance(first, StaticPrunedLayer)
    _check_room(first.free(), needed)
    plan = Plan.untouched(fresh.shape[0], layers[0].seen + fresh.shape[1], fresh.device)
    for layer in layers:
        layer.plan = plan


def check_turn(layers: list[PrunedLayer], fresh: Tensor | None, mask: Any) -> None:
    """Check that new tokens fit into a static cache, and whether a mask hides any of them from ``decode``.

    Parameters
    ----------
    layers : list
        Of a cache whose prompt is complete.
    fresh : Tensor or None
        What is to be appended, ids [B, q] or embeddings [B, q, hidden].
    mask : Tensor or dict or None
        Of the model's forward.
    """
    first = layers[0]
    if fresh is None or first.front is None:
        return
    queries = fresh.shape[1]
    if isinstance(first, StaticPrunedLayer) and queries > first.free():
        instead = "make it with a larger max_new_tokens"
        if first.growth is not None:
            instead = "with decode_interval it is never larger; use a dynamic cache, or give fewer at a time"
        raise ValueError(
            f"the static cache has room for {first.free()} more tokens, got {queries}; {instead}"
        )
    if not first.own or mask is None or not first.front.clean:
        return
    after = first.after()
    before = int(first.get_seq_length()) - after
    columns = first.columns if isinstance(first, StaticPrunedLayer) else after + queries
    clean = clean_turn(mask, queries, before, after + queries, columns)
    for layer in layers:
        if layer.front is not None:
            layer.front.clean = clean


def refuse_old_mask(layer: PrunedLayer, mask: Any) -> None:
    """Raise where a mask over the slots of a static cache was made before a prune that moved them."""
    mask = _of_full_attention(mask)
    if isinstance(layer, StaticPrunedLayer) and isinstance(mask, Tensor) and mask.ndim == 4:
        raise ValueError(
            "the static cache was full and has been pruned again, which moved its slots; make the 4-D "
            "attention_mask anew, or call cache.make_room() before you make one"
        )


def note_turn(layers: list[PrunedLayer], kinds: Tensor, mask: Any, seen: int) -> None:
    """Have layers that are pruned again remember of what modality new tokens are; reads the device.

    Parameters
    ----------
    layers : list
        Of a cache that grows.
    kinds : Tensor
        int8 [B, q].
    mask : Tensor or dict or None
        Of the model's forward: 2-D over all tokens seen, or 4-D over the slots. What it hides is padding.
    seen : int
        Tokens before these.
    """
    first = layers[0]
    assert first.growth is not None
    written = first.written()
    mask = _of_full_attention(mask)
    hidden = None
    if isinstance(mask, Tensor):
        shown = mask if mask.ndim == 2 else mask[:, 0, -1]
        last = shown.shape[1] - kinds.shape[1]  # where a cache without free slots holds them
        begin = seen if mask.ndim == 2 else written if isinstance(first, StaticPrunedLayer) else last
        shown = shown[:, begin : begin + kinds.shape[1]]
        hidden = ~shown if shown.dtype == torch.bool else (shown == 0 if mask.ndim == 2 else shown != 0)
        if hidden.shape != kinds.shape or not bool(hidden.any()):
            hidden = None
    after = written - first.sink() - first.growth.kinds.shape[-1]
    for layer in layers:
        assert layer.growth is not None
        layer.growth.note(kinds if hidden is None else kinds.masked_fill(hidden, PADDING), after)
        if hidden is not None:
            layer.growth.padded = True
            # The columns of a mask over all tokens do not fit what a prune leaves of them.
            layer.growth.decoding = replace(layer.growth.decoding, plain=False)


def _of_full_attention(mask: Any) -> Any:
    """Return the mask of the layers that may be pruned, where there is one per type."""
    return mask.get("full_attention") if isinstance(mask, dict) else mask


def clean_turn(mask: Any, queries: int, first: int, after: int, columns: int) -> bool:
    """Say whether a mask hides only what is still to come from new queries, among the tokens after a prompt.

    Reads the device.

    Parameters
    ----------
    mask : Tensor or dict or None
        Of the model's forward: 2-D over all tokens seen, or 4-D over the slots.
    queries : int
        New queries q.
    first : int
        Tokens of the prompt: where the later tokens begin in a 2-D mask.
    after : int
        Tokens after the prompt, the q new ones included.
    columns : int
        Slots after the prompt: the last columns of a 4-D mask.
    """
    mask = _of_full_attention(mask)
    if not isinstance(mask, Tensor):
        return True
    if mask.ndim == 2:
        return bool((mask[:, first:] != 0).all())
    if mask.shape[-1] < columns:
        return False
    visible = mask[..., mask.shape[-1] - columns :]
    visible = visible if visible.dtype == torch.bool else visible == 0
    column = torch.arange(columns, device=mask.device)
    newest = torch.arange(after - queries, after, device=mask.device)[:, None]
    return bool((visible == (column <= newest)).all())
