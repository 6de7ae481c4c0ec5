"""One turn of one arm: a prompt comes in, tokens are generated, the cache goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from csp_ext.demo.run import stored_bytes
from csp_ext.integration.attention import PRUNE_RANGE
from csp_ext.speed.arms import Arm
from csp_ext.speed.clock import Stopwatch, timed
from csp_ext.speed.memory import Peak, settle
from csp_ext.speed.profile import ATTENTION, profile

# Steps that settle: caches, and on a GPU the graph that is recorded for the new buffers.
WARM_STEPS = 8
# Steps at the end of a profiled turn that belong to the profiler.
PROFILED = 8


@dataclass(frozen=True)
class Turn:
    """What was measured in one turn.

    Attributes
    ----------
    first_s : float
        Seconds from the prompt to its first new token, pruning included.
    prune : float or None
        Part of the prefill that goes into scoring, selecting and compacting; None: not profiled, or nothing
        of csp_ext in it.
    step_s : list of float
        Seconds of each step after the warm-up.
    read_tokens : float
        Tokens of a row in the cache that a step reads, the mean over those steps.
    peak : int or None
        Most bytes held beside the model and the inputs.
    prompt_bytes : int
        Keys and values of the prompt as stored, without room for new tokens.
    stored : int
        Bytes of all keys and values at the end, with the room where there is some.
    attention_s : float or None
        Seconds of attention in the middle one of the profiled steps; None: the turn was not profiled.
    attention_tokens : float
        Tokens of a row that these steps read, in the middle of them.
    """

    first_s: float
    prune: float | None
    step_s: list[float]
    read_tokens: float
    peak: int | None
    prompt_bytes: int
    stored: int
    attention_s: float | None
    attention_tokens: float


Forward = Callable[..., Any]


class Decoder:
    """Feeds a model its own tokens, one step at a time, as ``generate`` does when it is greedy."""

    def __init__(self, logits: Tensor, cache: Any, position: int) -> None:
        self._cache = cache
        self._token = _choose(logits)
        self._position = torch.full_like(self._token, position)

    def step(self, forward: Forward) -> None:
        """Take one step."""
        output = forward(
            input_ids=self._token,
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._token = _choose(output.logits)
        self._position = self._position + 1

    def steps(self, forward: Forward, count: int) -> None:
        """Take several steps."""
        for _ in range(count):
            self.step(forward)


def _choose(logits: Tensor) -> Tensor:
    return logits[:, -1].argmax(-1, keepdim=True)


def _prefill(model: Any, inputs: Mapping[str, Tensor], arm: Arm, cache: Any) -> Tensor:
    logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    arm.finish_prefill(cache)
    return logits


def _without_room(cache: Any, room: int) -> int:
    """Return the bytes of what a cache holds, `room` slots of every layer being empty."""
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.nbytes // tensor.shape[2] * (tensor.shape[2] - room) for tensor in tensors)


@torch.no_grad()
def take_turn(
    model: Any,
    inputs: Mapping[str, Tensor],
    arm: Arm,
    new_tokens: int,
    compiled: Forward | None,
    *,
    rehearsal: bool = False,
    profiled: bool = False,
) -> Turn:
    """Measure one turn.

    Parameters
    ----------
    model : PreTrainedModel
        Left as it was.
    inputs : mapping
        Of its forward.
    arm : Arm
        How the cache is held.
    new_tokens : int
        Generated per row, the first of them by the prefill.
    compiled : callable or None
        What steps with constant shapes go through; None: the model itself.
    rehearsal : bool
        Whether a few steps will do.
    profiled : bool
        Whether the prefill and the last steps are profiled; those steps are not timed, and eager.
    """
    device, length = model.device, inputs["input_ids"].shape[1]
    steps = WARM_STEPS + 1 if rehearsal else new_tokens - 1 - (PROFILED if profiled else 0)
    forward = compiled if compiled is not None and arm.static else model
    settle(device)
    with arm.applied(model):
        peak = Peak(device)
        cache = arm.new_cache(model.config, length, new_tokens)
        prefill = partial(_prefill, model, inputs, arm, cache)
        prune = attention_s = None
        if profiled and arm.kind == "csp":
            record, logits = profile(device, (PRUNE_RANGE,), prefill)
            first_s, prune = record.wall, record.share
        else:
            first_s, logits = timed(device, prefill)
        prompt_bytes = _without_room(cache, new_tokens if arm.static else 0)
        decoder = Decoder(logits, cache, length)
        watch = Stopwatch(device)
        watch.mark()
        for _ in range(steps):
            decoder.step(forward)
            watch.mark()
        step_s = watch.laps()[WARM_STEPS:]
        most = peak.bytes()
        if profiled:
            record, _ = profile(device, ATTENTION, partial(decoder.steps, model, PROFILED))
            attention_s = record.typical(PROFILED)
        stored = stored_bytes(cache)
    return Turn(
        first_s=first_s,
        prune=prune,
        step_s=step_s,
        read_tokens=arm.kept + (WARM_STEPS + 1 + steps) / 2,
        peak=most,
        prompt_bytes=prompt_bytes,
        stored=stored,
        attention_s=attention_s,
        attention_tokens=arm.kept + steps + (PROFILED + 1) / 2,
    )
