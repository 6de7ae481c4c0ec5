"""The twins against plain-Python definitions, and the check of selections against what it must catch."""

from __future__ import annotations

import math
from fractions import Fraction

import brute_force
import pytest
import torch
from boundary import assert_select_close
from hypothesis import given
from hypothesis import strategies as st

from csp_ext import reference

seeds = st.integers(0, 2**31 - 1)


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def random_modality(batch, length, generator, padding=True):
    """Runs of text, image and video with padding anywhere."""
    lengths = torch.randint(1, 6, (batch, length), generator=generator)
    kinds = torch.randint(-1 if padding else 0, 3, (batch, length), generator=generator)
    rows = [torch.repeat_interleave(kinds[b], lengths[b])[:length] for b in range(batch)]
    return torch.stack(rows).to(torch.int8)


@st.composite
def selections(draw, exact_scores=True):
    """A select problem: scores with many ties, or continuous ones."""
    generator = generator_of(draw(seeds))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    length = draw(st.integers(1, 24))
    window = draw(st.integers(0, min(6, length)))
    modality = random_modality(batch, length, generator)
    query_modality = modality[:, length - window :].clone()
    query_modality[torch.rand(query_modality.shape, generator=generator) < 0.2] = -1
    shape = (2, batch, heads, length)
    levels = torch.randint(0, 5, shape, generator=generator) / 8
    self_score, cross_score = levels if exact_scores else torch.rand(shape, generator=generator) ** 4
    budget = draw(st.integers(1, length + 2))
    options = {
        "budget": budget,
        "recent": draw(st.integers(0, budget)),
        "cross_ratio": draw(st.sampled_from([0.0, 0.0004, 0.1, 0.333, 0.5, 0.9, 1.0])),
        "combine": draw(st.sampled_from(["intersection", "union", "calibrated"])),
        "pool": draw(st.sampled_from(["none", "max", "past", "avg"])),
        "pool_kernel": draw(st.sampled_from([1, 3, 7])),
        "causal": draw(st.booleans()),
    }
    if options["combine"] != "calibrated" and draw(st.booleans()):
        room = budget - options["recent"]
        options["k_self"] = draw(st.integers(0, room))
        fits = room - options["k_self"] if options["combine"] == "union" else length
        options["k_cross"] = draw(st.integers(0, fits))
    return (self_score, cross_score, modality, query_modality), options


@given(n=st.sampled_from([0.0, 0.5, 1.0, 8.0]), seed=seeds, size=st.integers(0, 9))
def test_n_softmax_is_eq_7(n, seed, size):
    logits = torch.randn(3, size, generator=generator_of(seed)) * 4
    logits[torch.rand(logits.shape, generator=generator_of(seed)) < 0.3] = -math.inf
    got = reference.n_softmax(logits, n)
    assert got.dtype == torch.float64
    for row, want in zip(got.tolist(), logits.tolist(), strict=True):
        total = n + sum(math.exp(x) for x in want)
        assert row == pytest.approx([math.exp(x) / total if total else 0.0 for x in want], rel=1e-12)


def test_n_softmax_does_not_overflow():
    assert reference.n_softmax(torch.tensor([1e30, 1e30]), 1.0).tolist() == [0.5, 0.5]
    assert reference.n_softmax(torch.tensor([-1e30, -1e30]), 1.0).tolist() == [0.0, 0.0]
    assert reference.n_softmax(torch.tensor([-1e30, -1e30]), 0.0).tolist() == [0.5, 0.5]


@given(seed=seeds)
def test_segmented_column_sum_is_eq_1(seed):
    generator = generator_of(seed)
    attn = torch.rand(2, 3, 5, 7, generator=generator)
    queries, keys = random_modality(2, 5, generator), random_modality(2, 7, generator)
    got = reference.segmented_column_sum(attn, queries, keys)
    for b, h, j in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(7)).tolist():
        want = [0.0, 0.0]
        for i in range(5):
            if queries[b, i] >= 0 and keys[b, j] >= 0:
                want[int(queries[b, i] != keys[b, j])] += float(attn[b, h, i, j])
        assert [float(part[b, h, j]) for part in got] == pytest.approx(want, rel=1e-12)


