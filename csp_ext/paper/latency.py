"""How long a decode step takes over caches of different budgets, and how large they are."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from csp_ext.config import CSPConfig
from csp_ext.demo.run import stored_bytes
from csp_ext.integration import apply
from csp_ext.integration.recording import Recording
from csp_ext.methods import CSP
from csp_ext.speed.clock import paired, quartiles, timed

# Steps of one budget before the next one's turn: short enough that a noisy neighbour hits all alike, long
# enough that a step mostly finds what the step before it left in the processor's caches.
TURN = 8
PRUNES = 3


@dataclass(frozen=True)
class Pruned:
    """One budget.

    Attributes
    ----------
    budget : float
        Share of the prompt's cache.
    step_s : tuple of float
        Seconds of each measured step, in order.
    prune_s : float
        Seconds to score, select and compact all layers, the median; 0 where nothing is dropped.
    prompt_bytes : int
        Keys and values of the prompt as stored.
    final_bytes : int
        Keys and values at the end, with all generated tokens.
    """

    budget: float
    step_s: tuple[float, ...]
    prune_s: float
    prompt_bytes: int
    final_bytes: int

    @property
    def median_s(self) -> float:
        """Seconds of the middle step."""
        return statistics.median(self.step_s)

    @property
    def turns_s(self) -> list[float]:
        """Seconds of the middle step of each turn."""
        return [statistics.median(self.step_s[at : at + TURN]) for at in range(0, len(self.step_s), TURN)]

    def relative_to(self, other: Pruned) -> float:
        """Return the time of a step as a share of another budget's: the median over the turns, in pairs."""
        return paired(self.turns_s, other.turns_s)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """Seconds of a fast and of a slow step."""
        return quartiles(self.step_s)


@dataclass(frozen=True)
class Latency:
    """What was measured of one prompt.

    Attributes
    ----------
    tokens, image_tokens : int
        Of the prompt.
    prefill_s : float
        Seconds of its forward.
    rows : tuple of Pruned
        In the order of the budgets.
    """

    tokens: int
    image_tokens: int
    prefill_s: float
    rows: tuple[Pruned, ...]


@torch.inference_mode()
def measure(
    model: Any,
    inputs: Mapping[str, Tensor],
    budgets: Sequence[float],
    *,
    steps: int,
    warm_up: int,
    progress: Callable[[], None],
) -> Latency:
    """Generate from one prompt over the cache that CSP leaves at each budget, taking turns.

    A step is the forward of one token and the choice of the next, and its key and value join the cache.

    Parameters
    ----------
    model : PreTrainedModel
        Left as it was.
    inputs : mapping
        Of the processor, one row without padding.
    budgets : sequence of float
        Shares of the prompt's cache.
    steps, warm_up : int
        Per budget, measured and before that.
    progress : callable
        Called after every turn; there are :func:`turns` of them.

    Returns
    -------
    Latency
    """
    methods = [CSP(CSPConfig(budget=budget)) for budget in budgets]
    device = model.device
    with apply(model, method="full") as handle:
        length = inputs["input_ids"].shape[1]
        observes = max(method.observes(length) for method in methods)
        Recording.of(handle, inputs, observes)
        prefill_s, recording = timed(device, lambda: Recording.of(handle, inputs, observes))
        caches, prune_s, prompt_bytes = [], [], []
        for method in methods:
            took = []
            for _ in range(PRUNES):
                seconds, (cache, _stats) = timed(device, partial(recording.pruned, method))
                took.append(seconds)
            prune_s.append(statistics.median(took) if method.config.budget != 1.0 else 0.0)
            caches.append(cache)
            prompt_bytes.append(stored_bytes(cache))
        image_tokens = int((recording.modality > 0).sum())
        tokens = [recording.logits.argmax(-1, keepdim=True)] * len(caches)
        times: list[list[float]] = [[] for _ in caches]
        for turn in _turns(warm_up) + _turns(steps):
            for at, cache in enumerate(caches):
                for _ in range(turn):
                    seconds, tokens[at] = timed(device, partial(_step, model, tokens[at], cache))
                    times[at].append(seconds)
                progress()
    rows = (
        Pruned(budget, tuple(took[warm_up:]), pruning, size, stored_bytes(cache))
        for budget, took, pruning, size, cache in zip(
            budgets, times, prune_s, prompt_bytes, caches, strict=True
        )
    )
    return Latency(length, image_tokens, prefill_s, tuple(rows))


def turns(budgets: Sequence[float], steps: int, warm_up: int) -> int:
    """Return how often :func:`measure` reports progress."""
    return len(budgets) * len(_turns(warm_up) + _turns(steps))


def _turns(steps: int) -> list[int]:
    return [min(TURN, steps - at) for at in range(0, steps, TURN)]


def _step(model: Any, token: Tensor, cache: Any) -> Tensor:
    output = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[:, -1].argmax(-1, keepdim=True)
