"""score: against its twin over shapes, strides, dtypes and padding; fake kernel, threads, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numeric import assert_close, computed_in, dtypes, moved, seeds, strided

import csp_ext
from csp_ext import reference


def problem(
    seed,
    dtype,
    device="cpu",
    *,
    batch=1,
    group=1,
    kv_heads=2,
    window=6,
    length=40,
    dim=16,
    padding=0.0,
    ids=2,
):
    """Random query, key, modality; padding keys are NaN, so that a leak shows."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, group * kv_heads, window, dim, generator=generator)
    key = torch.randn(batch, kv_heads, length, dim, generator=generator)
    modality = torch.randint(0, ids, (batch, length), generator=generator, dtype=torch.int8)
    modality[torch.rand(batch, length, generator=generator) < padding] = -1
    key = torch.where((modality < 0)[:, None, :, None], float("nan"), key)
    query, key = (strided(t.to(device, dtype), seed + i) for i, t in enumerate((query, key)))
    return query, key, modality.to(device)


def check(query, key, modality, **options):
    got = csp_ext.score(query, key, modality, **options)
    # The twin multiplies what it masks: it gets finite padding.
    want = reference.score(query.nan_to_num(), key.nan_to_num(), modality, **options)
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    for name, a, b in zip(("self", "cross"), got, want, strict=True):
        assert a.dtype == kind, name
        assert a.shape == b.shape, name
        assert a.is_contiguous(), name
        assert_close(a, b, kind, atol=1e-30)
    return got


