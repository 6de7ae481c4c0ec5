"""segmented_column_sum: against its twin, its fake kernel, its errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numeric import computed_in, dtypes, moved, seeds, strided

import csp_ext
from csp_ext import reference


def problem(
    batch: int = 2, heads: int = 3, window: int = 5, keys: int = 9, dtype: torch.dtype = torch.float32,
    device: str = "cpu", seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    attn = torch.rand(batch, heads, window, keys, generator=generator).to(device, dtype)
    query_modality = torch.randint(-1, 3, (batch, window), generator=generator, dtype=torch.int8)
    key_modality = torch.randint(-1, 3, (batch, keys), generator=generator, dtype=torch.int8)
    return attn, query_modality.to(device), key_modality.to(device)


def assert_equals_twin(attn: torch.Tensor, query_modality: torch.Tensor, key_modality: torch.Tensor) -> None:
    rtol = 1e-12 if attn.dtype == torch.float64 else 1e-5
    got = csp_ext.segmented_column_sum(attn, query_modality, key_modality)
    want = reference.segmented_column_sum(attn, query_modality, key_modality)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == (torch.float64 if attn.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(g.double(), w.double(), rtol=rtol, atol=0)


@given(
    batch=st.integers(0, 3), heads=st.integers(0, 3), window=st.integers(0, 40), keys=st.integers(0, 150),
    dtype=dtypes, seed=seeds,
)  # fmt: skip
def test_matches_the_twin(device, batch, heads, window, keys, dtype, seed):
    dtype = computed_in(dtype, device)
    attn, query_modality, key_modality = problem(batch, heads, window, keys, dtype, device, seed)
    assert_equals_twin(strided(attn, seed), strided(query_modality, seed), strided(key_modality, seed))


def test_long_rows_and_many_queries(device):
    assert_equals_twin(*problem(1, 2, 3000, 40, device=device))
    assert_equals_twin(*problem(1, 2, 33, 5000, device=device))
    attn, query_modality, key_modality = problem(1, 2, 30, 70, device=device)
    assert_equals_twin(attn.expand(3, -1, -1, -1), query_modality.expand(3, -1), key_modality.expand(3, -1))


def test_ids_that_differ_are_cross_whatever_they_are(device):
    attn = torch.ones(1, 1, 3, 4, device=device)
    queries = torch.tensor([[0, 127, -128]], dtype=torch.int8, device=device)
    keys = torch.tensor([[0, 127, 5, -1]], dtype=torch.int8, device=device)
    own, other = csp_ext.segmented_column_sum(attn, queries, keys)
    assert own.tolist() == [[[1, 1, 0, 0]]]
    assert other.tolist() == [[[1, 1, 2, 0]]]


def test_nan_does_not_leak_from_what_does_not_count(device):
    attn, query_modality, key_modality = problem(window=20, keys=50, device=device)
    want = csp_ext.segmented_column_sum(attn, query_modality, key_modality)
    attn.masked_fill_((query_modality < 0)[:, None, :, None], float("nan"))
    attn.masked_fill_((key_modality < 0)[:, None, None, :], float("nan"))
    for got, clean in zip(
        csp_ext.segmented_column_sum(attn, query_modality, key_modality), want, strict=True
    ):
        assert torch.equal(got, clean)


def test_threads_do_not_change_a_bit():
    arguments = problem(heads=4, window=50, keys=3000)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(csp_ext.segmented_column_sum(*arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck(device):
    for settings in [{}, {"window": 0}, {"keys": 0}, {"batch": 0}, {"dtype": torch.bfloat16}]:
        torch.library.opcheck(torch.ops.csp.segmented_column_sum.default, problem(**settings, device=device))


def bad(match: str, **changes: torch.Tensor) -> object:
    attn, query_modality, key_modality = problem()
    arguments = {"attn": attn, "query_modality": query_modality, "key_modality": key_modality, **changes}
    return pytest.param(arguments, match, id=match[:40])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        bad(r"csp::segmented_column_sum: attn must be 4-D \[B, H, O, N\], got 2-D", attn=torch.ones(5, 9)),
        bad("attn must be float32.*got int64", attn=torch.ones(2, 3, 5, 9, dtype=torch.int64)),
        bad("attn must have unit stride.*got stride 5", attn=torch.ones(2, 3, 9, 5).transpose(2, 3)),
        bad(r"query_modality must be 2-D \[B, O\], got 1-D", query_modality=torch.zeros(5, dtype=torch.int8)),
        bad("query_modality must be int8, got int64", query_modality=torch.zeros(2, 5, dtype=torch.int64)),
        bad(
            r"query_modality must be \[B, O\] = \[2, 5\], got \[1, 5\]",
            query_modality=torch.zeros(1, 5, dtype=torch.int8),
        ),
        bad(
            r"query_modality must be \[B, O\] = \[2, 5\], got \[2, 4\]",
            query_modality=torch.zeros(2, 4, dtype=torch.int8),
        ),
        bad("key_modality must be int8, got bool", key_modality=torch.zeros(2, 9, dtype=torch.bool)),
        bad(
            r"key_modality must be \[B, N\] = \[2, 9\], got \[2, 5\]",
            key_modality=torch.zeros(2, 5, dtype=torch.int8),
        ),
    ],
)
def test_bad_input(device, arguments, match):
    arguments = {name: moved(value, device) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=match):
        csp_ext.segmented_column_sum(**arguments)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.csp.segmented_column_sum(**arguments)
