"""Which implementation takes a tensor: the compiled ops, or the float64 twins where no kernel does."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from csp_ext import ops, reference

PRUNING = ("score", "select", "compact")  # what pruning a layer takes


def has_kernel(op: str, device_type: str) -> bool:
    """Return whether a compiled kernel of an op takes tensors of a device type such as "cuda"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"csp::{op}", device_type.upper())


def missing_kernels(device_type: str) -> list[str]:
    """Return the ops of :data:`PRUNING` that have no kernel for a device type."""
    return [op for op in PRUNING if not has_kernel(op, device_type)]


def implementation_for(key: Tensor) -> ModuleType:
    """Return the module whose ops prune `key`: ``csp_ext.ops``, or the slow twins without kernels for it."""
    device_type = key.device.type
    if device_type in ("cpu", "meta"):
        return ops
    return reference if key.dtype == torch.float64 or missing_kernels(device_type) else ops


def has_decode(key: Tensor) -> bool:
    """Return whether the compiled ``decode`` takes caches like `key`."""
    device_type = key.device.type
    return has_kernel("decode", device_type) and (device_type == "cpu" or key.dtype != torch.float64)
