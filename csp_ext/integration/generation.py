"""What a cache of fixed capacity has to know before a ``generate`` or a forward: room, and plain masks."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from csp_ext.integration.cache import PrunedLayer
from csp_ext.integration.prompt import Plan
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

    def prepare(self, kwargs: dict[str, Any], ids: Any, length: int) -> CSPStaticCache | None:
        """Put a static cache that was asked for by name into `kwargs`, check the room of one that was given.

        Parameters
        ----------
        kwargs : dict
            Of ``generate``; changed in place.
        ids : Tensor or None
            Its token ids.
        length : int
            Of the whole prompt, earlier turns included.

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
        count = new_tokens(self._model, kwargs, ids.shape[1] if isinstance(ids, Tensor) else length)
        if setting(self._model, kwargs, "prefill_chunk_size") is not None:
            # transformers would compile the chunks, too; where a prompt ends is decided outside of a graph.
            kwargs["disable_compile"] = True
        if given is not None:
            # The last token is not fed; a first prompt takes no room.
            needed, free = count - 1, given.free()
            if given.static:
                needed += length - int(given.get_seq_length())
            if needed > free:
                raise ValueError(
                    f"generate: the static cache has room for {free} more tokens, {needed} are needed; "
                    "make it with a larger max_new_tokens"
                )
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


def leave_whole(layers: list[PrunedLayer], fresh: Tensor) -> None:
    """Have the layers of a static cache keep all of a prompt that `fresh` completes and cannot be pruned."""
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
    if fresh is None:
        return
    first, queries = layers[0], fresh.shape[1]
    if isinstance(first, StaticPrunedLayer) and queries > first.free():
        raise ValueError(
            f"the static cache has room for {first.free()} more tokens, got {queries}; "
            "make it with a larger max_new_tokens"
        )
    if not first.own or mask is None or first.front is None or not first.front.clean:
        return
    after = first.after()
    before = int(first.get_seq_length()) - after
    columns = first.room if isinstance(first, StaticPrunedLayer) else after + queries
    clean = clean_turn(mask, queries, before, after + queries, columns)
    for layer in layers:
        if layer.front is not None:
            layer.front.clean = clean


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
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
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
