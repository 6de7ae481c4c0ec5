"""CSPConfig, the observation window, and select_tokens under padding and in the release."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from csp_ext import dispatch, ops, reference
from csp_ext.config import CSPConfig
from csp_ext.selection import select_tokens, window_modality, window_span

T, I, P = 0, 1, -1  # noqa: E741 text, image, padding


def modality_of(*rows):
    return torch.tensor(rows, dtype=torch.int8)


@pytest.fixture(params=["reference", "ops"])
def impl(request, monkeypatch):
    """The twins or the compiled ops behind select_tokens."""
    module = {"reference": reference, "ops": ops}[request.param]
    monkeypatch.setattr(dispatch, "ops", module)
    return module


PRESETS = [
    CSPConfig(),
    CSPConfig(budget=64, window=16, recent="half", combine="union", k_self=8, k_cross=4),
    CSPConfig.paper(budget=0.5),
    CSPConfig.release(recent_bias=1.5, cross_ratio=0.9),
]


def test_the_default_is_what_measured_best():
    config = CSPConfig()
    chosen = (
        config.heads,
        config.combine,
        config.pool,
        config.pool_kernel,
        config.cross_ratio,
        config.recent,
        config.window,
        config.hop,
    )
    assert chosen == ("kv", "calibrated", "past", 7, None, 8, 8, 0.45)
    assert (config.n, config.decode_n, config.text_only, config.delay) == (1.0, 0.0, "prune", 0)


@pytest.mark.parametrize("config", PRESETS)
def test_dict_round_trip(config):
    assert CSPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.replace() == config
    assert config.replace(n=2.0).n == 2.0
    assert hash(config) == hash(config.replace())


def test_a_config_is_frozen():
    with pytest.raises(AttributeError):
        CSPConfig().budget = 3


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"budget": 0}, ValueError, "budget must be at least 1, got 0"),
        ({"budget": 0.0}, ValueError, r"budget as a share must lie in \(0, 1\], got 0.0"),
        ({"budget": 1.5}, ValueError, "budget .* got 1.5"),
        ({"budget": math.nan}, ValueError, "budget .* got nan"),
        ({"budget": True}, TypeError, "budget must be an int, got bool True"),
        ({"budget": "20%"}, TypeError, "budget must be an int, got str"),
        ({"budget": None}, TypeError, "budget must be an int, got NoneType"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": "answer"}, ValueError, "window must be one of 'question', 'half', got 'answer'"),
        ({"window": None}, TypeError, "window"),
        ({"recent": -1}, ValueError, "recent must be at least 0, got -1"),
        ({"recent": "question"}, ValueError, "recent"),
        ({"recent": 1.5}, TypeError, "recent must be an int, got float 1.5"),
        ({"heads": "all"}, ValueError, "heads must be one of 'kv', 'shared', got 'all'"),
        ({"heads": 1}, TypeError, "heads must be a string, got int 1"),
        ({"combine": "and"}, ValueError, "combine .* got 'and'"),
        ({"cross_ratio": 1.01}, ValueError, r"cross_ratio must lie in \[0, 1\], got 1.01"),
        ({"cross_ratio": math.nan}, ValueError, "cross_ratio .* got nan"),
        ({"cross_ratio": "0.5"}, TypeError, "cross_ratio must be a number, got str '0.5'"),
        ({"hop": 1.5}, ValueError, r"hop must lie in \[0, 1\], got 1.5"),
        ({"hop": -1}, ValueError, "hop must be finite and at least 0, got -1"),
        ({"delay": -1}, ValueError, "delay must be at least 0, got -1"),
        ({"n": -1.0}, ValueError, "n must be finite and at least 0, got -1.0"),
        ({"n": math.inf}, ValueError, "n must be finite"),
        ({"decode_n": math.nan}, ValueError, "decode_n .* got nan"),
        ({"pool": "mean"}, ValueError, "pool .* got 'mean'"),
        ({"pool_kernel": 4}, ValueError, "pool_kernel must be odd, got 4"),
        ({"pool_kernel": 0}, ValueError, "pool_kernel must be at least 1, got 0"),
        ({"text_only": "drop"}, ValueError, "text_only .* got 'drop'"),
        ({"k_self": 3}, ValueError, "k_self and k_cross go together, got 3 and None"),
        ({"k_self": 3, "k_cross": 3}, ValueError, "calibrated"),
        ({"k_self": 3, "k_cross": -1, "combine": "union"}, ValueError, "k_cross must be at least 0, got -1"),
        ({"k_self": 9, "k_cross": 3, "combine": "union", "budget": 16}, ValueError, "fit a budget of 16"),
        ({"hh_ratio": 0.1}, ValueError, "hh_ratio and recent_ratio go together, got 0.1 and None"),
        ({"hh_ratio": 0.1, "recent_ratio": 0.1}, ValueError, "budget must be None beside hh_ratio, got 0.2"),
        ({"recent_bias": 0.5}, ValueError, "recent_bias needs hh_ratio and recent_ratio, got 0.5"),
    ],
)
def test_a_bad_field_is_named_with_its_value(fields, error, message):
    with pytest.raises(error, match=message):
        CSPConfig(**fields)


def test_bad_releases_and_dicts():
    with pytest.raises(ValueError, match=r"hh_ratio must lie in \[0, 1\], got 1.2"):
        CSPConfig.release(hh_ratio=1.2)
    with pytest.raises(ValueError, match="recent_bias must be finite and at least 0, got -1"):
        CSPConfig.release(recent_bias=-1)
    with pytest.raises(ValueError, match="calibrated"):
        CSPConfig.release().replace(combine="calibrated")
    with pytest.raises(ValueError, match="no field 'bugdet'"):
        CSPConfig.from_dict({"bugdet": 3})
    with pytest.raises(ValueError, match="no field 'rho'"):
        CSPConfig().replace(rho=0.1)


@pytest.mark.parametrize(
    ("budget", "length", "slots"),
    [(0.2, 1000, 200), (0.29, 100, 29), (0.2, 4, 1), (1.0, 77, 77), (1, 77, 1), (0.5, 7, 3), (100, 50, 100)],
)
def test_budget(budget, length, slots):
    resolved = CSPConfig(budget=budget).resolve(length)
    assert resolved.budget == slots
    assert resolved.recent == min(8, slots)
    assert resolved.keeps_all == (length <= slots)


@pytest.mark.parametrize(
    ("hop", "budget", "asked"), [(0.45, 69, 28), (0.45, 600, 64), (100, 69, 100), (0, 69, 0), (0.45, 8, 0)]
)
def test_a_share_of_hop_tokens_is_bounded(hop, budget, asked):
    assert CSPConfig(hop=hop, budget=budget).resolve(1000).hop == asked


def test_a_delay_adds_what_is_generated():
    resolved = CSPConfig(budget=0.2, delay=3).resolve(103)
    assert (resolved.budget, resolved.recent, resolved.window) == (23, 11, 11)
    assert resolved.hop == CSPConfig(budget=0.2).resolve(100).hop


def test_the_paper_halves_its_budget():
    resolved = CSPConfig.paper(budget=41).resolve(100)
    assert (resolved.window, resolved.recent, resolved.budget) == (20, 20, 41)
    assert resolved.score_options() == {"n": 1.0, "heads": "shared"}
    assert resolved.select_options()["combine"] == "intersection"
    tiny = CSPConfig.paper(budget=1).resolve(100)
    assert (tiny.window, tiny.recent) == (1, 1)


@pytest.mark.parametrize(
    ("length", "options", "want"),
    [
        # length, arguments, (k_self, k_cross, recent, budget); cases of METHODS A.2
        (200, {"cross_ratio": 0.9}, (1, 18, 20, 39)),
        (3090, {"cross_ratio": 0.1}, (278, 30, 309, 617)),
        (129, {"cross_ratio": 0.1, "recent_bias": 1.5}, (5, 0, 18, 23)),
        (100, {"recent_bias": 2.0}, (0, 0, 20, 20)),
        (3100, {"cross_ratio": 0.0}, (308, 1, 310, 619)),
        (200, {"cross_ratio": 1.0}, (0, 20, 20, 40)),
        (10, {"hh_ratio": 0.5, "recent_ratio": 0.5}, (2, 2, 5, 9)),
    ],
)
def test_release_arithmetic(length, options, want):
    resolved = CSPConfig.release(**options).resolve(length)
    assert (resolved.k_self, resolved.k_cross, resolved.recent, resolved.budget) == want
    assert not resolved.keeps_all


@pytest.mark.parametrize(
    ("length", "options"), [(9, {}), (40, {"hh_ratio": 0.6, "recent_ratio": 0.5}), (9, {"recent_bias": 0.0})]
)
def test_release_passes_through(length, options):
    assert CSPConfig.release(**options).resolve(length).keeps_all


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (100, {"recent_bias": 2.5}, "recent_bias = 2.5 .* asks for 25 recent tokens"),
        (100, {"recent_bias": 0.0}, "recent_bias = 0.0 .* leaves no recent token"),
        (300, {"cross_ratio": 0.0}, "cross_ratio = 0 .* 270 candidates"),
    ],
)
def test_release_says_where_the_release_fails(length, options, message):
    with pytest.raises(ValueError, match=message):
        CSPConfig.release(**options).resolve(length)


def question_window(row):
    """Observing positions of one row, by the words of the rule."""
    real = [j for j, kind in enumerate(row) if kind >= 0]
    images = [j for j in real if row[j] > 0]
    if not images:
        return real[-64:]
    tail = [j for j in real if j > images[-1]]
    return tail[-64:] if tail else real[-8:]


@given(seed=st.integers(0, 2**31 - 1), length=st.integers(1, 150))
def test_the_question_window(seed, length):
    generator = torch.Generator().manual_seed(seed)
    runs = torch.randint(1, 80, (length,), generator=generator)
    kinds = torch.randint(-1, 3, (length,), generator=generator)
    row = torch.repeat_interleave(kinds, runs)[:length].to(torch.int8)
    config = CSPConfig(window="question")
    span = window_span(row[None], config)
    got = window_modality(row[None], config, span=span)[0]
    want = question_window(row.tolist())
    assert span == (length - want[0] if want else 0)
    assert (torch.nonzero(got >= 0).flatten() + length - span).tolist() == want
    assert torch.equal(got[got >= 0], row[want])
    # from ints alone: the same window, as far as the last 64 positions hold it
    fixed = window_modality(row[None], config)[0]
    assert fixed.shape == (min(64, length),)
    start = length - fixed.shape[0]
    assert (torch.nonzero(fixed >= 0).flatten() + start).tolist() == [j for j in want if j >= start]


def test_an_int_window_counts_real_tokens():
    modality = modality_of([T, I, T, T, P, P], [P, P, I, I, T, T], [T, I, P, P, T, T])
    config = CSPConfig(window=3)
    assert window_modality(modality, config).tolist() == [[T, P, P], [I, T, T], [P, T, T]]
    assert window_span(modality, config) == 5
    wide = window_modality(modality, config, span=5)
    assert wide.tolist() == [[I, T, T, P, P], [P, P, I, T, T], [I, P, P, T, T]]


def test_the_window_compiles():
    modality = modality_of([P, P, I, I, T, T], [T, I, T, T, T, P])
    compiled = torch.compile(lambda m: window_modality(m, CSPConfig()), fullgraph=True, backend="eager")
    assert torch.equal(compiled(modality), window_modality(modality, CSPConfig()))


def random_prompt(rows, heads=4, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(len(rows[0]))
    length = len(rows[0])
    query = torch.randn(len(rows), heads, length, dim, generator=generator)
    key = torch.randn(len(rows), kv_heads, length, dim, generator=generator)
    return query, key, modality_of(*rows)


def pad_row(row, holes):
    """Put padding before the positions named in ``holes``; return the new row and each slot's source."""
    source = []
    for j in range(len(row) + 1):
        source += [-1] * holes.count(j) + ([j] if j < len(row) else [])
    return [P if j < 0 else row[j] for j in source], torch.tensor(source)


