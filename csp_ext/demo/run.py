"""Generates from one prompt over the full cache and over pruned ones, with the clock and the scales on."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from csp_ext.demo.console import UserError, first_line
from csp_ext.demo.prompts import Prompt
from csp_ext.methods import Method

OnToken = Callable[[str], None]


@dataclass(frozen=True)
class LayerKept:
    """What one layer kept of the prompt.

    Attributes
    ----------
    layer : int
        Index of the decoder layer.
    share : Tensor
        [L] float32, the share of the heads that keep each token.
    """

    layer: int
    share: Tensor

    def tokens(self, modality: Tensor, of: int) -> float:
        """Return how many tokens of one modality were kept, the mean over heads."""
        return float(self.share[modality == of].double().sum())


@dataclass
class Run:
    """One way to generate, and what came of it.

    Attributes
    ----------
    name : str
        Unique among the runs of a prompt.
    method : Method or None
        None for the full cache.
    tokens : list of int
        What was generated.
    cache_bytes : int
        Keys and values of all layers, read off the stored tensors when the first token comes out.
    layers : list of LayerKept
        One per pruned layer; empty where nothing was pruned.
    stats : dict
        ``handle.stats`` in plain numbers; empty for the full cache.
    first_token_s, token_s : list of float
        Seconds from the call to the first token, one per repetition; seconds between tokens.
    """

    name: str
    method: Method | None = None
    tokens: list[int] = field(default_factory=list)
    cache_bytes: int = 0
    layers: list[LayerKept] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    first_token_s: list[float] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)

    def kept(self, prompt: Prompt, modality: int) -> float:
        """Return how many tokens of one modality were kept, the mean over layers and heads."""
        if not self.layers:
            return float((prompt.modality == modality).sum())
        return statistics.fmean(layer.tokens(prompt.modality, modality) for layer in self.layers)

    def kept_total(self, prompt: Prompt) -> float:
        """Return how many tokens were kept, whatever their modality, the mean over layers and heads."""
        if not self.layers:
            return float(prompt.length)
        return statistics.fmean(float(layer.share.double().sum()) for layer in self.layers)


def stored_bytes(cache: Any) -> int:
    """Return the size of a cache's keys and values, read off its tensors."""
    total = 0
    for layer in cache.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            total += tensor.nbytes if isinstance(tensor, Tensor) else 0
    return total


def head_share(indices: Tensor, length: int) -> Tensor:
    """Return the share of heads that keep each token, float32 [length]; `indices` [Hs, T], free slots -1."""
    slots = torch.where(indices < 0, length, indices).long()
    kept = torch.zeros(indices.shape[0], length + 1).scatter_(1, slots, 1.0)
    return kept[:, :length].mean(0)


def compare(
    model: Any,
    prompt: Prompt,
    runs: list[Run],
    new_tokens: int,
    *,
    repeats: int = 1,
    warm_up: bool = False,
    on_token: OnToken | None = None,
) -> list[str]:
    """Fill in every run. Repetitions take turns, so that a busy machine hits all runs alike.

    Parameters
    ----------
    model : PreTrainedModel
        Left as it was.
    prompt : Prompt
        The same for every run.
    runs : list of Run
        Their results are overwritten.
    new_tokens : int
        Upper bound; generation is greedy.
    repeats : int
        Times each run is measured.
    warm_up : bool
        Whether the first run generates two tokens before the clock starts: whatever is loaded at first use
        would else be on its bill alone.
    on_token : callable, optional
        Called with the run's name for every token.

    Returns
    -------
    list of str
        What csp_ext warned about, such as a prompt that could not be pruned.
    """
    tell = on_token or (lambda name: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if warm_up:
            _generate(model, prompt, Run("warm-up", runs[0].method), 2, lambda name: None)
        for _ in range(repeats):
            for run in runs:
                _generate(model, prompt, run, new_tokens, tell)
    own = [str(warning.message) for warning in caught if str(warning.message).startswith("csp_ext:")]
    return list(dict.fromkeys(own))


def _generate(model: Any, prompt: Prompt, run: Run, new_tokens: int, tell: OnToken) -> None:
    from transformers import DynamicCache
    from transformers.generation.streamers import BaseStreamer

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    stamps: list[float] = []

    class Clock(BaseStreamer):
        """Gets the prompt first, then each token as soon as it is known."""

        def put(self, value: Tensor) -> None:
            stamps.append(time.perf_counter())
            if len(stamps) == 2:
                run.cache_bytes = stored_bytes(cache)
            if len(stamps) > 1:
                tell(run.name)

        def end(self) -> None:
            pass

    with _applied(model, run.method) as handle:
        begin = time.perf_counter()
        try:
            output = model.generate(
                **prompt.inputs,
                past_key_values=cache,
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                streamer=Clock(),
            )
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of memory: {first_line(error)}") from error
    run.tokens = output[0, prompt.length :].tolist()
    run.first_token_s.append(stamps[1] - begin)
    run.token_s += [later - earlier for earlier, later in pairwise(stamps[1:])]
    if handle is not None:
        run.stats = handle.stats.to_dict()
        run.layers = [
            LayerKept(layer.layer, head_share(layer.indices[0], prompt.length))
            for layer in handle.stats.layers
        ]


def _applied(model: Any, method: Method | None) -> Any:
    """Return the handle of a pruned run as a context, or an empty context for the full cache."""
    from csp_ext.integration import apply

    if method is None:
        return nullcontext()
    try:
        return apply(model, method=method)
    except (TypeError, ValueError) as error:
        raise UserError(first_line(error)) from error
