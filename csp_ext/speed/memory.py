"""The most memory that was held at once, above what was held before."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from csp_ext.evaluation.memory import give_back

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # what Linux takes to forget the high-water mark of the resident set
# glibc's names for when a block gets pages of its own, and for how much free heap it keeps; the values in
# force once a program has freed a large tensor, and the block that is worth pages of its own here.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_USUAL, _EXACT = 32 << 20, 64 << 10


def settle(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        give_back()


@contextmanager
def exact_resident_set(device: torch.device) -> Iterator[None]:
    """Have the resident set follow what is allocated on a CPU: freed tensors leave it at once.

    Otherwise the heap keeps what was freed, by chance more or less of it, and so does its high-water mark.
    It costs time; nothing is to be timed in this block.
    """
    mallopt = None if device.type == "cuda" else getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, _EXACT)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, _USUAL)
        mallopt(_TRIM_THRESHOLD, 2 * _USUAL)


@contextmanager
def quick_collections() -> Iterator[None]:
    """Have Python's collector pass over what is there already: every one of :func:`settle` is a full one."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Peak:
    """Watches from its creation: the allocator on a GPU, the resident set of this process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        try:
            _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
            self._before = _resident("VmRSS")
        except OSError:
            self._known = False

    def bytes(self) -> int | None:
        """Return the most bytes held since then beside those before; None where the system does not say."""
        if not self._known:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _resident("VmHWM") - self._before)


def _resident(name: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
