"""Fixtures shared by all tests: devices, dtypes, and hypothesis profiles."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=500)
settings.load_profile(os.environ.get("CSP_HYPOTHESIS_PROFILE", "default"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every test with a `device` argument on the CPU, and on CUDA where the library is loaded."""
    if "device" in metafunc.fixturenames:
        import csp_ext

        devices = ["cpu", "cuda"] if csp_ext.cuda_status().loaded and torch.cuda.is_available() else ["cpu"]
        metafunc.parametrize("device", devices)
