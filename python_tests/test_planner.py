"""The planner: its numbers against what the ops really allocate, read and write."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import dtypes
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import csp_ext

Case = tuple[dict[str, object], dict[str, Tensor], Callable[[], tuple[Tensor, ...]]]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def allocations(call: Callable[[], object]) -> list[int]:
    """Return the bytes of each tensor that the op allocates by itself, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    return [event.cpu_memory_usage for event in recorded.events() if event.name == "aten::empty"]


def cache(batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, heads, length, dim).to(dtype)


def score_case(dtype, batch, kv_heads, group, window, keys, dim, budget, shared, pool) -> Case:
    query, key = cache(batch, kv_heads * group, window, dim, dtype), cache(batch, kv_heads, keys, dim, dtype)
    modality, heads = torch.zeros(batch, keys, dtype=torch.int8), "shared" if shared else "kv"
    shape = {
        "batch": batch, "num_heads": kv_heads * group, "num_kv_heads": kv_heads, "window": window,
        "keys": keys, "head_dim": dim, "heads": heads, "dtype": name_of(dtype),
    }  # fmt: skip
    inputs = {
        "query": query,
        "key": key,
        "modality": modality,
        "query_modality": modality[:, :window].clone(),
    }
    return shape, inputs, lambda: csp_ext.score(**inputs, heads=heads)


def select_case(dtype, batch, kv_heads, group, window, keys, dim, budget, shared, pool) -> Case:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    scores = {
        "self": torch.rand(batch, kv_heads, keys).to(real),
        "cross": torch.rand(batch, kv_heads, keys).to(real),
    }
    modality = torch.zeros(batch, keys, dtype=torch.int8)
    inputs = {**scores, "modality": modality, "query_modality": modality[:, :window].clone()}
    shape = {
        "batch": batch, "score_heads": kv_heads, "keys": keys, "window": window, "budget": budget,
        "pool": pool, "dtype": name_of(real),
    }  # fmt: skip
    return shape, inputs, lambda: csp_ext.select(**inputs, budget=budget, recent=0, pool=pool)


def compact_case(dtype, batch, kv_heads, group, window, keys, dim, budget, shared, pool) -> Case:
    heads = 1 if shared else kv_heads
    indices = torch.zeros(batch, heads, budget, dtype=torch.int32)
    key, value = cache(batch, kv_heads, keys, dim, dtype), cache(batch, kv_heads, keys, dim + 1, dtype)
    shape = {
        "batch": batch, "num_kv_heads": kv_heads, "score_heads": heads, "keys": keys, "budget": budget,
        "head_dim": dim, "value_dim": dim + 1, "dtype": name_of(dtype),
    }  # fmt: skip
    # only the rows that are kept are read
    inputs = {
        "key": key[:, :, :1].expand(-1, -1, budget, -1),
        "value": value[:, :, :1].expand(-1, -1, budget, -1),
    }
    return shape, {**inputs, "indices": indices}, lambda: csp_ext.compact(key, value, indices)


def decode_case(dtype, batch, kv_heads, group, window, keys, dim, budget, shared, pool) -> Case:
    queries = min(window, 8)
    inputs = {
        "query": cache(batch, kv_heads * group, queries, dim, dtype),
        "key": cache(batch, kv_heads, keys, dim, dtype),
        "value": cache(batch, kv_heads, keys, dim, dtype),
    }
    shape = {
        "batch": batch, "num_heads": kv_heads * group, "num_kv_heads": kv_heads, "queries": queries,
        "capacity": keys, "head_dim": dim, "dtype": name_of(dtype),
    }  # fmt: skip
    return shape, inputs, lambda: csp_ext.decode(**inputs)


CASES = {"score": score_case, "select": select_case, "compact": compact_case, "decode": decode_case}


@pytest.mark.parametrize("op", CASES)
@settings(max_examples=15)
@given(
    dtype=dtypes, batch=st.integers(1, 3), kv_heads=st.integers(1, 20), group=st.integers(1, 3),
    window=st.integers(1, 20), keys=st.integers(20, 700), dim=st.integers(1, 20), budget=st.integers(1, 30),
    shared=st.booleans(), pool=st.sampled_from(["none", "max", "past"]),
)  # fmt: skip
def test_the_plan_is_what_happens(op, **sizes):
    shape, inputs, call = CASES[op](**sizes)
    plan = csp_ext.plan(op, **shape, num_threads=torch.get_num_threads())
    outputs = call()
    assert plan["bytes_read"] == sum(t.numel() * t.element_size() for t in inputs.values())
    assert plan["bytes_written"] == sum(t.numel() * t.element_size() for t in outputs)
    results = [t.numel() * t.element_size() for t in outputs]
    scratch = allocations(call)
    for size in results:
        scratch.remove(size)
    assert plan["workspace_bytes"] == sum(scratch)


