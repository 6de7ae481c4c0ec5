"""How many bytes a second this machine reads, measured."""

from __future__ import annotations

import torch

from csp_ext.speed.clock import timed

# Far larger than any cache.
GPU_BYTES, CPU_BYTES, QUICK_BYTES = 4 << 30, 512 << 20, 32 << 20
REPEATS = 7


def measure_bandwidth(device: torch.device, quick: bool = False) -> float:
    """Return the best rate seen of reading a buffer and of copying it, in bytes a second."""
    size = QUICK_BYTES if quick else GPU_BYTES if device.type == "cuda" else CPU_BYTES
    source = torch.ones(size // 8, device=device)
    target = torch.empty_like(source)
    rates = []
    for _ in range(REPEATS):
        read_s, _total = timed(device, source.sum)
        copy_s, _copy = timed(device, lambda: target.copy_(source))
        rates += [source.nbytes / read_s, 2 * source.nbytes / copy_s]
    return max(rates)