@pytest.mark.parametrize(
    "config", [CSPConfig(budget=12), CSPConfig.paper(budget=12), CSPConfig(budget=12, window=5)]
)
@pytest.mark.parametrize(
    "holes",
    [[0] * 7, [30] * 7, [9, 9, 9, 9, 13, 13, 13], [0, 0, 9, 28, 29, 29, 30]],
    ids=["left", "right", "middle", "all"],
)
def test_a_padded_row_equals_the_row_alone(impl, config, holes):
    row = [T] * 4 + [I] * 8 + [T] * 3 + [I] * 9 + [T] * 6
    other = [T] * 6 + [I] * 20 + [T] * 11
    query, key, modality = random_prompt([row])
    alone, alone_lengths = select_tokens(query, key, modality, config)
    padded, source = pad_row(row, holes)
    wide = source.clamp_min(0)
    query2, key2, modality2 = random_prompt([padded, other])
    query2[0], key2[0] = query[0][:, wide], key[0][:, wide]
    got, lengths = select_tokens(query2, key2, modality2, config)
    back = torch.where(got[0] < 0, -1, source[got[0].clamp_min(0).long()]).int()
    assert torch.equal(back, alone[0])
    assert torch.equal(lengths[0], alone_lengths[0])
    assert bool((lengths == 12).all())