@given(
    seed=seeds,
    length=st.integers(0, 9),
    group=st.integers(1, 3),
    heads=st.sampled_from(["kv", "shared"]),
    n=st.sampled_from([0.0, 1.0, 3.0]),
    causal=st.booleans(),
)
def test_score_is_the_definition(seed, length, group, heads, n, causal):
    generator = generator_of(seed)
    window = min(length, 4)
    query = torch.randn(2, 2 * group, window, 4, generator=generator)
    key = torch.randn(2, 2, length, 4, generator=generator)
    modality = random_modality(2, length, generator) if length else torch.zeros(2, 0, dtype=torch.int8)
    query_modality = modality[:, length - window :].clone()
    query_modality[torch.rand(query_modality.shape, generator=generator) < 0.2] = -1
    options = {"query_modality": query_modality, "n": n, "scale": 0.7, "heads": heads, "causal": causal}
    got = reference.score(query, key, modality, **options)
    logits = 0.7 * query.double() @ key.double().repeat_interleave(group, 1).mT
    rows = torch.tensor(
        [
            [
                brute_force.score_row(head.tolist(), mod.tolist(), observers.tolist(), n, causal)
                for head in row
            ]
            for row, mod, observers in zip(logits, modality, query_modality, strict=True)
        ],
        dtype=torch.float64,
    ).reshape(2, 2 * group, 2, length)
    members = 2 * group if heads == "shared" else group
    want = rows.unflatten(1, (-1, members)).mean(2)
    for part, ours in enumerate(got):
        torch.testing.assert_close(ours, want[:, :, part], rtol=1e-10, atol=1e-14)


def test_score_takes_the_lse_of_its_own_rows():
    generator = generator_of(0)
    query, key = torch.randn(1, 2, 3, 4, generator=generator), torch.randn(1, 1, 6, 4, generator=generator)
    modality = torch.tensor([[0, 1, 1, 0, 1, 0]], dtype=torch.int8)
    logits = (query.double() @ key.double().mT) / 2
    seen = torch.ones(3, 6, dtype=torch.bool).tril(3)
    lse = torch.logsumexp(logits.masked_fill(~seen, -math.inf), -1)
    with_lse = reference.score(query, key, modality, lse=lse)
    for ours, want in zip(with_lse, reference.score(query, key, modality), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-12, atol=0)


@given(seed=seeds, combine=st.sampled_from(["intersection", "union"]), masked=st.booleans())
def test_dual_top_k_is_eq_2_and_3(seed, combine, masked):
    generator = generator_of(seed)
    scores = torch.randint(0, 4, (2, 2, 3, 8), generator=generator).float()
    k_self, k_cross = torch.randint(0, 11, (2,), generator=generator).tolist()
    valid = torch.rand(2, 2, 3, 8, generator=generator) < 0.6 if masked else torch.ones(2, 2, 3, 8).bool()
    masks = {"valid_self": valid[0], "valid_cross": valid[1]} if masked else {}
    got = reference.dual_top_k(*scores, k_self, k_cross, combine, **masks)
    for a in range(2):
        for b in range(3):
            best = [
                sorted((j for j in range(8) if ok[a, b, j]), key=lambda j, s=s: (s[a, b, j], j))[::-1]
                for s, ok in zip(scores, valid, strict=True)
            ]
            first, second = set(best[0][:k_self]), set(best[1][:k_cross])
            want = first & second if combine == "intersection" else first | second
            assert set(torch.nonzero(got[a, b]).flatten().tolist()) == want


def brute_force_select(problem, options):
    self_score, cross_score, modality, query_modality = problem
    batch, heads, _ = self_score.shape
    indices = torch.full((batch, heads, options["budget"]), -1, dtype=torch.int32)
    for b in range(batch):
        for h in range(heads):
            kept = brute_force.select_row(
                [Fraction(x) for x in self_score[b, h].tolist()],
                [Fraction(x) for x in cross_score[b, h].tolist()],
                modality[b].tolist(),
                query_modality[b].tolist(),
                options["budget"],
                options["recent"],
                options["cross_ratio"],
                options["combine"],
                options.get("k_self"),
                options.get("k_cross"),
                options["pool"],
                options["pool_kernel"],
                options["causal"],
            )
            if kept:
                indices[b, h, -len(kept) :] = torch.tensor(kept, dtype=torch.int32)
    return indices


@given(case=selections())
def test_select_is_the_definition(case):
    problem, options = case
    indices, lengths = reference.select(*problem, **options)
    want = brute_force_select(problem, options)
    if options["pool"] != "avg" and options["combine"] != "calibrated":
        assert torch.equal(indices, want)
    # averages and shares are rounded in the twin: ties of fractions may become near-ties of floats
    assert_select_close(want, (want >= 0).sum(-1).int(), *problem, **options, arithmetic_rtol=1e-12)
    assert torch.equal(lengths, (indices >= 0).sum(-1).int())


