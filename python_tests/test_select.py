"""select: against its twin, padding, threads, its fake kernel, its errors."""

from __future__ import annotations

import pytest
import torch
from boundary import assert_select_close
from hypothesis import given
from hypothesis import strategies as st
from numeric import computed_in, dtypes, moved, seeds, strided

import csp_ext
from csp_ext import reference

NAN, INF = float("nan"), float("inf")
COMBINE = ["intersection", "union", "calibrated"]
POOL = ["none", "max", "past", "avg"]


def random_modality(batch, length, generator, kinds, run, padding):
    ids = torch.randint(0, kinds, (batch, length // run + 1), generator=generator)
    ids = ids.repeat_interleave(run, dim=1)[:, :length]
    padded = torch.rand(batch, length, generator=generator) < padding
    return ids.masked_fill(padded, -1).to(torch.int8)


@st.composite
def problems(draw):
    """Draw the tensors, on the CPU, and the options of one call."""
    seed, dtype = draw(seeds), draw(dtypes)
    generator = torch.Generator().manual_seed(seed)
    batch, heads = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    length = draw(st.one_of(st.integers(0, 12), st.integers(60, 260)))
    window = draw(st.integers(0, min(length, 40)))
    levels = draw(st.sampled_from([None, None, 1, 4, 50]))
    self, cross = torch.rand(2, batch, heads, length, generator=generator, dtype=torch.float64).pow(3)
    if levels is not None:
        self, cross = (self * levels).floor(), (cross * levels).floor()
    kinds, run = draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 30]))
    padding = draw(st.sampled_from([0, 0.1, 0.7]))
    modality = random_modality(batch, length, generator, kinds, run, padding)
    query_modality = modality[:, length - window :]
    if draw(st.booleans()):
        query_modality = torch.randint(-1, 3, (batch, window), generator=generator).to(torch.int8)
    budget = draw(st.integers(1, length + 5))
    recent = draw(st.integers(0, min(budget, 20)))
    options = {
        "budget": budget,
        "recent": recent,
        "cross_ratio": draw(st.sampled_from([0, 0.1, 0.25, 0.5, 0.9, 1])),
        "combine": draw(st.sampled_from(COMBINE)),
        "pool": draw(st.sampled_from(POOL)),
        "pool_kernel": draw(st.sampled_from([1, 3, 7, 101])),
        "causal": draw(st.booleans()),
    }
    if options["combine"] != "calibrated" and draw(st.booleans()):
        k_self = draw(st.integers(0, budget - recent))
        options |= {"k_self": k_self, "k_cross": budget - recent - k_self}
    return (self.to(dtype), cross.to(dtype), modality, query_modality), options, seed


@given(problem=problems())
def test_matches_the_twin(device, problem):
    (self, cross, *modalities), options, seed = problem
    dtype = computed_in(self.dtype, device)
    self, cross = (strided(scores.to(device, dtype), seed + i) for i, scores in enumerate((self, cross)))
    tensors = (self, cross, *(modality.to(device) for modality in modalities))
    indices, lengths = csp_ext.select(*tensors, **options)
    assert indices.dtype == lengths.dtype == torch.int32
    assert_select_close(indices, lengths, *tensors, **options)
    if options["pool"] != "avg" and options["combine"] != "calibrated" and tensors[0].dtype == torch.float64:
        # The twin's own arithmetic: nothing may flip.
        want, _ = reference.select(*tensors, **options)
        assert torch.equal(indices, want)


