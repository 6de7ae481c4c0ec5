"""What is compared: csp_ext over static caches, and the rivals."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from csp_ext.config import slots_of

Kind = Literal["csp", "static", "dynamic", "gather"]


@dataclass(frozen=True)
class Arm:
    """One way to hold the cache.

    Attributes
    ----------
    kind : str
        "csp": pruned by csp_ext into a cache of fixed capacity, and its own decode attention. "static":
        untouched model, transformers' StaticCache. "dynamic": untouched model, DynamicCache. "gather":
        pruned naively after an untouched prefill, the same evenly spaced positions for all rows and heads,
        and grown by ``cat``.
    kept : int
        Tokens of the prompt that stay.
    budget : float or None
        That as a share of the prompt; None: a handful of tokens, for the step over next to no cache.
    """

    kind: Kind
    kept: int
    budget: float | None

    @property
    def name(self) -> str:
        """Name in tables."""
        share = f"{self.kept} tokens" if self.budget is None else f"{100 * self.budget:.4g} %"
        titles = {"csp": f"csp {share}", "gather": f"gather {share}"}
        return titles.get(self.kind, f"{self.kind}, full")

    @property
    def static(self) -> bool:
        """Whether shapes stay the same from step to step, so that a graph can be compiled."""
        return self.kind in ("csp", "static")

    def applied(self, model: Any) -> Any:
        """Return the context in which the model works this way."""
        if self.kind != "csp":
            return nullcontext()
        from csp_ext.integration import apply

        return apply(model, budget=self.kept, attention="csp")

    def new_cache(self, config: Any, length: int, new_tokens: int) -> Any:
        """Return an empty cache for a prompt of `length` tokens and what is generated."""
        from transformers import DynamicCache, StaticCache

        from csp_ext.integration import CSPStaticCache

        text = config.get_text_config(decoder=True)
        if self.kind == "csp":
            return CSPStaticCache(config, max_new_tokens=new_tokens)
        if self.kind == "static":
            return StaticCache(config=text, max_cache_len=length + new_tokens)
        return DynamicCache(config=text)

    def finish_prefill(self, cache: Any) -> None:
        """Do what this way does to a cache after the prompt; csp_ext has done it by then."""
        if self.kind != "gather":
            return
        length, device = cache.layers[0].keys.shape[2], cache.layers[0].keys.device
        positions = torch.arange(self.kept, device=device) * length // self.kept
        for layer in cache.layers:
            layer.keys = layer.keys.index_select(2, positions)
            layer.values = layer.values.index_select(2, positions)


# Tokens of the step over next to no cache: as few as csp_ext keeps without hesitation.
FEW = 16


def make_arms(budgets: tuple[float, ...], tokens: int) -> list[Arm]:
    """Return all arms for prompts of so many tokens; the untouched ones come first."""
    arms = [Arm("static", tokens, 1.0), Arm("dynamic", tokens, 1.0)]
    arms += [Arm("csp", slots_of(budget, tokens), budget) for budget in budgets]
    arms.append(Arm("csp", FEW, None))
    return arms + [Arm("gather", slots_of(budget, tokens), budget) for budget in budgets if budget < 1]