@given(
    seed=seeds,
    dtype=dtypes,
    batch=st.integers(0, 3),
    group=st.integers(1, 5),
    kv_heads=st.integers(0, 3),
    length=st.one_of(st.integers(0, 40), st.integers(90, 300)),
    window_share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    dim=st.integers(1, 140),
    padding=st.sampled_from([0.0, 0.0, 0.2, 0.9, 1.0]),
    ids=st.sampled_from([1, 2, 5, 128]),
    n=st.sampled_from([0.0, 0.3, 1.0, 50.0]),
    heads=st.sampled_from(["kv", "shared"]),
    causal=st.booleans(),
    own_window=st.booleans(),
)
def test_matches_the_twin(
    device,
    seed,
    dtype,
    batch,
    group,
    kv_heads,
    length,
    window_share,
    dim,
    padding,
    ids,
    n,
    heads,
    causal,
    own_window,
):
    dtype = computed_in(dtype, device)
    if heads == "shared" and kv_heads == 0:
        kv_heads = 1
    window = min(length, 70, -int(-length * window_share // 1))
    query, key, modality = problem(
        seed,
        dtype,
        device,
        batch=batch,
        group=group,
        kv_heads=kv_heads,
        window=window,
        length=length,
        dim=dim,
        padding=padding,
        ids=ids,
    )
    options = {"n": n, "heads": heads, "causal": causal, "scale": None if seed % 2 else 0.21}
    if own_window:
        generator = torch.Generator().manual_seed(seed)
        options["query_modality"] = torch.randint(-1, ids, (batch, window), generator=generator).to(
            device, torch.int8
        )
    check(query, key, modality, **options)


def test_keys_of_a_cache_and_of_an_expanded_batch(device):
    query, cache, modality = problem(3, torch.float32, device, batch=2, kv_heads=4, length=300, dim=64)
    check(query, cache[:, 1:3, 20:220], modality[:, 20:220])
    check(query[:1].expand(2, -1, -1, -1)[:, :4], cache[:1].expand(2, -1, -1, -1)[:, :2], modality)
    # Key rows 2048 apart: [B, L, H * D] seen as heads.
    wide = torch.randn(1, 130, 64 * 32, device=device).view(1, 130, 32, 64).transpose(1, 2)
    check(torch.randn(1, 32, 5, 64, device=device), wide, modality[:1, :130])


@pytest.mark.parametrize("heads", ["kv", "shared"])
@pytest.mark.parametrize("causal", [True, False])
def test_lse_spares_the_pass_and_changes_nothing(device, heads, causal):
    for dtype in (torch.float32, torch.bfloat16):
        query, key, modality = problem(
            5, dtype, device, batch=2, group=3, window=21, length=210, dim=48, padding=0.3
        )
        key = key.nan_to_num()
        visible = reference.visibility.visible_keys(modality, 21, causal)[:, None]
        logits = query.double() @ key.double().repeat_interleave(3, 1).mT * 48**-0.5
        lse = logits.masked_fill(~visible, float("-inf")).logsumexp(-1).float()
        own = check(query, key, modality, heads=heads, causal=causal, n=2.0)
        given_lse = check(query, key, modality, heads=heads, causal=causal, n=2.0, lse=lse)
        for a, b in zip(own, given_lse, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-30)


def test_a_row_that_sees_nothing_weighs_nothing(device):
    query, key, _ = problem(7, torch.float32, device, window=8, length=8)
    modality = torch.full((1, 8), -1, dtype=torch.int8, device=device)
    modality[0, 4:] = 1
    observers = torch.ones(1, 8, dtype=torch.int8, device=device)
    for n in (0.0, 1.0):
        self_sum, cross_sum = check(query, key, modality, query_modality=observers, n=n)
        assert not cross_sum.any()
        # Each of the four seeing rows spreads at most one unit of mass.
        assert (self_sum.sum(-1) <= 4.0001).all()
        if n == 0:
            torch.testing.assert_close(self_sum.sum(-1), torch.full((1, 2), 4.0, device=device))


def test_padding_anywhere_equals_the_row_alone(device):
    query, key, modality = problem(11, torch.float32, device, length=130, dim=32)
    alone = csp_ext.score(query, key, modality, causal=False, query_modality=modality[:, -6:])
    spread = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:130].sort().values.to(device)
    padded_key = torch.full((1, 2, 200, 32), float("nan"), device=device).index_copy(2, spread, key)
    padded_modality = torch.full((1, 200), -1, dtype=torch.int8, device=device).index_copy(
        1, spread, modality
    )
    padded = csp_ext.score(query, padded_key, padded_modality, causal=False, query_modality=modality[:, -6:])
    for a, b in zip(padded, alone, strict=True):
        torch.testing.assert_close(a[..., spread], b, rtol=1e-5, atol=0)
        assert a.sum().isclose(b.sum())


def test_huge_logits_neither_overflow_nor_vanish(device):
    query, key, modality = problem(13, torch.float32, device, dim=8)
    for scale in (200.0, -200.0):
        got = csp_ext.score(query, key, modality, scale=scale)
        total = got[0].sum(-1) + got[1].sum(-1)
        torch.testing.assert_close(total, torch.full_like(total, 6.0), rtol=1e-4, atol=0)


def test_a_nan_in_a_real_key_is_not_swallowed(device):
    query, key, modality = problem(17, torch.float32, device)
    key[0, 0, 3, 5] = float("nan")
    self_sum, cross_sum = csp_ext.score(query, key, modality)
    assert (self_sum + cross_sum)[0, 0].isnan().any()
    assert (self_sum + cross_sum)[0, 1].isfinite().all()


def test_threads_do_not_change_a_bit():
    threads = torch.get_num_threads()
    try:
        for heads in ("kv", "shared"):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                arguments = problem(19, dtype, batch=2, group=7, window=64, length=500, padding=0.1)
                results = []
                for count in (1, 2, 5):
                    torch.set_num_threads(count)
                    results.append(csp_ext.score(*arguments, heads=heads))
                for other in results[1:]:
                    assert torch.equal(results[0][0], other[0])
                    assert torch.equal(results[0][1], other[1])
    finally:
        torch.set_num_threads(threads)


def test_the_planner_knows_that_no_matrix_is_held():
    shape = {
        "batch": 1,
        "num_heads": 64,
        "num_kv_heads": 64,
        "keys": 4096,
        "head_dim": 128,
        "dtype": "bfloat16",
    }

    def workspace(window: int, **options: object) -> int:
        return csp_ext.plan("score", window=window, num_threads=2, **shape, **options)["workspace_bytes"]

    assert workspace(16) < 2 * 1.5 * 16 * 4096 * 4
    assert workspace(2048) - workspace(16) < 2 * 2048 * 8
    assert workspace(64, lse=True) < workspace(64) / 10


def test_opcheck(device):
    for heads in ("kv", "shared"):
        for lse in (False, True):
            query, key, modality = problem(23, torch.bfloat16, device, batch=2, group=2)
            options = {"heads": heads, "query_modality": modality[:, :6]}
            if lse:
                options["lse"] = torch.zeros(2, 4, 6, device=device)
            torch.library.opcheck(torch.ops.csp.score.default, (query, key, modality), options)
    for options in ({"batch": 0}, {"window": 0, "length": 0}, {"kv_heads": 0}):
        # torch's own checker cannot clone an empty tensor with gaps between its rows.
        empty = tuple(t.contiguous() for t in problem(29, torch.float32, device, **options))
        torch.library.opcheck(torch.ops.csp.score.default, empty)


def test_compiles_with_dynamic_shapes(device):
    compiled = torch.compile(
        lambda *a: csp_ext.score(*a, heads="shared"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for length in (40, 133):
        arguments = problem(31, torch.float32, device, length=length, group=2)
        for got, want in zip(compiled(*arguments), csp_ext.score(*arguments, heads="shared"), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_given_lse_of_a_row_that_sees_nothing(device, dtype):
    # Three padding keys in front: the first window queries see none, their lse is -inf.
    dtype = computed_in(dtype, device)
    modality = torch.tensor([[-1, -1, -1, 1, 0]], dtype=torch.int8, device=device)
    query, key, _ = problem(5, dtype, device, length=5, window=4, kv_heads=1)
    observing = torch.tensor([[1, 0, 1, 0]], dtype=torch.int8, device=device)
    logits = torch.einsum("bhod,bhkd->bhok", query.double(), key.double()) * 0.25
    seen = reference.visibility.visible_keys(modality, 4, True)[:, None]
    lse = (
        logits.masked_fill(~seen, -torch.inf)
        .logsumexp(-1)
        .to(torch.float64 if dtype == torch.float64 else torch.float32)
    )
    assert lse[0, 0, :2].tolist() == [-torch.inf] * 2
    check(query, key, modality, query_modality=observing, scale=0.25, lse=lse)


def test_a_row_of_nan_leaves_padding_at_zero(device):
    query, key, modality = problem(3, torch.float32, device, padding=0.4)
    query[0, 0] = torch.nan
    observing = torch.ones(1, 6, dtype=torch.int8, device=device)
    self, cross = csp_ext.score(query, key, modality, query_modality=observing)
    assert (self + cross)[0, 0][modality[0] >= 0][:30].isnan().any()
    assert not (self + cross)[0, 0][modality[0] < 0].any()


GOOD = {
    "query": torch.ones(2, 4, 3, 8),
    "key": torch.ones(2, 2, 9, 8),
    "modality": torch.zeros(2, 9, dtype=torch.int8),
}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"query": torch.ones(2, 4, 3)}, r"query must be 4-D \[B, Hq, O, D\], got 3-D"),
        ({"key": torch.ones(2, 9, 8)}, r"key must be 4-D \[B, Hkv, L, D\], got 3-D"),
        ({"query": torch.ones(2, 4, 3, 8, dtype=torch.int32)}, "query must be float32.*got int32"),
        ({"key": torch.ones(2, 2, 9, 8, dtype=torch.float16)}, "key must be float32, got float16"),
        ({"key": torch.ones(1, 2, 9, 8)}, "key must have query's batch size = 2 in dimension 0"),
        ({"key": torch.ones(2, 2, 9, 7)}, "key must have query's head_dim = 8 in dimension 3"),
        ({"key": torch.ones(2, 3, 9, 8)}, "query must have a multiple of key's 3 heads, got 4"),
        ({"key": torch.ones(2, 0, 9, 8)}, "query must have a multiple of key's 0 heads, got 4"),
        ({"query": torch.ones(2, 4, 10, 8)}, "query must hold at most L = 9 positions, got O = 10"),
        (
            {"query": torch.ones(2, 4, 8, 3).mT},
            "query must have unit stride in its last dimension, got stride 3",
        ),
        ({"key": torch.ones(2, 2, 8, 9).mT}, "key must have unit stride in its last dimension, got stride 9"),
        ({"modality": torch.zeros(2, 9)}, "modality must be int8, got float32"),
        ({"modality": torch.zeros(2, 8, dtype=torch.int8)}, "modality must be"),
        ({"modality": torch.zeros(9, dtype=torch.int8)}, r"modality must be 2-D \[B, L\], got 1-D"),
        ({"query_modality": torch.zeros(2, 9, dtype=torch.int8)}, "query_modality must be"),
        ({"query_modality": torch.zeros(2, 3, dtype=torch.int64)}, "query_modality must be int8, got int64"),
        ({"n": -1.0}, "n must be finite and >= 0, got -1"),
        ({"n": float("inf")}, "n must be finite and >= 0, got inf"),
        ({"scale": float("nan")}, "scale must be finite, got nan"),
        ({"scale": float("inf")}, "scale must be finite, got inf"),
        ({"heads": "query"}, 'heads must be "kv" or "shared", got "query"'),
        ({"lse": torch.zeros(2, 4)}, r"lse must be 3-D \[B, Hq, O\], got 2-D"),
        ({"lse": torch.zeros(2, 2, 3)}, "lse must have query's heads = 4"),
        ({"lse": torch.zeros(2, 4, 3, dtype=torch.float64)}, "lse must be float32, got float64"),
        (
            {"key": torch.ones(1).expand(2, 2, 2**31, 1), "query": torch.ones(2, 4, 3, 1)},
            "key's length L must be between 0 and 2147483647, got 2147483648",
        ),
    ],
)
def test_bad_input(device, change, match):
    good = {name: moved(value, device) for name, value in GOOD.items()}
    arguments = {**good, **{name: moved(value, device) for name, value in change.items()}}
    query, key, modality = (arguments.pop(name) for name in ("query", "key", "modality"))
    with pytest.raises(ValueError, match=f"csp::score: {match}"):
        csp_ext.score(query, key, modality, **arguments)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.csp.score(query, key, modality, **arguments)
    check(**good)


def test_a_wrong_type_is_a_type_error():
    with pytest.raises(TypeError, match="query"):
        csp_ext.score([1.0], GOOD["key"], GOOD["modality"])
