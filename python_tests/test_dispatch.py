"""Who takes a tensor: kernels, twins, or nobody, and what is said then. Most of this needs no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_bad_input import GOOD

import csp_ext
from csp_ext import CudaStatus, dispatch, ops, reference
from csp_ext.ops import _call, _refusal

CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
NOT_BUILT = CudaStatus(False, "csp_ext was built without CUDA: install it again where nvcc is found")


def test_the_refusal_knows_every_op():
    assert sorted(_refusal.OPS) == sorted(ops.__all__)


@pytest.mark.parametrize("op", _refusal.OPS)
def test_a_kernel_is_there_exactly_where_a_library_brings_one(op):
    assert dispatch.has_kernel(op, "cpu")
    assert dispatch.has_kernel(op, "cuda") == csp_ext.cuda_status().loaded
    assert not dispatch.has_kernel(op, "xpu")


@pytest.mark.parametrize("op", _refusal.OPS)
@pytest.mark.skipif(csp_ext.cuda_status().loaded, reason="the CUDA library takes these calls")
def test_the_raw_op_of_a_backend_without_a_kernel_says_so(op):
    raw = getattr(torch.ops.csp, op).default
    with pytest.raises(NotImplementedError, match=f"^csp::{op}: there is no kernel for tensors on cpu$"):
        raw.redispatch(CUDA, **GOOD[op])


def test_without_the_cuda_library_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setattr(_refusal, "cuda_status", lambda: NOT_BUILT)
    assert _refusal.no_kernel("csp::score", {"cuda:1", "cpu"}) == (
        "csp::score: there is no kernel for tensors on cpu and cuda:1: "
        "csp_ext was built without CUDA: install it again where nvcc is found"
    )
    assert (
        _refusal.no_kernel("csp::score", {"xpu:0"}) == "csp::score: there is no kernel for tensors on xpu:0"
    )


def test_with_it_another_backend_gets_no_advice(monkeypatch):
    monkeypatch.setattr(_refusal, "cuda_status", lambda: CudaStatus(True, ""))
    assert _refusal.no_kernel("csp::score", {"cuda:0", "xpu:0"}).endswith("on cuda:0 and xpu:0")


def test_the_wrapper_says_what_the_raw_op_says():
    sparse = torch.ones(2, 3).to_sparse()
    text = "csp::n_softmax: logits must be a plain strided tensor, got a torch.sparse_coo one"
    with pytest.raises(NotImplementedError, match=text):
        torch.ops.csp.n_softmax(sparse)
    with pytest.raises(TypeError, match=text):
        csp_ext.n_softmax(sparse)


@pytest.mark.parametrize(
    "text",
    [
        "csp::score: kernel score_kernel could not be launched for query float16 [1, 2, 2, 4] on cuda:0: no",
        "csp::score: cuda:1 has compute capability 7.0, the kernels need 7.5 or later",
    ],
)
def test_what_no_argument_is_to_blame_for_stays_a_runtime_error(text):
    def fail() -> None:
        raise RuntimeError(f"{text}\nException raised from somewhere in torch")

    with pytest.raises(RuntimeError) as caught:
        _call.call(fail)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("place", "dtype", "kernels", "module"),
    [
        ("cpu", torch.float64, True, ops),
        ("meta", torch.float32, False, ops),
        ("cuda", torch.float16, True, ops),
        ("cuda", torch.float32, True, ops),
        ("cuda", torch.float64, True, reference),
        ("cuda", torch.bfloat16, False, reference),
        ("xpu", torch.float32, False, reference),
    ],
)
def test_pruning_takes_the_twins_where_no_kernel_does(monkeypatch, place, dtype, kernels, module):
    monkeypatch.setattr(dispatch, "has_kernel", lambda op, device_type: kernels)
    key = SimpleNamespace(device=torch.device(place), dtype=dtype)
    assert dispatch.implementation_for(key) is module
