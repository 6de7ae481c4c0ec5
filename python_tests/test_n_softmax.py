"""n_softmax: against its twin, its gradient, its fake kernel, its errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numeric import assert_close, computed_in, dtypes, moved, seeds, strided

import csp_ext
from csp_ext import reference

shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3).flatmap(
    lambda outer: st.integers(0, 200).map(lambda last: (*outer, last))
)


@given(
    shape=shapes,
    dtype=dtypes,
    seed=seeds,
    n=st.sampled_from([0.0, 0.3, 1.0, 7.0]),
    spread=st.sampled_from([1, 30]),
)
def test_matches_the_twin(device, shape, dtype, seed, n, spread):
    generator, dtype = torch.Generator().manual_seed(seed), computed_in(dtype, device)
    logits = strided((torch.randn(shape, generator=generator) * spread).to(device, dtype), seed)
    got = csp_ext.n_softmax(logits, n)
    assert got.dtype == dtype
    assert got.shape == logits.shape
    assert_close(got, reference.n_softmax(logits, n), dtype, atol=1e-7)


def test_masked_rows_are_zero_and_huge_logits_are_safe(device):
    logits = torch.tensor([[float("-inf")] * 3, [1e4, -1e4, 0.0]], device=device)
    for n in (0.0, 1.0):
        probs = csp_ext.n_softmax(logits, n)
        assert probs[0].tolist() == [0, 0, 0]
        assert probs[1].tolist() == [1, 0, 0]


def test_zero_n_far_below_zero(device):
    logits = torch.tensor([[-200.0, -200.0], [-1e4, -2e4]], device=device)
    assert csp_ext.n_softmax(logits, 0.0).tolist() == [[0.5, 0.5], [1, 0]]


def test_a_nan_spoils_its_row(device):
    bits = torch.tensor([0x7FC00000, 0x7F800001, -1], dtype=torch.int32, device=device)
    for nan in bits.view(torch.float32):
        logits = torch.stack([torch.zeros(20, device=device)] * 2)
        logits[0, 3] = nan
        assert csp_ext.n_softmax(logits).isnan().all(dim=1).tolist() == [True, False]


def test_gradient():
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: csp_ext.n_softmax(x, 1.5), logits)


def test_gradient_in_float32_is_that_of_the_twin(device):
    logits, weights = torch.randn(2, 3, 70, generator=torch.Generator().manual_seed(0)).to(device)
    grads = []
    for op, dtype in ((csp_ext.n_softmax, torch.float32), (reference.n_softmax, torch.float64)):
        leaf = logits.detach().to(dtype).requires_grad_()
        (op(leaf, 1.5) * weights.to(dtype)).sum().backward()
        grads.append(leaf.grad)
    assert_close(*grads, torch.float32, atol=1e-7)


def test_opcheck(device):
    for shape in [(3, 5), (0, 4), (2, 0)]:
        logits = torch.randn(shape, device=device, requires_grad=True)
        torch.library.opcheck(torch.ops.csp.n_softmax.default, (logits, 1.0))


@pytest.mark.parametrize(
    ("logits", "n", "match"),
    [
        (torch.tensor(1.0), 1.0, "logits must have at least one dimension"),
        (torch.ones(3, dtype=torch.int64), 1.0, "logits must be float32.*got int64"),
        (torch.ones(3), -0.5, "n must be finite and >= 0, got -0.5"),
        (torch.ones(3), float("nan"), "n must be finite and >= 0, got nan"),
    ],
)
def test_bad_input(device, logits, n, match):
    logits = moved(logits, device)
    with pytest.raises(ValueError, match=match):
        csp_ext.n_softmax(logits, n)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.csp.n_softmax(logits, n)


def test_a_wrong_type_is_a_type_error():
    with pytest.raises(TypeError, match="logits"):
        csp_ext.n_softmax([1.0, 2.0])
