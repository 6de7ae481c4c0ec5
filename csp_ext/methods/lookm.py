"""LOOK-M (Wan et al. 2024): H2O that may prefer text, and merges what it drops (METHODS B.5)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from csp_ext._fields import check_choice
from csp_ext.methods import merging
from csp_ext.methods.base import Layer, Selection
from csp_ext.methods.ranked import Ranked, RankedSelection, keep_best

TEXT_PRIORS = ("off", "exact", "release")
SINKS = 4  # forced where there is no text prior


@dataclass(frozen=True)
class LookM(Ranked):
    """Keep the keys that all queries attended to most, and the most recent; merge the others into them.

    Attributes
    ----------
    merge : {"none", "average", "weighted", "pivotal"}
        What becomes of a dropped token, in the kept one whose key is most like its own. "pivotal": the mean
        with that token comes in, for every dropped token. "average", "weighted": the token itself, or times
        the similarity, for those of at least average similarity.
    text_prior : {"off", "exact", "release"}
        "off": a row's first 4 tokens are kept, whatever they are. "exact": text comes before anything else,
        within the budget. "release": no text token is dropped, so a row with much text exceeds its budget.
    aligned : bool
        Of "average": False adds the r-th of all dropped tokens to the target of the r-th merging one, as the
        release does.
    """

    merge: str = "pivotal"
    text_prior: str = "off"
    aligned: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("merge", self.merge, merging.MERGES)
        check_choice("text_prior", self.text_prior, TEXT_PRIORS)
        if not isinstance(self.aligned, bool):
            raise TypeError(f"aligned must be a bool, got {type(self.aligned).__name__} {self.aligned!r}")
        if not self.aligned and self.merge != "average":
            raise ValueError(f'aligned=False needs merge="average", got {self.merge!r}')

    def start(self, modality: Tensor, longest: int, left_padded: bool) -> Selection:
        budget, recent = self.sizes(longest)
        return _Selection(self, budget, recent, self.watching(modality, longest), modality)

    def scores(self, layer: Layer, selection: RankedSelection) -> Tensor:
        scores = selection.attention(layer)
        if self.text_prior != "off":
            return scores
        real = layer.modality >= 0
        first = real & (real.cumsum(1) <= SINKS)
        return scores.masked_fill(first[:, None], torch.finfo(torch.float32).max)

    def put_in(self, layer: Layer, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Merge the dropped tokens of a layer, as :meth:`Selection.merge`."""
        gone = merging.dropped(layer.modality >= 0, slots)
        similarity, target = merging.nearest(layer.key, key, slots)
        weight, own = torch.ones_like(similarity), 0.0
        if self.merge == "pivotal":
            weight, own = weight * 0.5, 0.5
        else:
            resembling = merging.resembling(similarity, gone)
            if self.aligned:
                gone = gone & resembling[:, None].expand_as(gone).gather(-1, merging.ranks(gone))
            else:
                target, gone = merging.shifted(target, gone, resembling)
            if self.merge == "weighted":
                weight = similarity.masked_fill(~gone, 0)
        target = target.masked_fill(~gone, -1)
        return (
            merging.merged(key, layer.key, target, weight, own),
            merging.merged(value, layer.value, target, weight, own),
        )


class _Selection(RankedSelection):
    """As ranked; under the released text prior with room for the text that one row has at most."""

    method: LookM

    def __init__(self, method: LookM, budget: int, recent: int, watching: Tensor, modality: Tensor) -> None:
        super().__init__(method, budget, recent, watching)
        self.merges = method.merge != "none"
        if method.text_prior == "release":
            most = int(_old_text(modality, recent).sum(-1).amax())
            self.slots = max(budget, most + recent)
            self.exact = False

    def select(self, layer: Layer) -> Tensor:
        scores = self.method.scores(layer, self)
        prior = self.method.text_prior
        kept = keep_best(
            scores, layer.modality, budget=self.budget, recent=self.recent, text_first=prior != "off"
        )
        if prior != "release":
            return kept
        kept = F.pad(kept, (self.slots - self.budget, 0), value=-1)
        text = _old_text(layer.modality, self.recent)
        stays = text | _last(layer.modality, self.recent)
        position = torch.arange(stays.shape[1], dtype=torch.int32, device=stays.device)
        whole_text = torch.where(stays, position, -1).sort(-1).values
        whole_text = F.pad(whole_text, (self.slots, 0), value=-1)[:, -self.slots :]
        exceeds = text.sum(-1) + self.recent > self.budget
        return torch.where(exceeds[:, None, None], whole_text[:, None], kept)

    def merge(self, layer: Layer, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.method.put_in(layer, slots, key, value)


def _last(modality: Tensor, recent: int) -> Tensor:
    """Return the `recent` last real tokens of each row, bool [B, L]."""
    real = modality >= 0
    return real & (real.flip(1).cumsum(1).flip(1) <= recent)


def _old_text(modality: Tensor, recent: int) -> Tensor:
    """Return the text tokens [B, L], bool, before the `recent` last real ones of each row."""
    return (modality == 0) & ~_last(modality, recent)
