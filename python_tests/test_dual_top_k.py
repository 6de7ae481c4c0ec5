"""dual_top_k: against its twin, masks that broadcast, its fake kernel, its errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numeric import FLOATS, computed_in, dtypes, moved, seeds, strided

import csp_ext
from csp_ext import reference

shapes = st.lists(st.integers(0, 3), min_size=0, max_size=3).flatmap(
    lambda outer: st.integers(0, 150).map(lambda last: (*outer, last))
)


def scores(shape, dtype, seed, levels, device):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return strided((values if levels is None else (values * levels).round()).to(device, dtype), seed)


@given(
    shape=shapes,
    dtype=dtypes,
    seed=seeds,
    levels=st.sampled_from([None, 0, 1, 10]),
    k_self=st.integers(0, 160),
    k_cross=st.integers(0, 160),
    combine=st.sampled_from(["intersection", "union"]),
    masks=st.sampled_from(["none", "self", "cross", "full", "broadcast"]),
)
def test_matches_the_twin(device, shape, dtype, seed, levels, k_self, k_cross, combine, masks):
    dtype = computed_in(dtype, device)
    self, cross = (scores(shape, dtype, seed + i, levels, device) for i in range(2))
    generator = torch.Generator().manual_seed(seed + 2)
    small = (shape[-1],) if masks == "broadcast" else shape
    valid_self, valid_cross = ((torch.rand(small, generator=generator) < 0.6).to(device) for _ in range(2))
    args = (
        k_self,
        k_cross,
        combine,
        None if masks in ("none", "cross") else valid_self,
        None if masks in ("none", "self") else valid_cross,
    )
    got = csp_ext.dual_top_k(self, cross, *args)
    assert got.dtype == torch.bool
    assert torch.equal(got, reference.dual_top_k(self, cross, *args))


def test_equal_scores_go_to_the_later_position_whatever_the_other_list_says(device):
    zeros, rising = torch.zeros(200, device=device), torch.arange(200.0, device=device)
    mask = csp_ext.dual_top_k(zeros, rising.flip(0), 3, 0, "union")
    assert mask.nonzero().flatten().tolist() == [197, 198, 199]


def test_the_twin_ranks_nan_last_too(device):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        own, other = torch.rand(2, 9, generator=generator)
        own[torch.rand(9, generator=generator) < 0.5] = torch.nan
        own, other = own.to(device), other.to(device)
        got, want = (op(own, other, 5, 6) for op in (csp_ext.dual_top_k, csp_ext.reference.dual_top_k))
        assert torch.equal(got, want)


def test_special_values_are_ordered_as_numbers_and_nan_is_last(device):
    inf, nan = float("inf"), float("nan")
    values = torch.tensor([nan, -inf, -1.0, 0.0, -0.0, inf, 1.0], device=device)
    for k, want in enumerate([[], [5], [5, 6], [4, 5, 6], [3, 4, 5, 6], [2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]]):
        for dtype in {computed_in(dtype, device) for dtype in FLOATS}:
            mask = csp_ext.dual_top_k(values.to(dtype), values.to(dtype), k, k)
            assert mask.nonzero().flatten().tolist() == want


def test_threads_do_not_change_a_bit():
    self, cross = torch.randn(2, 17, 900), torch.randn(2, 17, 900)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(csp_ext.dual_top_k(self, cross, 200, 300))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_opcheck(device):
    valid, single = torch.ones(5, dtype=torch.bool, device=device), torch.rand(5, device=device)
    pair, none, empty = (torch.rand(size, device=device) for size in ((2, 5), (0, 5), (3, 0)))
    for args in [
        (pair, pair.clone(), 2, 3),
        (none, none.clone(), 2, 3, "union"),
        (single.clone().requires_grad_(), single, 9, 3, "union", valid, None),
        (empty, empty.clone(), 0, 0, "intersection", None, None),
    ]:
        torch.library.opcheck(torch.ops.csp.dual_top_k.default, args)


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_once_for_many_shapes(device):
    def chosen(self, cross, k):
        return csp_ext.dual_top_k(self, cross, k, k + 1)

    compiled = torch.compile(chosen, backend="aot_eager", fullgraph=True, dynamic=True)
    for keys in (40, 57, 300):
        self, cross = torch.rand(2, 2, keys, device=device)
        assert torch.equal(compiled(self, cross, keys // 4), chosen(self, cross, keys // 4))


S = torch.ones(2, 3, 5)
HUGE = torch.zeros(1).expand(2**31)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((torch.tensor(1.0), torch.tensor(1.0), 1, 1), "self must have at least one dimension"),
        ((S.int(), S.int(), 1, 1), "self must be float32.*got int32"),
        ((S, S.double(), 1, 1), "cross must be float32, got float64"),
        ((S, S[:1], 1, 1), r"cross must have the shape of self \[2, 3, 5\], got \[1, 3, 5\]"),
        ((S, S, -1, 1), "k_self must be >= 0, got -1"),
        ((S, S, 1, -2), "k_cross must be >= 0, got -2"),
        ((S, S, 1, 1, "and"), 'combine must be "intersection", .*got "and"'),
        ((S, S, 1, 1, "calibrated"), 'combine must be "intersection" or "union", got "calibrated"'),
        ((S, S, 1, 1, "union", S), "valid_self must be bool, got float32"),
        ((S, S, 1, 1, "union", None, S.bool()[..., :4]), r"valid_cross must broadcast.*got \[2, 3, 4\]"),
        ((S, S, 1, 1, "union", S.bool()[None]), r"valid_self must broadcast to .*got \[1, 2, 3, 5\]"),
        ((HUGE, HUGE, 1, 1), "N, the last size of self, must be between 0 and 2147483647, got 2147483648"),
    ],
)  # fmt: skip
def test_bad_input(device, args, match):
    args = [moved(arg, device) for arg in args]
    with pytest.raises(ValueError, match=match):
        csp_ext.dual_top_k(*args)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.csp.dual_top_k(*args)


def test_a_wrong_type_is_a_type_error():
    with pytest.raises(TypeError, match="k_self"):
        csp_ext.dual_top_k(S, S, 1.5, 1)
