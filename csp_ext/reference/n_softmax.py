"""Twin of ``n_softmax`` (paper Eq. 7)."""

from __future__ import annotations

import math

import torch


def n_softmax(logits: torch.Tensor, n: float = 1.0) -> torch.Tensor:
    """Softmax over the last dimension with a constant ``n`` in its denominator.

    ``exp(x) / (n + sum exp(x))``, shifted by ``max(max x, log n)`` so that nothing overflows (Eq. 7).

    Parameters
    ----------
    logits : Tensor [..., N]
        Any floating dtype; ``-inf`` marks a masked entry.
    n : float
        At least 0; 0 is the ordinary softmax.

    Returns
    -------
    Tensor [..., N], float64
        A fully masked row is zero, also where ``n`` is 0.
    """
    x = logits.double()
    if x.numel() == 0:
        return x
    log_n = math.log(n) if n > 0 else -math.inf
    shift = x.detach().amax(dim=-1, keepdim=True).clamp_min(log_n)
    shift = torch.where(shift == -math.inf, torch.zeros_like(shift), shift)
    weights = torch.exp(x - shift)
    total = weights.sum(dim=-1, keepdim=True) + torch.exp(log_n - shift)
    return weights / torch.where(total == 0, torch.ones_like(total), total)
