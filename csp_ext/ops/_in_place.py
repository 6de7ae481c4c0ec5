"""Autograd around an op that changes tensors in place: what it refuses, and what it is told."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("csp", "IMPL")


def register_in_place(op: str, instead: str) -> None:
    """Give an op its kernels for autograd, by the arguments that its schema marks as changed.

    Parameters
    ----------
    op : str
        Such as ``"compact_"``.
    instead : str
        What the message names to whom wants a gradient.
    """
    raw = getattr(torch.ops.csp, op).default
    places = [i for i, a in enumerate(raw._schema.arguments) if a.alias_info and a.alias_info.is_write]
    names = [raw._schema.arguments[i].name for i in places]

    def changed(args: tuple[Any, ...]) -> dict[str, Tensor]:
        caches = dict(zip(names, (args[i] for i in places), strict=True))
        return {name: cache for name, cache in caches.items() if cache is not None}  # None: refused below

    def refuse_gradients(keyset: torch._C.DispatchKeySet, *args: Any, **options: Any) -> Any:
        # torch would take the rows for what they were and differentiate through them
        for name, cache in changed(args).items():
            if cache.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    f"csp::{op}: {name} must not require a gradient, got one that does: use {instead}"
                )
        return raw.redispatch(keyset & torch._C._after_autograd_keyset, *args, **options)

    def mark_changed(keyset: torch._C.DispatchKeySet, *args: Any, **options: Any) -> Any:
        # so that autograd notices where it saved one of them for a backward pass
        torch.autograd.graph.increment_version(list(changed(args).values()))
        return raw.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args, **options)

    _LIBRARY.impl(op, refuse_gradients, "Autograd", with_keyset=True)
    _LIBRARY.impl(op, mark_changed, "ADInplaceOrView", with_keyset=True)
