"""What part of a forward one kind of work takes, read from torch's profiler."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from csp_ext.speed.clock import timed

T = TypeVar("T")

# What attends: csp_ext's op and those behind torch's scaled_dot_product_attention.
ATTENTION = ("csp::decode", "aten::scaled_dot_product_attention", "aten::_scaled_dot_product")


@dataclass(frozen=True)
class Profile:
    """Seconds of some events and of the whole call.

    Attributes
    ----------
    events : tuple of float
        Of each event in order, on the device that computes.
    total : float
        Of the whole call there.
    wall : float
        From the beginning of the call until its result is there.
    """

    events: tuple[float, ...]
    total: float
    wall: float

    @property
    def share(self) -> float:
        """Part of the whole."""
        return sum(self.events) / self.total

    def typical(self, calls: int) -> float:
        """Return the seconds of one of so many equal calls, the median."""
        each = len(self.events) // calls
        return statistics.median(sum(self.events[at * each : (at + 1) * each]) for at in range(calls))


def profile(device: torch.device, names: Iterable[str], call: Callable[[], T]) -> tuple[Profile, T]:
    """Return how long the events of a call took whose names begin with one of `names`, and its result.

    On a GPU it is the time of their kernels.
    """
    wanted, on_gpu = tuple(names), device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as record:
        wall, result = timed(device, call)
    events: list[Any] = [event for event in record.events() if event.device_type == DeviceType.CPU]
    events.sort(key=lambda event: event.time_range.start)
    found = [event for event in events if _is_outermost(event, wanted)]
    outer = [event for event in events if event.cpu_parent is None]
    total = sum(_seconds(event, on_gpu) for event in outer) if on_gpu else wall
    return Profile(tuple(_seconds(event, on_gpu) for event in found), total, wall), result


def _is_outermost(event: Any, names: tuple[str, ...]) -> bool:
    if not event.name.startswith(names):
        return False
    while event.cpu_parent is not None:
        event = event.cpu_parent
        if event.name.startswith(names):
            return False
    return True


def _seconds(event: Any, on_gpu: bool) -> float:
    return 1e-6 * (event.device_time_total if on_gpu else event.cpu_time_total)
