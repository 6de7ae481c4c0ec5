"""CSP's score step by step, open at the places where the variants differ."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from csp_ext.config import CSPConfig
from csp_ext.dispatch import implementation_for
from csp_ext.methods import Layer, Method, Selection
from csp_ext.selection import window_modality
from variants.smoothing import Past, Smoothing


@dataclass(frozen=True)
class Asking:
    """How the second hop asks; as it is, like the package.

    Attributes
    ----------
    causal : bool
        What is asked sees only what is before it.
    per_head : bool
        Every head asks the tokens that it attends to most itself.
    times : int
        How often what was found is asked in turn.
    split : bool
        Half of the hop's weight goes to keys of the asking token's modality, half to the others.
    """

    causal: bool = False
    per_head: bool = False
    times: int = 1
    split: bool = False


@dataclass(frozen=True)
class Scored(Method):
    """CSP for prompts without padding, under a config that counts self and cross as one list.

    With the smoothing and the hop as they are it keeps what the package's ``CSP(config)`` keeps.

    Attributes
    ----------
    config : CSPConfig
        Its `pool` is not looked at.
    smoothing : Smoothing
        Of the scores that the hop and the budget choose by.
    asking : Asking
        The hop; `config.hop` says how many are asked.
    """

    config: CSPConfig
    smoothing: Smoothing = field(default_factory=Past)
    asking: Asking = field(default_factory=Asking)

    def observes(self, length: int) -> int:
        return length

    def start(self, modality: Tensor, longest: int, left_padded: bool) -> ScoredSelection:
        return ScoredSelection(self, modality)


class ScoredSelection(Selection):
    """A prompt's sizes; the candidates are its first N positions."""

    exact = True

    def __init__(self, method: Scored, modality: Tensor) -> None:
        if bool((modality < 0).any()):
            raise ValueError("modality must have no padding")
        self.method, self.observes = method, modality.shape[1]
        self.sizes = method.config.resolve(modality.shape[1])
        self.window = window_modality(modality, self.sizes)
        self.budget, self.prune_from = self.sizes.budget, self.sizes.prune_from
        self.count = modality.shape[1] - self.sizes.recent
        self.kinds = modality[:, : self.count]

    def select(self, layer: Layer) -> Tensor:
        score = self.hopped(layer, self.attention(layer))
        free = self.budget - self.sizes.recent
        place = best_first(self.method.smoothing(score, self.kinds), score)[..., :free].sort(-1).values
        recent = torch.arange(self.count, layer.key.shape[2]).expand(*place.shape[:2], -1)
        return torch.cat([place, recent], -1).int()

    def attention(self, layer: Layer) -> Tensor:
        """Return what the window's queries attend to, float32 [B, Hkv, N]."""
        own, cross = implementation_for(layer.key).score(
            layer.query[:, :, -self.window.shape[1] :],
            layer.key,
            layer.modality,
            query_modality=self.window,
            scale=layer.scale,
            causal=layer.causal,
            **self.sizes.score_options(),
        )
        return (own + cross)[..., : self.count]

    def hopped(self, layer: Layer, attention: Tensor) -> Tensor:
        """Return the shares of the window's attention, plus those of every hop's."""
        asking = self.method.asking
        total = found = shares(attention)
        for _ in range(asking.times if self.sizes.hop else 0):
            leads = found if asking.per_head else found.mean(1, keepdim=True)
            place = best_first(self.method.smoothing(leads, self.kinds), leads)[..., : self.sizes.hop]
            given = self.asked(layer, place)
            if asking.split:
                asker = self.kinds[:, None].expand(-1, place.shape[1], -1).gather(2, place)
                same = asker[..., None] == self.kinds[:, None, None]
                found = (shares((given * same).sum(2)) + shares((given * ~same).sum(2))) / 2
            else:
                found = shares(given.sum(2))
            total = total + found
        return total

    def asked(self, layer: Layer, place: Tensor) -> Tensor:
        """Return the attention [B, Hkv, m, N] of the queries at positions int64 [B, 1 or Hkv, m]."""
        rows, heads, length, size = layer.key.shape
        grouped = layer.query.view(rows, heads, -1, length, size)
        index = place[:, :, None, :, None].expand(-1, heads, grouped.shape[2], -1, size)
        logits = grouped.gather(3, index) @ layer.key[:, :, None].transpose(3, 4)  # [B, Hkv, G, m, L]
        logits *= size**-0.5 if layer.scale is None else layer.scale
        if self.method.asking.causal:
            logits.masked_fill_(torch.arange(length) > place[:, :, None, :, None], -torch.inf)
        n = torch.tensor(self.method.config.n).log()
        below = torch.logaddexp(logits.logsumexp(-1, keepdim=True), n)
        return (logits - below).exp().mean(2)[..., : self.count]


@dataclass(frozen=True)
class AcrossHeads(Scored):
    """The heads of a layer share their slots: a head that attends more to the candidates keeps more.

    The order is that of AdaKV (Feng et al. 2024), by CSP's score.

    Attributes
    ----------
    floor : float
        Share of its even budget that every head keeps.
    """

    floor: float = 0.2

    def start(self, modality: Tensor, longest: int, left_padded: bool) -> ScoredSelection:
        return AcrossHeadsSelection(self, modality)


class AcrossHeadsSelection(ScoredSelection):
    exact = False
    method: AcrossHeads

    def select(self, layer: Layer) -> Tensor:
        attention = self.attention(layer)
        score = self.hopped(layer, attention)
        smooth = shares(self.method.smoothing(score, self.kinds)) * attention.sum(-1, keepdim=True)
        free = self.budget - self.sizes.recent
        least = math.floor(self.method.floor * free)
        kept = torch.zeros_like(smooth, dtype=torch.bool)
        kept.scatter_(2, best_first(smooth, score)[..., :least], True)
        rest = best_first(smooth.masked_fill(kept, -1).flatten(1), score.flatten(1))
        kept.view(rest.shape).scatter_(1, rest[:, : smooth.shape[1] * (free - least)], True)
        kept = torch.nn.functional.pad(kept, (0, self.sizes.recent), value=True)
        slots = torch.where(kept, torch.arange(kept.shape[-1]), -1).sort(-1).values
        return slots[..., -int(kept.sum(-1).max()) :].int()


def shares(scores: Tensor) -> Tensor:
    """Divide [..., N] by its sum."""
    return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def best_first(smooth: Tensor, score: Tensor) -> Tensor:
    """Return positions, int64 [..., N]: by what is smoothed, then by what is not, then the later first."""
    order = score.shape[-1] - 1 - score.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    return order.gather(-1, smooth.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices)
