"""Fixtures shared by all tests: devices, dtypes, and hypothesis profiles."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=500)
# Convolutions of a GPU in float32, not in TF32 whenever that is faster.
torch.backends.cudnn.allow_tf32 = False
settings.load_profile(os.environ.get("CSP_HYPOTHESIS_PROFILE", "default"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test with a `device` argument on the CPU, and on a GPU where its kernels are."""
    if "device" in metafunc.fixturenames:
        from csp_ext.dispatch import has_kernel
        from csp_ext.ops import __all__ as ops

        op = metafunc.module.__name__.removeprefix("test_")
        needed = [op] if op in ops else ops
        on_gpu = torch.cuda.is_available() and all(has_kernel(name, "cuda") for name in needed)
        metafunc.parametrize("device", ["cpu", "cuda"] if on_gpu else ["cpu"], scope="module")