@pytest.mark.parametrize("heads", ["kv", "shared"])
@pytest.mark.parametrize("place", ["", "_"])
def test_prune_is_the_sum_of_its_parts_but_shares_their_scratch(heads, place):
    key, query = torch.randn(2, 4, 900, 16), torch.randn(2, 8, 32, 16)
    modality, threads = torch.zeros(2, 900, dtype=torch.int8), torch.get_num_threads()
    sizes = {"batch": 2, "window": 32, "keys": 900, "num_threads": threads}
    score_shape = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "heads": heads}
    score_heads = 4 if heads == "kv" else 1
    score = csp_ext.plan("score", **sizes, **score_shape)
    select = csp_ext.plan("select", **sizes, score_heads=score_heads, budget=100, pool="avg")
    compact = csp_ext.plan(
        f"compact{place}", batch=2, num_kv_heads=4, score_heads=score_heads, keys=900, budget=100, head_dim=16
    )
    prune = csp_ext.plan(f"prune{place}", **sizes, **score_shape, budget=100, pool="avg")
    for what in ("bytes_read", "bytes_written", "flops", "tasks"):
        assert prune[what] == score[what] + select[what] + compact[what]
    lists = 2 * math.ceil(2 * score_heads * 900 * 4 / 64) * 64
    assert prune["workspace_bytes"] == lists + max(score["workspace_bytes"], select["workspace_bytes"])
    op, window = getattr(csp_ext, f"prune{place}"), modality[:, :32].clone()
    inputs = {"query": query, "key": key, "value": key.clone(), "modality": modality}
    sizes_taken = allocations(
        lambda: op(**inputs, query_modality=window, budget=100, heads=heads, pool="avg")
    )
    new_caches = [] if place else 2 * [2 * 4 * 100 * 16 * 4]
    indices, lengths = 2 * score_heads * 100 * 4, 2 * score_heads * 4
    assert sorted(sizes_taken) == sorted([*new_caches, indices, lengths, prune["workspace_bytes"]])


def test_flops_are_those_of_the_matrix_products():
    sizes = {"batch": 2, "num_heads": 6, "num_kv_heads": 3, "head_dim": 5}
    assert csp_ext.plan("score", **sizes, window=7, keys=11)["flops"] == 2 * 2 * 6 * 7 * 11 * 5
    assert csp_ext.plan("decode", **sizes, queries=3, capacity=11)["flops"] == 4 * 2 * 6 * 3 * 11 * 5
    assert csp_ext.plan("compact", batch=1, num_kv_heads=3, keys=9, budget=4, head_dim=8)["flops"] == 0


def test_scores_need_no_attention_matrix():
    sizes = {"batch": 1, "num_heads": 32, "num_kv_heads": 32, "head_dim": 128, "keys": 4096, "num_threads": 2}
    small, large = (csp_ext.plan("score", **sizes, window=w)["workspace_bytes"] for w in (64, 1024))
    matrix = 1024 * 4096 * 4
    assert large < matrix / 4
    assert large < 1.1 * small


def test_many_heads_need_no_scratch_beyond_the_cache():
    sizes = {"batch": 4096, "num_heads": 64, "num_kv_heads": 64, "head_dim": 2, "capacity": 4096}
    one, two = (
        csp_ext.plan("decode", **sizes, dtype="float64", num_threads=n)["workspace_bytes"] for n in (1, 2)
    )
    assert two - one == 4096 * 8


def test_tasks_and_bytes_do_not_depend_on_threads():
    sizes = {
        "batch": 1,
        "num_heads": 8,
        "num_kv_heads": 2,
        "window": 64,
        "keys": 4096,
        "head_dim": 64,
        "budget": 500,
    }
    one, many = (csp_ext.plan("prune", **sizes, num_threads=n) for n in (1, 96))
    assert one["workspace_bytes"] < many["workspace_bytes"]
    assert all(one[what] == many[what] for what in ("tasks", "bytes_read", "bytes_written", "flops"))


