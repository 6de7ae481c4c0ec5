"""How long a call takes: on the CPU by the wall clock, on a GPU by events over cold caches."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Side = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Median, minimum and maximum of one side, in seconds."""

    median: float
    low: float
    high: float


class Clock(Protocol):
    """Times one call at a time."""

    unit: str  # of printed times
    scale: float  # units in a second

    def prepare(self, side: Side) -> float:
        """Warm a side up; return what `sample` is to know about it."""

    def sample(self, side: Side, prepared: float) -> float:
        """Return the seconds of one call."""

    def new_bytes(self, side: Side) -> int:
        """Return the most bytes that one call holds beside what was there before, its results among them."""


class CpuClock:
    """The wall clock around a call."""

    unit, scale = "ms", 1e3

    def prepare(self, side: Side) -> float:
        side()
        return 0.0

    def sample(self, side: Side, prepared: float) -> float:
        begin = time.perf_counter()
        side()
        return time.perf_counter() - begin

    def new_bytes(self, side: Side) -> int:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as record:
            _results = side()
        events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


class CudaClock:
    """Events around a call that finds the L2 cache cold and the stream busy.

    Before each sample a buffer of four times the L2 cache is read, as often as it takes the host to issue the
    call: so the time is that of the kernels, not of the host that launches them, for us and for every peer.
    It is read, not written, so that no dirty lines are left for the measured call to write back.
    """

    unit, scale = "us", 1e6

    def __init__(self, cuda: Any = torch.cuda, device: str = "cuda") -> None:
        self._cuda = cuda
        l2_bytes = cuda.get_device_properties(torch.device(device)).L2_cache_size
        self._buffer = torch.ones(4 * l2_bytes // 4, device=device)
        self._sink = torch.empty((), device=device)
        self._flush()
        self._flush_s = max(1e-6, min(self._between(self._flush) for _ in range(5)))

    def _flush(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._sink)

    def _between(self, side: Side) -> float:
        begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        side()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def prepare(self, side: Side) -> float:
        host_s = []
        for _ in range(3):
            self._cuda.synchronize()
            begin = time.perf_counter()
            side()
            host_s.append(time.perf_counter() - begin)
        self._cuda.synchronize()
        return min(host_s)

    def sample(self, side: Side, prepared: float) -> float:
        # a side that waits for the device itself cannot be hidden: there is an end to it
        for _ in range(min(100, 2 + int(prepared / self._flush_s))):
            self._flush()
        return self._between(side)

    def new_bytes(self, side: Side) -> int:
        self._cuda.reset_peak_memory_stats()
        before = self._cuda.memory_allocated()
        side()
        return self._cuda.max_memory_allocated() - before

    def graph(self, side: Side, calls: int = 20, repeats: int = 10) -> float | None:
        """Return the seconds a call takes among many in a CUDA graph, caches warm; None if not captured."""
        graph = self._cuda.CUDAGraph()
        try:
            with self._cuda.graph(graph):
                for _ in range(calls):
                    side()
        except RuntimeError:
            self._cuda.synchronize()
            return None
        graph.replay()
        return statistics.median(self._between(graph.replay) for _ in range(repeats)) / calls

    def issue(self, side: Side, calls: int = 50) -> float:
        """Return the seconds a call takes when they follow each other from Python, caches warm."""
        self._cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            side()
        self._cuda.synchronize()
        return (time.perf_counter() - begin) / calls


def interleave(sides: dict[str, Side], repeats: int = 15, clock: Clock | None = None) -> dict[str, Timing]:
    """Time every side in turn, round after round, so that a noisy neighbour hits all alike.

    A side that needs more memory than the device has is left out.
    """
    clock = clock or CpuClock()
    prepared: dict[str, float] = {}
    for name, side in sides.items():
        try:
            prepared[name] = clock.prepare(side)
        except torch.OutOfMemoryError:
            pass
        else:
            continue
        torch.cuda.empty_cache()  # what the failed call held is free by now
    samples: dict[str, list[float]] = {name: [] for name in prepared}
    for _ in range(repeats):
        for name, known in prepared.items():
            samples[name].append(clock.sample(sides[name], known))
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in samples.items()}
