"""What ``generate`` has to see to: caches of fixed capacity, and room in those that are pruned again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from csp_ext.integration.cache import PrunedLayer, pruned_layers
from csp_ext.integration.growth import make_room
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