@pytest.mark.parametrize("op", ["score", "prune", "prune_", "decode"])
def test_empty_problems_need_nothing(op):
    shape = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "batch": 0}
    sizes = {"capacity": 9} if op == "decode" else {"window": 3, "keys": 9}
    plan = csp_ext.plan(op, **shape, **sizes, **({"budget": 5} if op.startswith("prune") else {}))
    assert plan["bytes_read"] == plan["bytes_written"] == plan["flops"] == plan["tasks"] == 0


# ---- CUDA: no GPU is needed ----

PRUNE_SHAPE = {
    "batch": 2, "num_heads": 4, "num_kv_heads": 2, "window": 20, "keys": 300, "head_dim": 64, "budget": 60,
}  # fmt: skip
CUDA_SHAPES = {
    "n_softmax": {"rows": 12, "cols": 300},
    "segmented_column_sum": {"batch": 2, "num_heads": 3, "window": 20, "keys": 300},
    "score": {"batch": 2, "num_heads": 4, "num_kv_heads": 2, "window": 20, "keys": 300, "head_dim": 64},
    "dual_top_k": {"rows": 6, "keys": 300, "k_self": 20, "k_cross": 30, "valid_self": True},
    "select": {"batch": 2, "score_heads": 2, "keys": 300, "window": 20, "budget": 60},
    "compact": {"batch": 2, "num_kv_heads": 2, "keys": 300, "budget": 60, "head_dim": 64},
    "compact_": {"batch": 2, "num_kv_heads": 2, "keys": 300, "budget": 60, "head_dim": 64},
    "prune": PRUNE_SHAPE,
    "prune_": PRUNE_SHAPE,
    "decode": {"batch": 2, "num_heads": 4, "num_kv_heads": 2, "capacity": 300, "head_dim": 64},
}  # fmt: skip
DEVICES = [
    {"multiprocessors": 40, "capability": 75, "shared_bytes": 64 << 10, "l2_bytes": 4 << 20},
    {"multiprocessors": 108, "capability": 80, "shared_bytes": 163 << 10, "l2_bytes": 40 << 20},
    {},
]


@pytest.mark.parametrize("gpu", DEVICES, ids=["sm_75", "sm_80", "default"])
@pytest.mark.parametrize("op", CUDA_SHAPES)
def test_every_op_has_a_plan_for_cuda(op, gpu):
    for dtype in ("float32", "float16", "bfloat16"):
        plan = csp_ext.plan(op, device="cuda", **gpu, **CUDA_SHAPES[op], dtype=dtype)
        assert set(plan) == {"workspace_bytes", "bytes_read", "bytes_written", "flops", "launches"}
        assert plan["launches"] >= 1
        assert plan["workspace_bytes"] >= 0
        assert min(plan["bytes_read"], plan["bytes_written"]) > 0


@pytest.mark.parametrize("op", ["score", "select", "compact", "compact_", "decode"])
def test_both_devices_move_the_same_bytes(op):
    cpu, cuda = (csp_ext.plan(op, device=device, **CUDA_SHAPES[op]) for device in ("cpu", "cuda"))
    assert all(cpu[what] == cuda[what] for what in ("bytes_read", "bytes_written", "flops"))
    assert "launches" not in cpu
    assert "tasks" not in cuda


@pytest.mark.parametrize("place", ["", "_"])
def test_prune_on_cuda_is_its_parts_in_one_workspace(place):
    options = {"combine": "calibrated", "pool": "max", "recent": 8, "cross_ratio": 0.3}
    prune = csp_ext.plan(f"prune{place}", device="cuda", **PRUNE_SHAPE, **options)
    score = csp_ext.plan("score", device="cuda", **CUDA_SHAPES["score"])
    select = csp_ext.plan("select", device="cuda", **CUDA_SHAPES["select"], **options)
    compact = csp_ext.plan(f"compact{place}", device="cuda", **CUDA_SHAPES["compact"])
    for what in ("bytes_read", "bytes_written", "flops", "launches"):
        assert prune[what] == score[what] + select[what] + compact[what]
    lists = 2 * math.ceil(2 * 2 * 300 * 4 / 256) * 256
    assert prune["workspace_bytes"] == lists + max(score["workspace_bytes"], select["workspace_bytes"])


def test_the_default_device_is_an_h200():
    h200 = {"multiprocessors": 132, "capability": 90, "shared_bytes": 232448, "l2_bytes": 60 << 20}
    for op, shape in CUDA_SHAPES.items():
        named = csp_ext.plan(op, device="cuda", **h200, **shape)
        assert named == csp_ext.plan(op, device="cuda", **shape)