@given(seed=seeds, combine=st.sampled_from(COMBINE), pool=st.sampled_from(POOL))
def test_a_padded_row_equals_the_row_alone(device, seed, combine, pool):
    generator = torch.Generator().manual_seed(seed)
    length, pads, window = 50, 20, 6
    modality = random_modality(1, length, generator, 2, 5, 0).to(device)
    self, cross = torch.rand(2, 1, 2, length, generator=generator).to(device)
    options = {"budget": 24, "recent": 5, "combine": combine, "pool": pool}
    alone, _ = csp_ext.select(self, cross, modality, modality[:, -window:], **options)
    # pads anywhere before the window, which must stay where it is
    place = torch.randperm(length + pads - window, generator=generator)[: length - window].sort().values
    place = torch.cat([place, torch.arange(length + pads - window, length + pads)]).to(device)
    padded = torch.full((1, length + pads), -1, dtype=torch.int8, device=device)
    padded[:, place] = modality
    wide_self, wide_cross = torch.full((2, 1, 2, length + pads), NAN, device=device)
    wide_self[..., place], wide_cross[..., place] = self, cross
    got, lengths = csp_ext.select(wide_self, wide_cross, padded, padded[:, -window:], **options)
    assert torch.equal(got, place.int()[alone.long()])
    assert bool((lengths == 24).all())


def test_expanded_scores_and_heads(device):
    generator = torch.Generator().manual_seed(0)
    self, cross = torch.rand(2, 1, 1, 90, generator=generator).to(device)
    modality = random_modality(2, 90, generator, 2, 9, 0.1).to(device)
    args = (modality, modality[:, -8:])
    wide = csp_ext.select(self.expand(2, 20, 90), cross.expand(2, 20, 90), *args, budget=30)
    slim = csp_ext.select(self.expand(2, 1, 90), cross.expand(2, 1, 90), *args, budget=30)
    assert torch.equal(wide[0], slim[0].expand(2, 20, 30))
    assert torch.equal(wide[1], slim[1].expand(2, 20))


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("pool", POOL)
def test_anything_in_the_scores_is_survived(device, combine, pool):
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([NAN, INF, -INF, -0.0, 0.0, 1.0, -1.0, 1e-45, 3e38])
    self, cross = values[torch.randint(0, len(values), (2, 1, 4, 200), generator=generator)].to(device)
    modality = random_modality(1, 200, generator, 2, 7, 0.1).to(device)
    first = csp_ext.select(self, cross, modality, modality[:, -9:], budget=70, combine=combine, pool=pool)
    again = csp_ext.select(self, cross, modality, modality[:, -9:], budget=70, combine=combine, pool=pool)
    assert bool((first[1] == 70).all())
    assert bool((first[0].diff(dim=-1) > 0).all())
    assert torch.equal(first[0], again[0])


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("pool", POOL)
def test_the_twin_agrees_about_nan_and_infinity(device, combine, pool):
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        own, other = torch.rand(2, 1, 2, 30, dtype=computed_in(torch.float64, device), generator=generator)
        for scores, value in ((own, NAN), (own, INF), (other, NAN), (other, -INF)):
            scores[torch.rand(scores.shape, generator=generator) < 0.15] = value
        modality = torch.randint(-1, 3, (1, 30), generator=generator, dtype=torch.int8)
        own, other, modality = own.to(device), other.to(device), modality.to(device)
        arguments = (own, other, modality, modality[:, -4:])
        options = {"budget": 9, "recent": 2, "combine": combine, "pool": pool, "pool_kernel": 3}
        got, want = csp_ext.select(*arguments, **options), csp_ext.reference.select(*arguments, **options)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


def test_nan_is_kept_last_and_infinity_first(device):
    self = torch.tensor([[[INF, 1, 1, 1, 1, NAN, NAN, 1]]], device=device)
    modality = torch.zeros(1, 8, dtype=torch.int8, device=device)
    for combine in ("intersection", "union", "calibrated"):
        for ratio in (0.0, 0.4):
            options = {"combine": combine, "cross_ratio": ratio, "recent": 0}
            for budget, want in ((1, [0]), (2, [0, 7]), (6, [0, 1, 2, 3, 4, 7]), (7, [0, 1, 2, 3, 4, 6, 7])):
                indices, _ = csp_ext.select(self, self, modality, modality[:, -1:], budget=budget, **options)
                assert indices.flatten().tolist() == want, (combine, ratio, budget)


