"""Seconds: of the wall clock on a CPU, of events on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Stopwatch:
    """Marks points in time and tells what lay between them.

    On a GPU a mark is an event in its stream, so that the host neither waits nor is waited for.

    Parameters
    ----------
    device : torch.device
        Where the measured work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note a point in time."""
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def laps(self) -> list[float]:
        """Return the seconds between one mark and the next, once all marked work is done."""
        if not self._on_gpu:
            return [later - earlier for earlier, later in pairwise(self._marks)]
        torch.cuda.synchronize()
        return [earlier.elapsed_time(later) * 1e-3 for earlier, later in pairwise(self._marks)]


def timed(device: torch.device, call: Callable[[], T]) -> tuple[float, T]:
    """Return the seconds of a call until its result is there, and the result."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    watch = Stopwatch(device)
    watch.mark()
    result = call()
    watch.mark()
    return watch.laps()[0], result


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile."""
    if len(samples) < 2:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4)
    return low, high


def paired(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return our time as a share of theirs, turn by turn: the median.

    What else the machine does then hits both sides of a pair alike.
    """
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