def test_the_properties_of_a_gpu_are_those_that_the_planner_takes(monkeypatch):
    properties = SimpleNamespace(
        multi_processor_count=108,
        major=8,
        minor=0,
        shared_memory_per_block_optin=166912,
        L2_cache_size=41943040,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = csp_ext.cuda_device()
    assert device == {
        "multiprocessors": 108, "capability": 80, "shared_bytes": 166912, "l2_bytes": 41943040,
    }  # fmt: skip
    assert csp_ext.plan("compact", device="cuda", **device, **CUDA_SHAPES["compact"])["launches"] >= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: its properties were not read")
def test_the_properties_of_this_gpu():
    device = csp_ext.cuda_device()
    assert (
        device["capability"]
        == 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    )
    assert min(device.values()) > 0


@pytest.mark.parametrize(
    ("op", "changes", "error", "match"),
    [
        (
            "n_softmax",
            {},
            ValueError,
            "op must be score, select, compact, compact_, prune, prune_ or decode on the CPU, got n_softmax",
        ),
        (
            "sort",
            {"device": "cuda"},
            ValueError,
            "op must be n_softmax, .*, prune, prune_ or decode, got sort",
        ),
        ("compact", {"device": "cuda:0"}, ValueError, "device must be cpu or cuda, got cuda:0"),
        ("compact", {"capability": 90}, ValueError, "compact has no size or option capability"),
        ("compact", {"device": "cuda", "num_threads": 2}, ValueError, "has no size or option num_threads"),
        (
            "compact",
            {"device": "cuda", "capability": 70},
            ValueError,
            "capability must be at least 75, got 70",
        ),
        (
            "compact",
            {"device": "cuda", "multiprocessors": 0},
            ValueError,
            "multiprocessors must be at least 1, got 0",
        ),
        ("score", {"device": "cuda", "dtype": "float64"}, ValueError, "float64 is not supported on CUDA"),
        ("select", {"cross_ratio": 1.5}, ValueError, "cross_ratio must be between 0 and 1, got 1.5"),
        ("select", {"k_self": 1}, ValueError, "k_self and k_cross go together"),
        (
            "select",
            {"combine": "sum"},
            ValueError,
            "combine must be one of intersection, union, calibrated, got sum",
        ),
        ("compact", {"budget": None}, ValueError, "compact needs the size budget"),
        ("compact", {"keys": -1}, ValueError, "keys must be between 0 and 2147483647, got -1"),
        ("compact", {"keys": 2**31}, ValueError, "keys must be between 0 and 2147483647, got 2147483648"),
        ("compact", {"keys": 2**80}, TypeError, "keys has the wrong type"),
        ("compact", {"keys": "many"}, TypeError, "keys has the wrong type"),
        (
            "compact",
            {"dtype": "int8"},
            ValueError,
            "dtype must be one of float32, float16, bfloat16, float64, got int8",
        ),
        ("compact_", {"budget": 10}, ValueError, "budget must be at most keys = 9 in place, got 10"),
        ("prune_", {"budget": 301}, ValueError, "budget must be at most keys = 300 in place, got 301"),
        ("compact", {"window": 3}, ValueError, "compact has no size or option window"),
        ("compact", {"budget": 2**31 - 1, "head_dim": 2**31 - 1}, ValueError, "multiply to more than"),
        ("score", {"num_heads": 5}, ValueError, "num_heads must be a multiple of num_kv_heads = 2, got 5"),
        ("score", {"heads": "all"}, ValueError, "heads must be one of kv, shared, got all"),
        ("select", {"pool": "sum"}, ValueError, "pool must be one of none, max, past, avg, got sum"),
    ],
)
def test_bad_input(op, changes, error, match):
    shapes = {
        "compact": {"batch": 1, "num_kv_heads": 2, "keys": 9, "budget": 4, "head_dim": 8},
        "compact_": {"batch": 1, "num_kv_heads": 2, "keys": 9, "budget": 4, "head_dim": 8},
        "score": {"batch": 1, "num_heads": 4, "num_kv_heads": 2, "window": 3, "keys": 9, "head_dim": 8},
        "select": {"batch": 1, "score_heads": 2, "keys": 9, "window": 3, "budget": 4},
        "prune_": PRUNE_SHAPE,
    }
    shape = {**shapes.get(op, {}), **changes}
    with pytest.raises(error, match=match):
        csp_ext.plan(op, **{name: value for name, value in shape.items() if value is not None})