@pytest.mark.parametrize(
    ("pool", "observer", "budget", "want"),
    [
        ("past", 0, 3, [1, 3, 4]),
        ("past", 0, 4, [1, 2, 3, 4]),
        ("past", 1, 2, [7, 8]),
        ("max", 0, 3, [2, 3, 4]),
    ],
)
def test_past_raises_what_follows_inside_a_run(device, pool, observer, budget, want):
    # with the two before: 1 6 6 6 9 of text and, after padding, 1 8 8 of an image
    self = torch.tensor([[[1, 6, NAN, 0, 9, NAN, 1, 8, 0]]], device=device)
    modality = torch.tensor([[0, 0, 0, 0, 0, -1, 1, 1, 1]], dtype=torch.int8, device=device)
    observers = torch.tensor([[observer]], dtype=torch.int8, device=device)
    options = {"recent": 0, "cross_ratio": 0, "causal": False, "pool_kernel": 5, "pool": pool}
    cross = torch.zeros_like(self)
    indices, _ = csp_ext.select(self, cross, modality, observers, budget=budget, **options)
    assert indices.flatten().tolist() == want


@pytest.mark.parametrize("combine", COMBINE)
def test_threads_do_not_change_a_bit(combine):
    generator = torch.Generator().manual_seed(2)
    self, cross = torch.rand(2, 2, 17, 700, generator=generator)
    modality = random_modality(2, 700, generator, 3, 11, 0.1)
    args = (self, cross, modality, modality[:, -32:])
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(csp_ext.select(*args, budget=200, combine=combine, pool="avg"))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_recent_is_the_window_by_default(device):
    self, cross = torch.rand(2, 1, 1, 30, device=device)
    modality = torch.zeros(1, 30, dtype=torch.int8, device=device)
    indices, _ = csp_ext.select(self, cross, modality, modality[:, -7:], budget=7)
    assert indices.flatten().tolist() == list(range(23, 30))


def test_opcheck(device):
    modality = torch.tensor([[0, 0, 1, 1, -1, 0], [1, 0, 0, 1, 1, 0]], dtype=torch.int8, device=device)
    self, cross = torch.rand(2, 2, 3, 6, device=device)
    for options in [
        {"budget": 4},
        {"budget": 9, "recent": 1, "combine": "calibrated", "pool": "avg", "cross_ratio": 0.2},
        {"budget": 5, "recent": 1, "combine": "union", "k_self": 2, "k_cross": 2, "causal": False},
    ]:
        args = (self.requires_grad_(), cross, modality, modality[:, -2:])
        torch.library.opcheck(torch.ops.csp.select.default, args, options)
    args = (self[:, :0].detach().contiguous(), cross[:, :0].contiguous(), modality, modality[:, -2:])
    torch.library.opcheck(torch.ops.csp.select.default, args, {"budget": 4})


