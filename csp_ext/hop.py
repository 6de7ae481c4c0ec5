"""The second hop: what the tokens attend to that the observation window attends to."""

from __future__ import annotations

import torch
from torch import Tensor

from csp_ext.config import ResolvedConfig
from csp_ext.dispatch import implementation_for

Scores = tuple[Tensor, Tensor]


def add_second_hop(
    scores: Scores,
    query: Tensor,
    key: Tensor,
    modality: Tensor,
    query_modality: Tensor,
    resolved: ResolvedConfig,
    scale: float | None,
    causal: bool,
) -> Scores:
    """Add to the window's scores those of the tokens that it attends to most.

    An answer often leads on: a fact names what the next fact is found by, and no token at the end of the
    prompt has looked there. The fact itself can be asked, with its own query, over the whole prompt, and
    over what comes after it, because the answer will repeat it from behind everything.

    Parameters
    ----------
    scores : tuple of Tensor
        (self, cross) of the window, [B, Hs, L] float32 each.
    query : Tensor
        [B, Hq, Q, D], the last Q queries of the prompt. A token before them is not asked.
    key : Tensor
        [B, Hkv, L, D].
    modality : Tensor
        [B, L] int8, -1 padding.
    query_modality : Tensor
        [B, O] int8, the window.
    resolved : ResolvedConfig
        With ``hop`` tokens, at least 1.
    scale, causal
        Of the window's attention.

    Returns
    -------
    tuple of Tensor
        (self, cross), of the same shapes: the window's shares of the candidates' attention, and in both lists
        the share that the hop's queries give, whatever their modality.
    """
    impl = implementation_for(key)
    real = modality >= 0
    candidate = real & (real.flip(1).cumsum(1).flip(1) > resolved.recent)
    first = tuple(_shares(score, candidate) for score in scores)
    # The same tokens for all heads: what matters to one head often leads another one on.
    options = resolved.select_options() | {"budget": resolved.hop + resolved.recent}
    options |= {"k_self": None, "k_cross": None}
    means = [score.mean(1, keepdim=True) for score in first]
    chosen, _ = impl.select(*means, modality, query_modality, causal=causal, **options)
    # Without the recent ones, which stand last, and free slots that no prompt of this length can fill.
    place = chosen[:, 0, max(0, resolved.hop - key.shape[2]) : resolved.hop]
    row = (place - (key.shape[2] - query.shape[2])).long()
    index = row.clamp_min(0)
    asked = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    kinds = modality.gather(1, place.clamp_min(0).long()).masked_fill((place < 0) | (row < 0), -1)
    second = impl.score(
        asked,
        key,
        modality,
        query_modality=kinds,
        scale=scale,
        causal=False,
        **resolved.score_options(),
    )
    share = _shares(second[0] + second[1], candidate)
    return first[0] + share, first[1] + share


def _shares(score: Tensor, candidate: Tensor) -> Tensor:
    """Divide [B, Hs, L] by its sum over the candidates [B, L]; all zeros stay zeros."""
    score = score.masked_fill(~candidate[:, None], 0)
    return score / score.sum(-1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)
