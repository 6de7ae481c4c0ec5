"""What an evaluation compares: methods at budgets, and an oracle that knows the answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from csp_ext.config import slots_of
from csp_ext.dispatch import implementation_for
from csp_ext.methods import METHODS, Full, Method, make_method
from csp_ext.methods.base import Layer, Selection
from csp_ext.methods.ranked import keep_best

FULL, ORACLE = "full", "oracle"
METHOD_NAMES = (*METHODS, ORACLE)
# Its sizes follow from shares of the prompt, as in the released scripts, and not from a number of tokens.
IN_SHARES = ("csp-release",)


@dataclass(frozen=True)
class Arm:
    """A method at a budget.

    Attributes
    ----------
    name : str
        What tables call the method; two arms of one name differ in their budget.
    method : str
        One of ``METHOD_NAMES``.
    budget : float or int
        A share of the prompt, or a number of tokens.
    fields : dict
        Further fields of the method.
    """

    name: str
    method: str
    budget: float | int
    fields: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.method not in METHOD_NAMES:
            raise ValueError(f"method must be one of {', '.join(METHOD_NAMES)}, got {self.method!r}")
        slots_of(self.budget, 1)
        if self.make(1000).delay:
            raise ValueError("delay must be 0 here: an evaluation prunes every method after the same tokens")

    @property
    def label(self) -> str:
        """Name and budget; the full cache has none."""
        return self.name if self.method == FULL else f"{self.name} {shown(self.budget)}"

    def tokens(self, prompt_length: int) -> int:
        """Return T, at most the prompt."""
        return (
            prompt_length if self.method == FULL else min(slots_of(self.budget, prompt_length), prompt_length)
        )

    def make(self, prompt_length: int, *, draw: int = 0) -> Method:
        """Return the method for prompts of one length.

        Parameters
        ----------
        prompt_length : int
            Tokens of the batch's longest prompt; a share becomes the same number of tokens for all methods.
        draw : int
            Seed of a random choice, unless the fields have one.
        """
        if self.method == FULL:
            return Full()
        tokens = self.tokens(prompt_length)
        if self.method == ORACLE:
            return Oracle(tokens, **self.fields)
        if self.method in IN_SHARES:
            share = self.budget if isinstance(self.budget, float) else tokens / prompt_length
            return make_method(self.method, budget=share, **self.fields)
        seeded = {"seed": draw} if self.method == "random" else {}
        return make_method(self.method, budget=tokens, **(seeded | self.fields))


def shown(budget: float | int) -> str:
    """Return a budget as people read it: "20 %" or "300 tok"."""
    return f"{100 * budget:.4g} %" if isinstance(budget, float) else f"{budget} tok"


def arms_of(methods: Iterable[str], budgets: Iterable[float | int]) -> tuple[Arm, ...]:
    """Return every method at every budget, the full cache once."""
    # 1 is one token and 1.0 the whole prompt, but they are equal.
    several = {shown(budget): budget for budget in budgets}
    return tuple(
        Arm(method, method, budget)
        for method in dict.fromkeys(methods)
        for budget in ([1.0] if method == FULL else several.values())
    )


@dataclass(frozen=True, eq=False)
class Oracle(Method):
    """Keep the keys that the right answer attends to: about the best that a choice of keys can do.

    Attributes
    ----------
    budget : int
        Slots per row, recent ones included.
    recent : int
        How many of a row's last tokens are always kept, at most the budget.
    answer : Tensor or None
        bool [B, m]: which of the last m recorded queries are the answer's.
    """

    budget: int
    recent: int = 8
    answer: Tensor | None = None

    def observes(self, length: int) -> int:
        return length

    def start(self, modality: Tensor, longest: int, left_padded: bool) -> Selection:
        if self.answer is None:
            raise ValueError("answer must be given: the oracle looks at the queries of the right answer")
        return _OracleSelection(self, self.answer)


class _OracleSelection(Selection):
    exact = True

    def __init__(self, method: Oracle, answer: Tensor) -> None:
        self.answer, self.recent = answer, min(method.recent, method.budget)
        self.budget, self.prune_from = method.budget, method.budget + 1
        self.observes = answer.shape[1]

    def select(self, layer: Layer) -> Tensor:
        # One modality and no causal limit: the answer's queries stand behind the whole prompt.
        plain = layer.modality.clamp_max(0)
        scores, _ = implementation_for(layer.key).score(
            layer.query[:, :, layer.query.shape[2] - self.observes :],
            layer.key,
            plain,
            query_modality=torch.where(self.answer, 0, -1).to(plain),
            n=0.0,
            scale=layer.scale,
            causal=False,
        )
        return keep_best(scores, layer.modality, budget=self.budget, recent=self.recent)
