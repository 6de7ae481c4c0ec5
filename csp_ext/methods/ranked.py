"""Methods that rank the tokens of a head by one score: the best stay, and the most recent."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from csp_ext._fields import check_size
from csp_ext.config import slots_of
from csp_ext.dispatch import implementation_for
from csp_ext.methods.base import Layer, Method, Selection
from csp_ext.selection import QUESTION_MOST, observing


@dataclass(frozen=True)
class Ranked(Method):
    """Base of the baselines with one score per key.

    Attributes
    ----------
    budget : float or int
        Slots per row, recent ones included, as in :class:`csp_ext.CSPConfig`.
    recent : int or "half"
        How many of a row's last tokens are always kept, at most the budget.
    window : int, "question", "half" or "all"
        Which queries are looked at, as in :class:`csp_ext.CSPConfig`; "all": those of the whole prompt.
    """

    budget: float | int = 0.2
    recent: int | str = "half"
    window: int | str = "all"

    def __post_init__(self) -> None:
        slots_of(self.budget, 1)
        check_size("recent", self.recent, 0, ("half",))
        check_size("window", self.window, 1, ("question", "half", "all"))

    def observes(self, length: int) -> int:
        window = self._window(length)
        return QUESTION_MOST if window == "question" else int(window)

    def _window(self, length: int) -> int | str:
        if self.window == "all":
            return length
        return max(1, slots_of(self.budget, length) // 2) if self.window == "half" else self.window

    def sizes(self, longest: int) -> tuple[int, int]:
        """Return T and R of a batch whose longest row has `longest` real tokens."""
        budget = slots_of(self.budget, longest)
        recent = max(1, budget // 2) if isinstance(self.recent, str) else self.recent
        return budget, min(recent, budget)

    def watching(self, modality: Tensor, longest: int) -> Tensor:
        """Return the positions [B, L], bool, whose queries are looked at."""
        return observing(modality, self._window(longest))

    def start(self, modality: Tensor, longest: int, left_padded: bool) -> Selection:
        return RankedSelection(self, *self.sizes(longest), self.watching(modality, longest))

    @abstractmethod
    def scores(self, layer: Layer, selection: RankedSelection) -> Tensor:
        """Return [B, Hs, L] float, at least 0; what is not a candidate is not looked at."""


class RankedSelection(Selection):
    """The sizes of one prompt.

    Attributes
    ----------
    recent : int
        R.
    watching : Tensor
        bool [B, L], the positions whose queries are looked at.
    """

    def __init__(self, method: Ranked, budget: int, recent: int, watching: Tensor) -> None:
        self.method, self.budget, self.recent, self.watching = method, budget, recent, watching
        self.prune_from = budget + 1
        position = torch.arange(watching.shape[1], 0, -1, device=watching.device)
        span = torch.where(watching.any(0), position, 0).amax() if watching.numel() else 0
        self.observes = int(span)
        self.exact = True

    def attention(self, layer: Layer) -> Tensor:
        """Return [B, Hkv, L] float32: the attention each key got from the queries looked at, summed.

        An ordinary softmax over the visible keys, the mean over the query heads of a KV head; the matrix of
        a head is never whole in memory.
        """
        shown = min(self.observes, layer.query.shape[2])
        plain = layer.modality.clamp_max(0)
        watched = torch.where(self.watching, 0, -1).to(plain)[:, plain.shape[1] - shown :]
        query = layer.query[:, :, layer.query.shape[2] - shown :].to(layer.key.dtype)
        own, _ = implementation_for(layer.key).score(
            query,
            layer.key,
            plain,
            query_modality=watched,
            n=0.0,
            scale=layer.scale,
            causal=layer.causal,
            lse=None if layer.lse is None else layer.lse[:, :, layer.lse.shape[2] - shown :],
        )
        return own

    def select(self, layer: Layer) -> Tensor:
        scores = self.method.scores(layer, self)
        return keep_best(scores, layer.modality, budget=self.budget, recent=self.recent)


def keep_best(
    scores: Tensor, modality: Tensor, *, budget: int, recent: int, text_first: bool = False
) -> Tensor:
    """Return the `recent` last real tokens of each row and the best of the others.

    Parameters
    ----------
    scores : Tensor
        [B, Hs, L] float32 or float64, at least 0; among equals the later stays.
    modality : Tensor
        [B, L] int8, -1 padding.
    budget, recent : int
        T and R.
    text_first : bool
        Whether every text token comes before every other one.

    Returns
    -------
    Tensor
        int32 [B, Hs, T], ascending, -1 free at the left.
    """
    # One list ranks every real key; with a text query, `self` ranks the text and `cross` what comes after it.
    kinds = modality.clamp_max(1 if text_first else 0)
    indices, _ = implementation_for(scores).select(
        scores,
        scores if text_first else torch.zeros_like(scores),
        kinds,
        kinds.new_zeros(kinds.shape[0], 1),
        budget=budget,
        recent=recent,
        cross_ratio=0.0,
        combine="union",
        pool="none",
        causal=False,
    )
    return indices
