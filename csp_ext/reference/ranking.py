"""Ranks with the project's tie rule, shared by ``dual_top_k`` and ``select``."""

from __future__ import annotations

import torch


def descending_order(values: torch.Tensor, tie: torch.Tensor | None = None) -> torch.Tensor:
    """Order positions by value, larger first; ties by the larger ``tie``, then by the later position.

    A NaN, as value or as tie, comes last.

    Parameters
    ----------
    values, tie : Tensors [N]

    Returns
    -------
    Tensor [N], int64
        Positions, best first.
    """
    order = torch.arange(values.numel() - 1, -1, -1, device=values.device)
    if tie is not None:
        order = _sorted(order, tie)
    return _sorted(order, values)


def _sorted(order: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    order = order[torch.sort(values[order], descending=True, stable=True).indices]
    return order[torch.sort(values[order].isnan(), stable=True).indices]


def ranks(values: torch.Tensor, valid: torch.Tensor, tie: torch.Tensor | None = None) -> torch.Tensor:
    """1-based descending ranks inside the valid entries.

    Parameters
    ----------
    values, tie : Tensors [N]
    valid : Tensor [N], bool

    Returns
    -------
    Tensor [N], int64
        0 where not valid.
    """
    order = descending_order(values, tie)
    order = order[valid[order]]
    out = torch.zeros(values.numel(), dtype=torch.int64, device=values.device)
    out[order] = torch.arange(1, order.numel() + 1, device=values.device)
    return out