def test_the_last_queries_are_enough(impl):
    query, key, modality = random_prompt([[T] * 5 + [I] * 20 + [T] * 10])
    config = CSPConfig(budget=14, window="question", hop=0)
    want = select_tokens(query, key, modality, config)
    got = select_tokens(query[:, :, -12:], key, modality, config)
    given_window = select_tokens(
        query, key, modality, config, query_modality=window_modality(modality, config)
    )
    resolved = select_tokens(query, key, modality, config.resolve(35))
    for other in (got, given_window, resolved):
        assert torch.equal(other[0], want[0])
    with pytest.raises(ValueError, match="query must hold the last 10 positions, got 9"):
        select_tokens(query[:, :, -9:], key, modality, config)
    with pytest.raises(TypeError, match="config must be a CSPConfig, got dict"):
        select_tokens(query, key, modality, config.to_dict())


def test_the_hop_finds_what_only_the_evidence_points_at(impl):
    """The window looks at 10, and 10 at 4 and at 20, which comes after it."""
    query, key = torch.zeros(1, 2, 30, 8), torch.zeros(1, 2, 30, 8)
    query[:, :, 29, 0] = key[:, :, 10, 0] = 8
    query[:, :, 10, 1] = key[:, :, 4, 1] = key[:, :, 20, 1] = 8
    modality = modality_of([I] * 6 + [T] * 24)
    config = CSPConfig(budget=5, window=1, recent=2, pool="none", hop=1)
    found, _ = select_tokens(query, key, modality, config)
    assert found.tolist() == [[[4, 10, 20, 28, 29]] * 2]
    alone, _ = select_tokens(query, key, modality, config.replace(hop=0))
    assert alone.tolist() == [[[10, 26, 27, 28, 29]] * 2]
    # Its query is not at hand: nobody can ask it.
    short, _ = select_tokens(query[:, :, -15:], key, modality, config)
    assert torch.equal(short, alone)
    for rule in ("union", "intersection"):
        assert 10 in select_tokens(query, key, modality, config.replace(combine=rule))[0][0, 0].tolist()


