"""Bad input that is alike for all ops: devices, layouts, None, numbers too large, sizes no memory holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import csp_ext

MODALITY = torch.tensor([[0, 1, 1, 0, 1, 0]], dtype=torch.int8)
QUERY, KEY = torch.ones(1, 2, 2, 4), torch.ones(1, 1, 6, 4)
SCORES = torch.rand(1, 1, 6)
GOOD = {
    "n_softmax": {"logits": torch.ones(2, 3)},
    "segmented_column_sum": {
        "attn": torch.ones(1, 2, 2, 6),
        "query_modality": MODALITY[:, :2],
        "key_modality": MODALITY,
    },
    "score": {
        "query": QUERY,
        "key": KEY,
        "modality": MODALITY,
        "query_modality": MODALITY[:, :2],
        "lse": torch.ones(1, 2, 2),
    },
    "dual_top_k": {"self": SCORES, "cross": SCORES, "k_self": 2, "k_cross": 2, "valid_self": SCORES > 0},
    "select": {
        "self": SCORES,
        "cross": SCORES,
        "modality": MODALITY,
        "query_modality": MODALITY[:, :2],
        "budget": 4,
    },
    "compact": {"key": KEY, "value": KEY, "indices": torch.zeros(1, 1, 2, dtype=torch.int32)},
    "compact_": {
        "key": KEY.clone(),
        "value": KEY.clone(),
        "indices": torch.tensor([[[0, 3]]], dtype=torch.int32),
    },
    "prune": {"query": QUERY, "key": KEY, "value": KEY, "modality": MODALITY, "budget": 4},
    "prune_": {
        "query": QUERY,
        "key": KEY.clone(),
        "value": KEY.clone(),
        "modality": MODALITY,
        "budget": 4,
    },
    "decode": {
        "query": QUERY,
        "key": KEY,
        "value": KEY,
        "start": torch.zeros(1, dtype=torch.int32),
        "end": torch.tensor(6, dtype=torch.int32),
    },
}
TENSORS = [
    (op, name) for op, good in GOOD.items() for name, value in good.items() if isinstance(value, torch.Tensor)
]
OPTIONAL = ("lse", "valid_self", "start", "end")


def message(op, change, kind):
    """Return what the wrapper says; the raw op must fail too."""
    arguments = {**GOOD[op], **change}
    getattr(csp_ext, op)(**GOOD[op])
    with pytest.raises(RuntimeError):
        getattr(torch.ops.csp, op)(**arguments)
    with pytest.raises(kind) as caught:
        getattr(csp_ext, op)(**arguments)
    text = str(caught.value)
    assert text.startswith(f"csp::{op}: ")
    assert len(text) < 200
    assert "\n" not in text
    assert ".h" not in text.replace(".heads", "")
    return text


@pytest.mark.parametrize(("op", "name"), [pair for pair in TENSORS if pair[0] != "n_softmax"])
def test_a_meta_tensor_among_others(op, name):
    # Fakes answer for meta tensors; among real ones that answer would be uninitialised memory.
    text = message(op, {name: GOOD[op][name].to("meta")}, ValueError)
    assert "must be on the device of" in text
    assert "meta" in text


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_no_tensor(op, name):
    assert f" {name} must be Tensor" in message(op, {name: [[1.0] * 500] * 9}, TypeError)
    assert f" {name} must be Tensor" in message(op, {name: np.ones(3)}, TypeError)
    if name not in (*OPTIONAL, "query_modality") or op in ("segmented_column_sum", "select"):
        assert f" {name} must be" in message(op, {name: None}, TypeError)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_layouts(op, name):
    good = GOOD[op][name]
    if good.dim() > 0:
        text = message(op, {name: good.to_sparse()}, TypeError)
        assert text == f"csp::{op}: {name} must be a plain strided tensor, got a torch.sparse_coo one"
    if good.dtype == torch.float32 and good.dim() > 1:
        text = message(
            op, {name: torch.nested.nested_tensor([good[0], good[0]], layout=torch.jagged)}, TypeError
        )
        assert text == f"csp::{op}: {name} must be a plain strided tensor, got a nested one"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint8, torch.float8_e8m0fnu])
@pytest.mark.parametrize(("op", "name"), [pair for pair in TENSORS if not pair[0].startswith("compact")])
def test_dtypes(op, name, dtype):
    assert f" {name} " in message(op, {name: torch.zeros(GOOD[op][name].shape, dtype=dtype)}, ValueError)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("select", "budget"),
        ("select", "recent"),
        ("prune", "k_self"),
        ("prune", "pool_kernel"),
        ("prune_", "budget"),
        ("dual_top_k", "k_cross"),
    ],
)
def test_integers(op, name):
    for value in (2**63, -(2**70)):
        assert (
            message(op, {name: value}, ValueError) == f"csp::{op}: {name} must fit into 64 bits, got {value}"
        )
    assert f" {name} must be int" in message(op, {name: 1.5}, TypeError)
    assert f" {name} must be int" in message(op, {name: "4"}, TypeError)


def test_a_scale_beyond_float32():
    for op in ("score", "prune", "prune_", "decode"):
        assert "scale must fit into float32, got 1e+300" in message(op, {"scale": 1e300}, ValueError)


def test_more_than_memory():
    """Sizes that only a stride of 0 can reach: 2^60 bytes and more, refused before anything is written."""
    one, huge = torch.ones(1, 1, 1, 1), 2**40
    logits = one.expand(huge, 2**18, 1, 2)
    assert "no room for a contiguous copy of logits" in message("n_softmax", {"logits": logits}, MemoryError)
    key = one.expand(huge, 2**18, 6, 1)
    indices = torch.zeros(1, 1, 1, dtype=torch.int32).expand(huge, 1, 1)
    assert "out of memory" in message("compact", {"key": key, "value": key, "indices": indices}, MemoryError)
    attn = torch.ones(1, 1, 1, 6).expand(1, 2**57, 2, 6)
    assert "out of memory" in message("segmented_column_sum", {"attn": attn}, MemoryError)
    scores = torch.ones(1, 1, 1).expand(1, 2**58, 6)
    assert "out of memory" in message("select", {"self": scores, "cross": scores}, MemoryError)
    key = one.expand(1, 2**57, 6, 1)
    query = one.expand(1, 2**57, 2, 1)
    assert "out of memory" in message(
        "decode", {"query": query, "key": key, "value": key, "start": None}, MemoryError
    )


def test_a_workspace_beyond_64_bits():
    # "shared" has one output row for 2^41 heads: partial sums of 2^64 bytes, which wrapped around to none.
    query, key = (
        torch.ones(1, 1, 1, 1).expand(1, 2**41, 1, 1),
        torch.ones(1, 1, 1, 1).expand(1, 2**41, 2**20, 1),
    )
    sizes = {
        "query": query,
        "key": key,
        "modality": torch.zeros(1, 2**20, dtype=torch.int8),
        "heads": "shared",
    }
    assert "at most 2^56 products" in message(
        "score", {**sizes, "query_modality": None, "lse": None}, ValueError
    )
    assert "at most 2^56 products" in message("prune", {**sizes, "value": key, "budget": 1}, ValueError)