@given(case=selections(exact_scores=False), seed=seeds)
def test_padding_anywhere_changes_nothing(case, seed):
    (self_score, cross_score, modality, query_modality), options = case
    length = self_score.shape[-1]
    extra = 5
    # every row keeps its window positions at the end, so padding goes before them
    room = length - query_modality.shape[1]
    padding = torch.sort(torch.randint(0, room + 1, (extra,), generator=generator_of(seed))).values
    source = torch.cat([torch.arange(length), torch.full((extra,), -1)])
    place = torch.cat([torch.arange(length).double(), padding.double() - 0.5])
    source = source[torch.sort(place, stable=True).indices]  # [L + extra], -1: padding
    wide = source.clamp_min(0)
    modality_wide = torch.where(source < 0, -1, modality[:, wide]).to(torch.int8)
    got, lengths = reference.select(
        self_score[..., wide], cross_score[..., wide], modality_wide, query_modality, **options
    )
    want, want_lengths = reference.select(self_score, cross_score, modality, query_modality, **options)
    back = torch.where(got < 0, -1, source[got.clamp_min(0).long()])
    assert torch.equal(back.int(), want)
    assert torch.equal(lengths, want_lengths)


def test_cross_ratio_zero_and_one_fill_up_from_the_other_list():
    # text keys 0-2, image keys 3-5; text queries at the end: S lives on text, C on image
    modality = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0]], dtype=torch.int8)
    self_score = torch.tensor([[[0.1, 0.3, 0.2, 0, 0, 0, 1, 1]]])
    cross_score = torch.tensor([[[0, 0, 0, 0.9, 0.7, 0.8, 0, 0]]])
    for combine in ("intersection", "union", "calibrated"):
        for rho, want in ((0.0, [0, 1, 2, 3, 6, 7]), (1.0, [1, 3, 4, 5, 6, 7])):
            indices, _ = reference.select(
                self_score,
                cross_score,
                modality,
                modality[:, -2:],
                budget=6,
                cross_ratio=rho,
                combine=combine,
            )
            assert indices[0, 0].tolist() == want


