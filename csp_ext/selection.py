"""Score and select under a CSPConfig, and the observation window that it asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from csp_ext.config import CSPConfig, ResolvedConfig
from csp_ext.dispatch import implementation_for
from csp_ext.hop import add_second_hop

QUESTION_MOST = 64  # longest window of the "question" rule
QUESTION_FALLBACK = 8  # its window where an image ends the row


def select_tokens(
    query: Tensor,
    key: Tensor,
    modality: Tensor,
    config: CSPConfig | ResolvedConfig,
    *,
    query_modality: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose the tokens that a layer keeps.

    ``score`` and ``select`` with the sizes of ``config``.

    Parameters
    ----------
    query : Tensor [B, Hq, Q, D]
        Post-RoPE queries of the last Q positions, at least the observation window; all L are welcome.
    key : Tensor [B, Hkv, L, D]
        Post-RoPE keys.
    modality : Tensor [B, L], int8
        0 text, 1 image, further ids for other modalities, -1 padding.
    config : CSPConfig or ResolvedConfig
        A CSPConfig is resolved for L tokens.
    query_modality : Tensor [B, O], int8, optional
        The observation window, where the caller has it (:func:`window_modality`). Otherwise it follows from
        ``config``: outside of ``torch.compile`` its extent is read back from the device once per call, and
        inside the last positions are taken, which right padding would push out of the window.
    scale : float, optional
        Default ``D ** -0.5``.
    causal : bool
        Whether a query sees only keys at or before its position.
    lse : Tensor [B, Hq, Q], optional
        As in ``score``, for all of `query`: an attention that returns it has done half of the scoring.

    Returns
    -------
    indices : Tensor [B, Hs, T], int32
        Kept positions, ascending; free slots are -1 and stand at the left.
    lengths : Tensor [B, Hs], int32

    Raises
    ------
    ValueError
        Where ``query`` is shorter than the window, or a prompt of this length cannot be pruned this way.
    """
    resolved = _resolved(modality, config)
    if resolved.keeps_all:
        num_heads = key.shape[1] if resolved.config.heads == "kv" else 1
        return _per_head(_whole_rows(modality, resolved.budget), num_heads)
    if query_modality is None:
        span = None if torch.compiler.is_compiling() else window_span(modality, resolved)
        query_modality = window_modality(modality, resolved, span=span)
    window = query_modality.shape[1]
    if window > query.shape[2]:
        raise ValueError(f"query must hold the last {window} positions, got {query.shape[2]}")
    impl = implementation_for(key)
    scores = impl.score(
        query[:, :, query.shape[2] - window :],
        key,
        modality,
        query_modality=query_modality,
        scale=scale,
        causal=causal,
        lse=None if lse is None else lse[:, :, lse.shape[2] - window :],
        **resolved.score_options(),
    )
    if resolved.config.undivided:
        scores = (scores[0] + scores[1],) * 2
        # Whatever its modality, a key may stand in both lists.
        query_modality, causal = modality, False
    if resolved.hop:
        scores = add_second_hop(scores, query, key, modality, query_modality, resolved, scale, causal)
        query_modality, causal = modality, False
    indices, lengths = impl.select(
        *scores, modality, query_modality, causal=causal, **resolved.select_options()
    )
    if resolved.k_self is not None and resolved.prune_from > resolved.budget:
        return _leave_short_rows(indices, lengths, modality, resolved)
    return indices, lengths


def window_modality(
    modality: Tensor, config: CSPConfig | ResolvedConfig, *, span: int | None = None
) -> Tensor:
    """Return the modality of the observing queries.

    Parameters
    ----------
    modality : Tensor [B, L], int8
    config : CSPConfig or ResolvedConfig
        A CSPConfig is resolved for L tokens.
    span : int, optional
        O, how many of the last positions to describe. Default: the window's size, or 64 for the "question"
        rule, at most L; it follows from ints alone, so nothing is read back from the device. That is enough
        unless padding stands inside or behind a row; :func:`window_span` gives the extent for any padding.

    Returns
    -------
    Tensor [B, O], int8
        -1: this query does not observe.
    """
    resolved = _resolved(modality, config)
    length = modality.shape[1]
    if span is None:
        span = min(resolved.window if isinstance(resolved.window, int) else QUESTION_MOST, length)
    watching = observing(modality, resolved.window)
    return modality.masked_fill(~watching, -1)[:, length - span :]


def window_span(modality: Tensor, config: CSPConfig | ResolvedConfig) -> int:
    """Return how many of the last positions hold every row's window, read back from the device."""
    watching = observing(modality, _resolved(modality, config).window).any(dim=0)  # [L]
    position = torch.arange(watching.numel(), 0, -1, device=modality.device)
    return int(torch.where(watching, position, 0).amax()) if position.numel() else 0


def _resolved(modality: Tensor, config: CSPConfig | ResolvedConfig) -> ResolvedConfig:
    if isinstance(config, ResolvedConfig):
        return config
    if not isinstance(config, CSPConfig):
        raise TypeError(f"config must be a CSPConfig, got {type(config).__name__} {config!r}")
    return config.resolve(modality.shape[1])


def observing(modality: Tensor, window: int | str) -> Tensor:
    """Say which positions [B, L] observe, counting a row from its last real token.

    Parameters
    ----------
    modality : Tensor [B, L], int8
    window : int or "question"
        The last so many tokens, or the text after the last image.

    Returns
    -------
    Tensor [B, L], bool
    """
    real = modality >= 0
    from_end = real.flip(1).cumsum(1).flip(1)  # 1 at the last real token
    if isinstance(window, int):
        return real & (from_end <= window)
    after_image = (modality > 0).flip(1).cumsum(1).flip(1) == 0
    ends_in_image = ~(real & after_image).any(dim=1, keepdim=True)
    limit = torch.where(ends_in_image, QUESTION_FALLBACK, QUESTION_MOST)
    return real & (after_image | ends_in_image) & (from_end <= limit)


def _leave_short_rows(
    indices: Tensor, lengths: Tensor, modality: Tensor, resolved: ResolvedConfig
) -> tuple[Tensor, Tensor]:
    """Undo the pruning of rows below the release's threshold that fit the slots."""
    count = (modality >= 0).sum(dim=1)
    whole = (count < resolved.prune_from) & (count <= resolved.budget)
    all_indices, all_lengths = _per_head(_whole_rows(modality, resolved.budget), indices.shape[1])
    return (
        torch.where(whole[:, None, None], all_indices, indices),
        torch.where(whole[:, None], all_lengths, lengths),
    )


def _whole_rows(modality: Tensor, budget: int) -> Tensor:
    """Return the last ``budget`` real positions of every row [B, T], right-aligned."""
    length = modality.shape[1]
    position = torch.arange(length, dtype=torch.int32, device=modality.device)
    kept = torch.where(modality >= 0, position, -1).sort(dim=1).values
    if budget <= length:
        return kept[:, length - budget :]
    return torch.nn.functional.pad(kept, (budget - length, 0), value=-1)


def _per_head(rows: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    indices = rows[:, None, :].repeat(1, num_heads, 1)
    return indices, (indices >= 0).sum(dim=-1, dtype=torch.int32)