@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiles_once_for_many_prompt_lengths(device):
    def chosen(self, cross, modality, budget):
        return csp_ext.select(self, cross, modality, modality[:, -4:], budget=budget, combine="union")

    compiled = torch.compile(chosen, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (40, 57, 300):
        self, cross = torch.rand(2, 1, 2, length, device=device)
        modality = (torch.arange(length, device=device) % 9 > 5).to(torch.int8)[None]
        got = compiled(self, cross, modality, length // 3)
        want = chosen(self, cross, modality, length // 3)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


S = torch.ones(2, 3, 10)
M = torch.zeros(2, 10, dtype=torch.int8)
Q = torch.zeros(2, 4, dtype=torch.int8)
HUGE = 2**31
LONG = torch.zeros(1).expand(1, 1, HUGE)


@pytest.mark.parametrize(
    ("tensors", "options", "match"),
    [
        ((S[0], S[0], M, Q), {}, r"self must be 3-D \[B, Hs, L\], got 2-D \[3, 10\]"),
        ((S.int(), S.int(), M, Q), {}, "self must be float32.*got int32"),
        ((S, S[0], M, Q), {}, r"cross must be 3-D \[B, Hs, L\], got 2-D"),
        ((S, S.double(), M, Q), {}, "cross must be float32, got float64"),
        ((S, S[:1], M, Q), {}, "cross must have batch size = 2 in dimension 0"),
        ((S, S[:, :1], M, Q), {}, "cross must have score heads = 3 in dimension 1"),
        ((S, S[..., :9], M, Q), {}, "cross must have L = 10 in dimension 2"),
        ((S, S, M[0], Q), {}, "modality must be 2-D"),
        ((S, S, M.long(), Q), {}, "modality must be int8, got int64"),
        ((S, S, M[:, 1:], Q), {}, r"modality must be \[B, L\] = \[2, 10\], got \[2, 9\]"),
        ((S, S, M[:1], Q), {}, r"modality must be \[B, L\] = \[2, 10\], got \[1, 10\]"),
        ((S, S, M, Q[0]), {}, r"query_modality must be 2-D \[B, O\]"),
        ((S, S, M, Q.bool()), {}, "query_modality must be int8, got bool"),
        ((S, S, M, Q[:1]), {}, r"query_modality must be \[B, O\] = "),
        ((S, S, M, M.repeat(1, 2)), {}, r"query_modality must have at most L = 10 queries.*\[2, 20\]"),
        ((S, S, M, Q), {"budget": 0}, "budget must be at least 1, got 0"),
        ((S, S, M, Q), {"budget": -3}, "budget must be at least 1, got -3"),
        ((S, S, M, Q), {"budget": HUGE}, "budget must be between 0 and 2147483647, got 2147483648"),
        ((S, S, M, Q), {"budget": 3}, "recent must be between 0 and budget = 3, got 4 .by default the size"),
        ((S, S, M, Q), {"recent": 6}, "recent must be between 0 and budget = 5, got 6"),
        ((S, S, M, Q), {"recent": -1}, "recent must be between 0 and budget = 5, got -1"),
        ((S, S, M, Q), {"cross_ratio": 1.01}, "cross_ratio must be between 0 and 1, got 1.01"),
        ((S, S, M, Q), {"cross_ratio": -0.1}, "cross_ratio must be between 0 and 1, got -0.1"),
        ((S, S, M, Q), {"cross_ratio": NAN}, "cross_ratio must be between 0 and 1, got nan"),
        ((S, S, M, Q), {"combine": "and"}, 'combine must be .*got "and"'),
        ((S, S, M, Q), {"pool": "sum"}, 'pool must be "none", "max", "past" or "avg", got "sum"'),
        ((S, S, M, Q), {"pool_kernel": 4}, "pool_kernel must be odd and at least 1, got 4"),
        ((S, S, M, Q), {"pool_kernel": -1}, "pool_kernel must be odd and at least 1, got -1"),
        ((S, S, M, Q), {"k_self": 1}, "k_self and k_cross go together, got only k_self = 1"),
        ((S, S, M, Q), {"k_cross": 1}, "k_self and k_cross go together, got only k_cross = 1"),
        ((S, S, M, Q), {"k_self": -1, "k_cross": 1}, "k_self must be >= 0, got -1"),
        ((S, S, M, Q), {"k_self": 1, "k_cross": -1}, "k_cross must be >= 0, got -1"),
        ((S, S, M, Q), {"k_self": 0, "k_cross": 0, "combine": "calibrated"}, 'got "calibrated"'),
        ((S, S, M, Q), {"k_self": 2, "k_cross": 3}, "must leave room for recent = 4 in budget = 5"),
        ((S, S, M, Q), {"k_self": 1, "k_cross": 1, "combine": "union"}, "must leave room for recent"),
        ((S, S, M, Q), {"k_self": 2**62, "k_cross": 2**62, "combine": "union"}, "must leave room for recent"),
        (
            (LONG, LONG, M[:1, :1].expand(1, HUGE), Q[:1]),
            {},
            "L, the last size of self, must be between 0 and 2147483647, got 2147483648",
        ),
    ],
)  # fmt: skip
def test_bad_input(device, tensors, options, match):
    tensors = [moved(tensor, device) for tensor in tensors]
    options = {"budget": 5, **options}
    with pytest.raises(ValueError, match=match):
        csp_ext.select(*tensors, **options)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.csp.select(*tensors, **options)


def test_a_wrong_type_is_a_type_error():
    with pytest.raises(TypeError, match="budget"):
        csp_ext.select(S, S, M, Q, budget=2.5)
