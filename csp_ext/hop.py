"""The second hop: what the tokens attend to that the observation window attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from csp_ext.config import ResolvedConfig
from csp_ext.dispatch import implementation_for


def add_second_hop(
    scores: tuple[Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    modality: Tensor,
    query_modality: Tensor,
    resolved: ResolvedConfig,
    scale: float | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Add to the window's scores those of the tokens it attends to most.

    An answer often leads on: a fact names what the next fact is found by, and no token of the prompt has looked
    there from the end of it. The query of the fact itself has: it is asked over the whole prompt, also over what
    came after it, since a later token that repeats it will be.

    Parameters
    ----------
    scores : tuple of Tensor
        (self, cross) of the window, [B, Hs, L] float32 each.
    query : Tensor
        [B, Hq, L, D], the whole prompt.
    key : Tensor
        [B, Hkv, L, D].
    modality : Tensor
        [B, L] int8, -1 padding.
    query_modality : Tensor
        [B, O] int8, the window.
    resolved : ResolvedConfig
        With ``hop_tokens`` and ``hop_weight`` in its config.
    scale, causal
        Of the window's attention.

    Returns
    -------
    tuple of Tensor
        (self, cross), each a sum of shares over the candidates.

    Raises
    ------
    ValueError
        If `query` does not hold the whole prompt.
    """
    config, recent = resolved.config, resolved.recent
    rows, num_query_heads, length, head_dim = query.shape
    if length != key.shape[2]:
        raise ValueError(f"query must hold all {key.shape[2]} positions for hop_tokens, got {length}")
    impl = implementation_for(key)
    options = resolved.select_options() | {"budget": config.hop_tokens + recent}
    chosen, _ = impl.select(*scores, modality, query_modality, causal=causal, **options)
    hopping = chosen[:, :, : config.hop_tokens]  # without the recent ones; [B, Hs, m]
    sets = hopping.shape[1]
    place = hopping.clamp_min(0).long()
    grouped = query.unflatten(1, (sets, -1))
    index = place[:, :, None, :, None].expand(-1, -1, grouped.shape[2], -1, head_dim)
    kinds = modality[:, None].expand(-1, sets, -1).gather(2, place).masked_fill(hopping < 0, -1)
    # Every set of heads has queries of its own: it becomes a row.
    second = impl.score(
        grouped.gather(3, index).flatten(0, 1),
        key.unflatten(1, (sets, -1)).flatten(0, 1),
        modality.repeat_interleave(sets, dim=0),
        query_modality=kinds.flatten(0, 1),
        n=config.n,
        scale=scale,
        heads="shared",
        causal=False,
    )
    candidate = (modality >= 0) & (modality.ge(0).flip(1).cumsum(1).flip(1) > recent)
    first_self, first_cross = (_shares(score, candidate) for score in scores)
    next_self, next_cross = (_shares(score.view(rows, sets, -1), candidate) for score in second)
    return first_self + config.hop_weight * next_self, first_cross + config.hop_weight * next_cross


def _shares(score: Tensor, candidate: Tensor) -> Tensor:
    """Divide [B, Hs, L] by its sum over the candidates [B, L]; all zeros stay zeros."""
    score = score.masked_fill(~candidate[:, None], 0)
    return score / score.sum(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)
