"""compact_: against compact and its twin bit for bit, its memory, torch's machinery around it, its errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numeric import dtypes, moved, seeds, strided
from torch import Tensor

import csp_ext
from csp_ext import reference


def ascending(rows: int, length: int, budget: int, generator: torch.Generator) -> Tensor:
    """Return [rows, budget] int32: random kept keys in order, in half of the rows behind free slots."""
    indices = torch.full((rows, budget), -1, dtype=torch.int32)
    for row in indices:
        short = bool(torch.randint(2, (), generator=generator))
        kept = int(torch.randint(budget + 1, (), generator=generator)) if short else budget
        row[budget - kept :] = torch.randperm(length, generator=generator)[:kept].sort().values
    return indices


def problem(
    batch: int = 2, heads: int = 3, length: int = 11, budget: int = 6, head_dim: int = 4, value_dim: int = 5,
    score_heads: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    score_heads = heads if score_heads is None else score_heads
    key = torch.randn(batch, heads, length, head_dim, generator=generator).to(device, dtype)
    value = torch.randn(batch, heads, length, value_dim, generator=generator).to(device, dtype)
    indices = ascending(batch * score_heads, length, budget, generator).view(batch, score_heads, budget)
    return key, value, indices.to(device)


def assert_compacts(key: Tensor, value: Tensor, indices: Tensor) -> None:
    """Compare with compact, with the twin, and the slots behind the budget with what they were."""
    budget, before = indices.shape[2], (key.clone(), value.clone())
    want = csp_ext.compact(key, value, indices)
    twin = key.clone(), value.clone()
    reference.compact_(*twin, indices)
    assert csp_ext.compact_(key, value, indices) is None
    for got, new, old, whole in zip((key, value), want, before, twin, strict=True):
        assert torch.equal(got[:, :, :budget], new)
        assert torch.equal(got[:, :, budget:], old[:, :, budget:])
        assert torch.equal(got, whole)


sizes = st.integers(0, 3)


@given(
    batch=sizes, heads=sizes, length=st.integers(0, 70), share=st.floats(0, 1),
    head_dim=st.integers(0, 40), value_dim=st.integers(0, 40), shared=st.booleans(), dtype=dtypes, seed=seeds,
)  # fmt: skip
def test_equals_compact(device, batch, heads, length, share, head_dim, value_dim, shared, dtype, seed):
    score_heads = 1 if shared else heads
    key, value, indices = problem(
        batch, heads, length, round(share * length), head_dim, value_dim, score_heads, dtype, device, seed
    )
    assert_compacts(strided(key, seed), strided(value, seed // 3), indices)


@given(seed=seeds, length=st.integers(1, 60), share=st.floats(0, 1), dtype=dtypes)
def test_free_slots_may_stand_anywhere(device, seed, length, share, dtype):
    key, value, indices = problem(1, 1, length, round(share * length), dtype=dtype, device=device, seed=seed)
    kept = indices[indices >= 0]
    mixed = indices.flatten()[torch.randperm(indices.numel(), generator=torch.Generator().manual_seed(seed))]
    mixed[mixed >= 0] = kept
    assert_compacts(key, value, mixed.view_as(indices))


@pytest.mark.parametrize("shift", [-200, -130, -1, 0, 1, 130, 200])
@pytest.mark.parametrize("head_dim", [3, 64])
def test_every_row_moves_by_the_same_shift(device, shift, head_dim):
    """Left of nothing, by a slot, by more rows than a tile has."""
    key, value, _ = problem(heads=2, length=500, budget=300, head_dim=head_dim, device=device)
    rows = torch.arange(300, dtype=torch.int32, device=device) + shift
    assert_compacts(key, value, rows.clamp_min(-1).expand(2, 2, -1))


def test_what_select_keeps_of_a_padded_batch(device):
    """Rows shorter than the budget stand right-aligned, and so may have to move right."""
    key, value, _ = problem(batch=3, heads=2, length=40, device=device)
    modality = torch.randint(0, 2, (3, 40), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    modality[0, :35], modality[1, 9:] = -1, -1  # left-padded; right-padded, of which nine are real
    modality = modality.to(device)
    scores = torch.rand(2, 3, 2, 40, generator=torch.Generator().manual_seed(1)).to(device)
    indices, lengths = csp_ext.select(*scores, modality, modality[:, -4:], budget=16, recent=4)
    assert lengths[:2].tolist() == [[5, 5], [9, 9]]
    assert_compacts(key, value, indices)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex128, torch.float8_e4m3fn])
def test_any_dtype_is_moved_by_its_bytes(device, dtype):
    key, value, indices = problem(length=40, budget=30, head_dim=7, device=device)
    key, value = (key * 3).to(dtype), (value * 3).to(dtype)
    raw = reference.compact(key.view(torch.uint8), value.view(torch.uint8), indices)
    csp_ext.compact_(key, value, indices)
    assert torch.equal(key[:, :, :30].view(torch.uint8), raw[0])
    assert torch.equal(value[:, :, :30].view(torch.uint8), raw[1])


WIDER = {
    "one after the other": ((2, 2, 3, 11, 4), lambda wide: wide.unbind(0)),
    "batch by batch": ((2, 2, 3, 11, 4), lambda wide: wide.unbind(1)),
    "every second head": ((2, 3, 2, 11, 4), lambda wide: wide.unbind(2)),
    "row by row": ((2, 3, 11, 9), lambda wide: wide.split([4, 5], -1)),
    "value first": ((2, 3, 11, 9), lambda wide: wide.split([5, 4], -1)[::-1]),
    "a projection": ((2, 11, 6, 4), lambda wide: wide.transpose(1, 2).chunk(2, 1)),
}


@pytest.mark.parametrize(("shape", "halves"), WIDER.values(), ids=WIDER)
def test_halves_of_a_wider_tensor(device, shape, halves):
    wide = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    assert_compacts(*halves(wide), problem(device=device)[2])


def test_slices_of_a_larger_buffer_leave_the_rest(device):
    buffer = torch.randn(4, 5, 30, 8, device=device)
    whole, inside = buffer.clone(), (slice(1, 3), slice(1, 4), slice(5, 16))
    key = buffer[inside]
    assert_compacts(key, torch.randn(2, 3, 11, 5, device=device), problem(device=device)[2])
    whole[inside] = key
    assert torch.equal(buffer, whole)


def test_threads_do_not_change_a_bit():
    key, value, indices = problem(heads=8, length=700, budget=500, head_dim=64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append((key.clone(), value.clone()))
            csp_ext.compact_(*results[-1], indices)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_memory_is_allocated():
    key, value, indices = problem(heads=4, length=600, budget=300, head_dim=64)
    with torch.profiler.profile(profile_memory=True) as profile:
        csp_ext.compact_(key, value, indices)
    assert not [event for event in profile.profiler.kineto_results.events() if event.nbytes() > 0]


# ---- torch's machinery ----


def test_opcheck(device):
    for settings in [{}, {"score_heads": 1}, {"budget": 0}, {"batch": 0}, {"dtype": torch.bfloat16}]:
        torch.library.opcheck(torch.ops.csp.compact_.default, problem(**settings, device=device))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(device, backend):
    def prefill(key: Tensor, value: Tensor, indices: Tensor) -> Tensor:
        key = key * 2
        csp_ext.compact_(key, value, indices)
        return key[:, :, : indices.shape[2]] + 1

    torch._dynamo.reset()
    compiled = torch.compile(prefill, fullgraph=True, backend=backend, dynamic=True)
    for seed, length in enumerate((11, 30)):
        key, value, indices = problem(length=length, device=device, seed=seed)
        other = value.clone()
        assert torch.equal(compiled(key, value, indices), prefill(key, other, indices))
        assert torch.equal(value, other)


def test_a_gradient_is_refused_where_one_is_wanted(device):
    key, value, indices = problem(device=device)
    match = "csp::compact_: value must not require a gradient, got one that does: use csp_ext.compact"
    with pytest.raises(ValueError, match=match):
        csp_ext.compact_(key, value.clone().requires_grad_(), indices)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.csp.compact_(key, value.clone().requires_grad_(), indices)
    parameter = value.clone().requires_grad_()
    with torch.no_grad():
        assert_compacts(key, parameter, indices)


def test_autograd_notices_that_a_saved_cache_changed(device):
    key, value, indices = problem(device=device)
    weight = torch.ones((), requires_grad=True, device=device)
    loss = (weight * key).sum()
    csp_ext.compact_(key, value, indices)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode_and_caches_made_in_it(device):
    key, value, indices = problem(device=device)
    with torch.inference_mode():
        assert_compacts(key.clone(), value.clone(), indices)
        made = key.clone()
        assert_compacts(made, value, indices)
    assert value._version == 1
    assert_compacts(made, value.clone(), indices)


# ---- errors ----


def bad(match: str, **changes: Tensor) -> object:
    key, value, indices = problem()
    arguments = {"key": key, "value": value, "indices": indices, **changes}
    return pytest.param(arguments, match, id=match[:40])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        bad(r"csp::compact_: key must be 4-D \[B, Hkv, L, D\], got 3-D", key=torch.ones(3, 11, 4)),
        bad("value must have key's length = 11", value=torch.ones(2, 3, 12, 5)),
        bad("indices must be int32, got int64", indices=torch.zeros(2, 3, 6, dtype=torch.int64)),
        bad("indices must name at most key's L = 11 rows, got T = 12",
            indices=torch.full((2, 3, 12), -1, dtype=torch.int32)),
    ],
)  # fmt: skip
def test_bad_input(device, arguments, match):
    arguments = {name: moved(value, device) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=match):
        csp_ext.compact_(**arguments)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.csp.compact_(**arguments)


OVERLAPS = {
    "key must have elements that share no memory, got strides .0, 88, 8, 1. for shape .2, 3, 11, 5.": (
        lambda wide: (wide[:1, ..., :5].expand(2, -1, -1, -1), wide.new_ones(2, 3, 11, 5))
    ),
    "value must have elements that share no memory, got strides .90, 30, 3, 1.": (
        lambda wide: (wide[..., :5], wide.new_ones(200).as_strided((2, 3, 11, 5), (90, 30, 3, 1)))
    ),
    "value must be clear of key in memory.*got tensors that overlap": lambda wide: (wide, wide),
    "value must be clear of key.*overlap": lambda wide: (wide[..., :5], wide[..., 4:]),
    "value must be clear of key": lambda wide: (wide[..., 2:6], wide[..., :4]),
}


@pytest.mark.parametrize(("match", "caches"), OVERLAPS.items())
def test_memory_that_overlaps(device, match, caches):
    wide = torch.ones(2, 3, 11, 8, device=device)
    indices = problem(device=device)[2]
    with pytest.raises(ValueError, match=match):
        csp_ext.compact_(*caches(wide), indices)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.csp.compact_(*caches(wide), indices)


@pytest.mark.parametrize("score_heads", [1, 3])
@pytest.mark.parametrize(
    ("at", "index", "match"),
    [
        (4, 11, r"indices must lie in \[-1, L = 11\), got 11 at \[1, {head}, 4\]"),
        (4, -2, r"indices must lie in \[-1, L = 11\), got -2 at \[1, {head}, 4\]"),
        (4, 5, r"indices must ascend along T, -1 aside, got 5 too late at \[1, {head}, 4\]"),
        (5, 0, r"indices must ascend along T, -1 aside, got 0 too late at \[1, {head}, 5\]"),
    ],
)
def test_an_index_that_does_not_fit_is_named_with_its_place(score_heads, at, index, match):
    key, value, indices = problem(score_heads=score_heads)
    indices[:] = torch.tensor([-1, 2, 3, 5, 6, 9])
    indices[1, score_heads - 1, at] = index
    before = key.clone()
    match = match.format(head=score_heads - 1)
    with pytest.raises(ValueError, match=match):
        csp_ext.compact_(key, value, indices)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.csp.compact_(key, value, indices)
    assert torch.equal(key, before)


def test_the_twin_needs_room_for_the_rows():
    with pytest.raises(ValueError, match="at most key's L = 11 rows, got T = 12"):
        reference.compact_(*problem()[:2], torch.full((2, 3, 12), -1, dtype=torch.int32))
