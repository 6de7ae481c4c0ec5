"""What ``generate`` was asked for, as far as a cache of fixed capacity has to know it before it starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    return _DEFAULT if length is None else max(_DEFAULT, int(length) - given)


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