def test_a_hop_of_more_tokens_than_there_are(impl):
    query, key, modality = random_prompt([[T, I, T]])
    options = {"budget": 2, "window": 1, "recent": 1}
    found, _ = select_tokens(query, key, modality, CSPConfig(**options, hop=9))
    assert torch.equal(found, select_tokens(query, key, modality, CSPConfig(**options, hop=3))[0])


def test_a_large_budget_keeps_every_row_whole(impl):
    query, key, modality = random_prompt([[P, P, T, I, I, T], [T, I, I, T, T, P]])
    for config, slots in (
        (CSPConfig(budget=1.0), 6),
        (CSPConfig(budget=8), 8),
        (CSPConfig.paper(budget=6), 6),
    ):
        indices, lengths = select_tokens(query, key, modality, config)
        heads = 1 if config.heads == "shared" else 2
        free = [-1] * (slots - 4)
        assert indices[0].tolist() == [[*free, 2, 3, 4, 5]] * heads
        free = [-1] * (slots - 5)
        assert indices[1].tolist() == [[*free, 0, 1, 2, 3, 4]] * heads
        assert lengths.tolist() == [[4] * heads, [5] * heads]
        assert indices.dtype == lengths.dtype == torch.int32


@pytest.mark.parametrize("count", [4, 18, 19, 20, 21, 60])
def test_release_prunes_from_its_threshold(impl, count):
    # 100 tokens: hh = R = 10; cross_ratio 0.9 splits 10 into 0 + 9 or 1 + 9 and loses a slot
    full = [T] * 10 + [I] * 40 + [T] * 20 + [I] * 20 + [T] * 10
    short = [P] * (100 - count) + full[-count:]
    query, key, modality = random_prompt([full, short])
    config = CSPConfig.release(cross_ratio=0.85)
    resolved = config.resolve(100)
    assert (resolved.budget, resolved.prune_from) == (19, 20)
    indices, lengths = select_tokens(query, key, modality, config)
    assert indices.shape == (2, 2, 19)
    for head in range(2):
        kept = indices[1, head][indices[1, head] >= 0].tolist()
        assert len(kept) == int(lengths[1, head])
        if count < 20:
            assert kept == list(range(100 - count, 100))
        else:
            assert kept[-10:] == list(range(90, 100))
            assert len(kept) <= 19
    assert bool((lengths[0] <= 19).all())


@pytest.mark.parametrize("config", [CSPConfig(), CSPConfig.paper(), CSPConfig(budget=32)])
def test_select_tokens_compiles_once_for_many_lengths(config):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def select(query, key, modality):
        return select_tokens(query, key, modality, config)

    compiled = torch.compile(select, fullgraph=True, dynamic=True, backend=backend)
    for length in (100, 123, 300, 411):
        prompt = random_prompt([[T] * 20 + [I] * 40 + [T] * (length - 60)])
        assert torch.equal(compiled(*prompt)[0], select(*prompt)[0])
    assert len(graphs) == 1
