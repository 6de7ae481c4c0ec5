"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return freed memory to the system, where the C library can.

    glibc keeps what is freed between blocks that live on: tensors of ever new sizes, as pruned caches are,
    let a process grow by gigabytes though it holds next to nothing.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
