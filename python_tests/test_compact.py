"""compact: against its twin bit for bit, its gradient, its fake kernel, its errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numeric import dtypes, moved, seeds, strided

import csp_ext
from csp_ext import reference


def problem(
    batch: int = 2, heads: int = 3, length: int = 11, budget: int = 6, head_dim: int = 4, value_dim: int = 5,
    score_heads: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    score_heads = heads if score_heads is None else score_heads
    key = torch.randn(batch, heads, length, head_dim, generator=generator).to(device, dtype)
    value = torch.randn(batch, heads, length, value_dim, generator=generator).to(device, dtype)
    indices = torch.randint(-1, length, (batch, score_heads, budget), generator=generator, dtype=torch.int32)
    return key, value, indices.to(device)


def assert_equals_twin(key: torch.Tensor, value: torch.Tensor, indices: torch.Tensor) -> None:
    for got, want in zip(
        csp_ext.compact(key, value, indices), reference.compact(key, value, indices), strict=True
    ):
        assert got.dtype == want.dtype
        assert got.is_contiguous()
        assert torch.equal(got, want)


sizes = st.integers(0, 3)


@given(
    batch=sizes, heads=sizes, length=st.integers(0, 60), budget=st.integers(0, 80),
    head_dim=st.integers(0, 40), value_dim=st.integers(0, 40),
    shared=st.booleans(), ascending=st.booleans(), dtype=dtypes, seed=seeds,
)  # fmt: skip
def test_matches_the_twin(
    device, batch, heads, length, budget, head_dim, value_dim, shared, ascending, dtype, seed
):
    score_heads = 1 if shared else heads
    key, value, indices = problem(
        batch, heads, length, budget, head_dim, value_dim, score_heads, dtype, device, seed
    )
    if ascending:
        indices = indices.sort(-1).values
    assert_equals_twin(strided(key, seed), strided(value, seed // 3), indices)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bool, torch.int64, torch.complex128, torch.float8_e4m3fn]
)
def test_any_dtype_is_copied_by_its_bytes(device, dtype):
    key, value, indices = problem(length=40, budget=30, head_dim=7, device=device)
    key, value = (key * 3).to(dtype), (value * 3).to(dtype)
    got_key, got_value = csp_ext.compact(key, value, indices)
    raw = reference.compact(key.view(torch.uint8), value.view(torch.uint8), indices)
    assert torch.equal(got_key.view(torch.uint8), raw[0])
    assert torch.equal(got_value.view(torch.uint8), raw[1])


def test_nan_payloads_and_signed_zeros_survive(device):
    bits = torch.tensor([0x7FC12345, -2147483648, 1, 0x7F800001], dtype=torch.int32, device=device)
    cache = bits.view(torch.float32).expand(1, 1, 5, 4).contiguous()
    got, _ = csp_ext.compact(cache, cache, torch.tensor([[[4, -1]]], dtype=torch.int32, device=device))
    assert got.view(torch.int32).tolist() == [[[bits.tolist(), [0, 0, 0, 0]]]]


def test_views_expanded_batches_and_slices(device):
    key, value, indices = problem(batch=1, length=30, budget=20, head_dim=8, value_dim=8, device=device)
    assert_equals_twin(key.expand(4, -1, -1, -1), value.expand(4, -1, -1, -1), indices.expand(4, -1, -1))
    assert_equals_twin(key[:, 1:, 5:25], value[:, 1:, 5:25], indices[:, 1:, ::2].clamp(max=19))


def test_threads_do_not_change_a_bit():
    key, value, indices = problem(heads=8, length=700, budget=500, head_dim=64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(csp_ext.compact(key, value, indices))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("score_heads", [1, 2])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradient(device, score_heads, compiled):
    key, value, indices = problem(2, 2, 4, 3, 2, 1, score_heads, torch.float64, device)
    key.requires_grad_()
    value.requires_grad_()

    def run(k, v):
        return csp_ext.compact(k, v, indices)

    run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
    assert torch.autograd.gradcheck(run, (key, value), check_batched_grad=False)


def test_gradient_of_one_input_alone(device):
    key, value, _ = problem(batch=1, heads=1, length=4, head_dim=1, value_dim=1, device=device)
    key.requires_grad_()
    new_key, _ = csp_ext.compact(
        key, value, torch.tensor([[[-1, 2, 2, 0]]], dtype=torch.int32, device=device)
    )
    (new_key * torch.tensor([100.0, 1.0, 10.0, 5.0], device=device)[:, None]).sum().backward()
    assert key.grad.flatten().tolist() == [5, 0, 11, 0]


def test_opcheck(device):
    for settings in [
        {},
        {"score_heads": 1},
        {"budget": 0},
        {"batch": 0},
        {"value_dim": 0},
        {"dtype": torch.bfloat16},
    ]:
        key, value, indices = problem(**settings, device=device)
        key.requires_grad_()
        torch.library.opcheck(torch.ops.csp.compact.default, (key, value, indices))


def bad(match: str, **changes: torch.Tensor) -> object:
    key, value, indices = problem()
    arguments = {"key": key, "value": value, "indices": indices, **changes}
    return pytest.param(arguments, match, id=match[:40])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        bad(r"csp::compact: key must be 4-D \[B, Hkv, L, D\], got 3-D", key=torch.ones(3, 11, 4)),
        bad(r"value must be 4-D \[B, Hkv, L, Dv\], got 2-D", value=torch.ones(3, 4)),
        bad("value must be float32, got float64", value=torch.ones(2, 3, 11, 5, dtype=torch.float64)),
        bad("value must have key's batch size = 2", value=torch.ones(1, 3, 11, 5)),
        bad("value must have key's heads = 3", value=torch.ones(2, 4, 11, 5)),
        bad("value must have key's length = 11", value=torch.ones(2, 3, 12, 5)),
        bad("key must have unit stride.*got stride 11", key=torch.ones(2, 3, 4, 11).transpose(2, 3)),
        bad("value must have unit stride.*got stride 11", value=torch.ones(2, 3, 5, 11).transpose(2, 3)),
        bad("indices must be 3-D.*got 2-D", indices=torch.zeros(2, 6, dtype=torch.int32)),
        bad("indices must be int32, got int64", indices=torch.zeros(2, 3, 6, dtype=torch.int64)),
        bad("indices must have key's batch size = 2", indices=torch.zeros(1, 3, 6, dtype=torch.int32)),
        bad("indices must have key's 3 heads or 1, got", indices=torch.zeros(2, 2, 6, dtype=torch.int32)),
        bad("key's length must be between 0 and 2147483647, got 2147483648",
            key=torch.ones(1).expand(2, 3, 2**31, 1), value=torch.ones(1).expand(2, 3, 2**31, 1)),
    ],
)  # fmt: skip
def test_bad_input(device, arguments, match):
    arguments = {name: moved(value, device) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=match):
        csp_ext.compact(**arguments)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.csp.compact(**arguments)


@pytest.mark.parametrize("index", [-2, 11, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("score_heads", [1, 3])
def test_an_index_out_of_range_is_named_with_its_place(index, score_heads):
    key, value, indices = problem(score_heads=score_heads)
    indices[1, score_heads - 1, 4] = index
    match = rf"indices must lie in \[-1, L = 11\), got {index} at \[1, {score_heads - 1}, 4\]"
    with pytest.raises(ValueError, match=match):
        csp_ext.compact(key, value, indices)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.csp.compact(key, value, indices)


def test_a_wrong_type_is_a_type_error():
    with pytest.raises(TypeError, match="indices"):
        csp_ext.compact(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), [0])
