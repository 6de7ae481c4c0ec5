"""How op tests make random inputs and compare with the float64 twins."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

# One rounding of the result's dtype, with room for float32 accumulation.
RTOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from(FLOATS)


def computed_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """Return `dtype`, or float32 for the float64 that the CUDA kernels do not take."""
    return torch.float32 if device == "cuda" and dtype == torch.float64 else dtype


def moved(value: Any, device: str) -> Any:
    """Return a tensor on `device` with its strides, expanded dimensions too; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.device.type == device:
        return value
    small = value
    for dim, stride in enumerate(value.stride()):
        if stride == 0 and value.shape[dim] > 1:
            small = small.narrow(dim, 0, 1)
    return small.to(device).expand(value.shape)


def strided(tensor: Tensor, seed: int) -> Tensor:
    """Return a tensor of equal values whose outer strides are odd and whose storage has an offset."""
    if seed % 3 == 0:
        return tensor
    if seed % 3 == 1 or tensor.dim() < 3:
        wide = torch.empty(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype, device=tensor.device)
        view = wide[..., 2 : 2 + tensor.shape[-1]]
    else:
        # [B, H, L, D] stored as [B, L, H, D]: how a projection leaves the heads.
        view = torch.empty_like(tensor.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    return view.copy_(tensor)


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, atol: float = 0.0) -> None:
    """Compare with a float64 twin at the tolerance of one rounding to `dtype`."""
    torch.testing.assert_close(got.double().cpu(), want.double().cpu(), rtol=RTOL[dtype], atol=atol)