def test_a_window_that_observes_nothing_keeps_the_latest():
    modality = torch.zeros(1, 6, dtype=torch.int8)
    nothing = torch.full((1, 2), -1, dtype=torch.int8)
    zeros = torch.zeros(1, 1, 6)
    indices, lengths = reference.select(zeros, zeros, modality, nothing, budget=3, recent=1)
    assert indices[0, 0].tolist() == [3, 4, 5]
    literal, lengths = reference.select(
        zeros, zeros, modality, nothing, budget=5, recent=1, combine="union", k_self=2, k_cross=2
    )
    assert literal[0, 0].tolist() == [-1, -1, -1, -1, 5]
    assert lengths.tolist() == [[1]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget"),
        ({"budget": 2, "recent": 3}, "recent"),
        ({"budget": 2, "recent": -1}, "recent"),
        ({"budget": 2, "cross_ratio": 1.5}, "cross_ratio"),
        ({"budget": 2, "cross_ratio": math.nan}, "cross_ratio"),
        ({"budget": 2, "combine": "both"}, "combine"),
        ({"budget": 2, "pool": "mean"}, "pool"),
        ({"budget": 2, "pool_kernel": 4}, "pool_kernel"),
        ({"budget": 2, "k_self": 1}, "k_cross"),
        ({"budget": 2, "k_self": 1, "k_cross": 1, "combine": "calibrated"}, "calibrated"),
        ({"budget": 2, "k_self": 1, "k_cross": 1, "recent": 2}, "budget = 2"),
    ],
)
def test_select_refuses(options, message):
    zeros, modality = torch.zeros(1, 1, 4), torch.zeros(1, 4, dtype=torch.int8)
    with pytest.raises(ValueError, match=message):
        reference.select(zeros, zeros, modality, modality[:, -1:], **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_compact_copies_bits(dtype):
    key, value = (torch.randn(2, 3, 5, 4).to(dtype) for _ in range(2))
    key[0, 0, 1] = math.nan
    indices = torch.tensor([[[-1, 1, 4]] * 3, [[-1, -1, 2]] * 3], dtype=torch.int32)
    for wanted in (indices, indices[:, :1]):
        new_key, new_value = reference.compact(key, value, wanted)
        for new, old in ((new_key, key), (new_value, value)):
            assert new.dtype == dtype
            assert torch.equal(new[0, :, 0], torch.zeros(3, 4, dtype=dtype))
            assert torch.equal(new[0, :, 1:].nan_to_num(7), old[0][:, [1, 4]].nan_to_num(7))
            assert torch.equal(new[1, :, 2], old[1, :, 2])
    empty = reference.compact(key[:, :, :0], value[:, :, :0], indices)
    assert all(torch.equal(part, torch.zeros(2, 3, 3, 4, dtype=dtype)) for part in empty)


@given(seed=seeds, n=st.sampled_from([0.0, 1.0, 2.5]), queries=st.integers(1, 4))
def test_decode_is_masked_n_softmax_attention(seed, n, queries):
    generator = generator_of(seed)
    query = torch.randn(2, 4, queries, 4, generator=generator)
    key, value = torch.randn(2, 2, 2, 9, 4, generator=generator)
    start = torch.randint(0, 9, (2, 2), generator=generator).int()
    end = torch.randint(queries, 10, (), generator=generator).int()
    out, lse = reference.decode(query, key, value, start, end, n=n, scale=0.3)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(queries)).tolist():
        slots = list(range(int(start[b, h // 2]), int(end) - queries + 1 + i))
        if not slots:
            assert lse[b, h, i] == -math.inf
            assert not out[b, h, i].any()
            continue
        logits = 0.3 * key[b, h // 2, slots].double() @ query[b, h, i].double()
        weights = logits.exp() / (n + logits.exp().sum())
        torch.testing.assert_close(out[b, h, i], weights @ value[b, h // 2, slots].double())
        torch.testing.assert_close(lse[b, h, i], logits.exp().sum().log())


def test_decode_with_one_start_per_row_ignores_what_stands_outside():
    key, value = torch.randn(2, 2, 1, 6, 4)
    query = torch.randn(2, 1, 1, 4)
    start = torch.tensor([2, 0], dtype=torch.int32)
    want = reference.decode(query, key, value, start)
    key[0, 0, :2], value[0, 0, :2] = math.nan, math.nan
    got = reference.decode(query, key, value, start)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_prune_is_its_chain_and_a_full_budget_keeps_everything():
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
    modality = torch.tensor([[-1, 0, 0, 1, 1, 1, 1, 0, 0, 0]], dtype=torch.int8)
    new_key, new_value, indices, lengths = reference.prune(
        query, key, value, modality, budget=6, combine="union"
    )
    scores = reference.score(query, key, modality)
    want = reference.select(*scores, modality, modality[:, -3:], budget=6, recent=3, combine="union")
    assert torch.equal(indices, want[0])
    assert torch.equal(new_key, reference.compact(key, value, indices)[0])
    assert lengths.tolist() == [[6, 6]]
    new_key, new_value, indices, lengths = reference.prune(query, key, value, modality, budget=12)
    assert indices[0, 0].tolist() == [-1, -1, -1, *range(1, 10)]
    assert torch.equal(new_value[:, :, 3:], value[:, :, 1:])


@given(case=selections(exact_scores=False), seed=seeds)
def test_the_check_accepts_what_rounding_may_do(case, seed):
    (self_score, cross_score, modality, query_modality), options = case
    rtol = 1e-2
    noise = 1 + rtol * (2 * torch.rand(2, *self_score.shape, generator=generator_of(seed)).double() - 1)
    result = reference.select(
        self_score * noise[0], cross_score * noise[1], modality, query_modality, **options
    )
    assert_select_close(
        *result, self_score, cross_score, modality, query_modality, **options, score_rtol=3 * rtol
    )


@given(case=selections(exact_scores=False), seed=seeds)
def test_the_check_is_exact_without_noise(case, seed):
    problem, options = case
    indices, lengths = reference.select(*problem, **options)
    assert_select_close(indices, lengths, *problem, **options)
    # swap a kept for a dropped candidate: continuous scores, so the two are far from a tie
    b, h = 0, int(seed % indices.shape[1])
    dropped = (problem[2][b] >= 0).nonzero().flatten().tolist()
    kept = indices[b, h][indices[b, h] >= 0].tolist()
    dropped = [j for j in dropped if j not in kept]
    if not kept or not dropped or options["pool"] != "none":
        return
    swapped = sorted([*kept[:-1], dropped[seed % len(dropped)]])
    indices[b, h, -len(swapped) :] = torch.tensor(swapped, dtype=torch.int32)
    with pytest.raises(AssertionError, match="outside the boundary band"):
        assert_select_close(indices, lengths, *problem, **options)


def test_the_check_lets_a_near_tie_flip_and_nothing_else():
    modality = torch.zeros(1, 6, dtype=torch.int8)
    self_score = torch.tensor([[[0.5, 0.4, 0.4 * (1 + 1e-7), 0.1, 0.0, 0.0]]], dtype=torch.float64)
    cross_score = torch.zeros_like(self_score)
    problem = (self_score, cross_score, modality, modality[:, -1:])

    def check(kept, **more):
        indices = torch.tensor([[kept]], dtype=torch.int32)
        lengths = (indices >= 0).sum(-1).int()
        assert_select_close(indices, lengths, *problem, budget=3, recent=1, **more)

    check([0, 2, 5])
    check([0, 1, 5], score_rtol=1e-6)
    for wrong in ([0, 1, 5], [0, 3, 5], [2, 0, 5], [0, 5, -1], [-1, 0, 5], [0, 2, 4]):
        with pytest.raises(AssertionError):
            check(wrong)
    with pytest.raises(AssertionError, match=r"missing \[0\]"):
        check([1, 2, 5], score_rtol=1e-6)
