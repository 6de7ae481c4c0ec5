"""prune: bit for bit the chain score, select, compact; compiled, exported, and its errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numeric import computed_in, dtypes, moved, seeds, strided
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import csp_ext
from csp_ext import reference

SCORE_OPTIONS = ("n", "scale", "heads", "causal", "lse")


def problem(
    batch: int = 2, kv_heads: int = 2, group: int = 2, window: int = 5, keys: int = 40, head_dim: int = 8,
    value_dim: int = 6, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return {
        "query": normal(batch, kv_heads * group, window, head_dim),
        "key": normal(batch, kv_heads, keys, head_dim),
        "value": normal(batch, kv_heads, keys, value_dim),
        "modality": torch.randint(-1, 3, (batch, keys), generator=generator, dtype=torch.int8).to(device),
    }


def chain(query: Tensor, key: Tensor, value: Tensor, modality: Tensor, **options) -> tuple[Tensor, ...]:
    """Run the three parts one after another."""
    window = options.pop("query_modality", None)
    if window is None:
        window = modality[:, modality.shape[1] - query.shape[2] :]
    of_score = {name: options[name] for name in SCORE_OPTIONS if name in options}
    of_select = {name: value for name, value in options.items() if name not in SCORE_OPTIONS}
    own, other = csp_ext.score(query, key, modality, query_modality=window, **of_score)
    indices, lengths = csp_ext.select(
        own, other, modality, window, causal=options.get("causal", True), **of_select
    )
    return (*csp_ext.compact(key, value, indices), indices, lengths)


def assert_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for name, g, w in zip(("key", "value", "indices", "lengths"), got, want, strict=True):
        assert g.dtype == w.dtype, name
        assert torch.equal(g, w), name


@st.composite
def options(draw: st.DrawFn) -> dict[str, object]:
    budget = draw(st.integers(1, 60))
    chosen: dict[str, object] = {
        "budget": budget,
        "recent": draw(st.integers(0, budget)),
        "n": draw(st.sampled_from([0.0, 1.0, 3.0])),
        "scale": draw(st.sampled_from([None, 0.7])),
        "heads": draw(st.sampled_from(["kv", "shared"])),
        "causal": draw(st.booleans()),
        "cross_ratio": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        "combine": draw(st.sampled_from(["intersection", "union", "calibrated"])),
        "pool": draw(st.sampled_from(["none", "max", "past", "avg"])),
        "pool_kernel": draw(st.sampled_from([1, 3, 7])),
    }
    if chosen["combine"] != "calibrated" and draw(st.booleans()):
        room = budget - chosen["recent"]
        chosen["k_self"] = draw(st.integers(0, room))
        chosen["k_cross"] = room - chosen["k_self"]
    return chosen


@given(
    batch=st.integers(0, 3), kv_heads=st.integers(1, 3), group=st.integers(1, 3), window=st.integers(0, 8),
    keys=st.integers(8, 70), head_dim=st.integers(1, 20), value_dim=st.integers(0, 20),
    dtype=dtypes, seed=seeds, observers=st.booleans(), with_lse=st.booleans(), options=options(),
)  # fmt: skip
def test_is_the_chain_bit_for_bit(
    device,
    batch,
    kv_heads,
    group,
    window,
    keys,
    head_dim,
    value_dim,
    dtype,
    seed,
    observers,
    with_lse,
    options,
):
    dtype = computed_in(dtype, device)
    inputs = problem(batch, kv_heads, group, window, keys, head_dim, value_dim, dtype, device, seed)
    inputs = {name: strided(tensor, seed // (i + 1)) for i, (name, tensor) in enumerate(inputs.items())}
    if observers:
        options["query_modality"] = torch.randint(-1, 3, (batch, window), dtype=torch.int8).to(device)
    if with_lse:
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        options["lse"] = torch.rand(batch, kv_heads * group, window).to(device, sums) + 3
    assert_equal(csp_ext.prune(**inputs, **options), chain(**inputs, **options))


def test_matches_the_twin_in_float64():
    inputs = problem(dtype=torch.float64, keys=200, window=20)
    for options in (
        {},
        {"heads": "shared", "combine": "union", "pool": "max"},
        {"combine": "calibrated", "recent": 3},
    ):
        assert_equal(
            csp_ext.prune(**inputs, budget=50, **options), reference.prune(**inputs, budget=50, **options)
        )


def test_a_budget_that_fits_all_keeps_all(device):
    inputs = problem(keys=30, device=device)
    real = (inputs["modality"] >= 0).sum(-1)
    key, value, indices, lengths = csp_ext.prune(**inputs, budget=35)
    assert torch.equal(lengths, real.int()[:, None].expand(-1, 2))
    for b in range(2):
        kept = inputs["modality"][b] >= 0
        free = 35 - int(real[b])
        assert torch.equal(key[b, :, free:], inputs["key"][b][:, kept])
        assert torch.equal(value[b, :, free:], inputs["value"][b][:, kept])
        assert key[b, :, :free].count_nonzero() == value[b, :, :free].count_nonzero() == 0
        assert (indices[b, :, :free] == -1).all()


def test_threads_do_not_change_a_bit():
    inputs = problem(kv_heads=4, keys=1500, window=40)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(csp_ext.prune(**inputs, budget=300, pool="max"))
    finally:
        torch.set_num_threads(threads)
    assert_equal(*results)


def test_opcheck(device):
    op = torch.ops.csp.prune.default
    for settings in [{}, {"dtype": torch.bfloat16, "group": 1}, {"batch": 0}, {"window": 0}]:
        arguments = tuple(problem(**settings, device=device).values())
        torch.library.opcheck(op, arguments, {"budget": 12})
    arguments = tuple(problem(device=device).values())
    torch.library.opcheck(op, arguments, {"budget": 60, "heads": "shared", "combine": "union", "pool": "avg"})


class Pruner(torch.nn.Module):
    """A module as a framework author writes one."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, query: Tensor, key: Tensor, value: Tensor, modality: Tensor) -> tuple[Tensor, ...]:
        key, value, indices, lengths = csp_ext.prune(query, key, value, modality, **self.options)
        return key * 2, value, indices, lengths


@pytest.mark.parametrize(
    "options", [{"budget": 12}, {"budget": 60, "heads": "shared", "recent": 2, "pool": "max"}]
)
def test_compiles_without_a_graph_break(device, options):
    module, inputs = Pruner(**options), problem(device=device)
    assert_equal(torch.compile(module, fullgraph=True)(**inputs), module(**inputs))


def test_exports(device):
    module, inputs = Pruner(budget=12), problem(device=device)
    exported = torch.export.export(module, (), kwargs=inputs)
    assert_equal(exported.module()(**inputs), module(**inputs))


def test_exports_with_a_dynamic_length(device):
    module, length = Pruner(budget=12), torch.export.Dim("length", min=8, max=4096)
    shapes = {"query": None, "key": {2: length}, "value": {2: length}, "modality": {1: length}}
    exported = torch.export.export(module, (), kwargs=problem(device=device), dynamic_shapes=shapes)
    for keys in (8, 77, 300):
        inputs = problem(keys=keys, device=device)
        assert_equal(exported.module()(**inputs), module(**inputs))


def test_compiles_once_for_every_prompt_length(device):
    torch._dynamo.reset()
    compiled = torch.compile(Pruner(budget=12), dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for keys in (40, 41, 8, 333, 1200):
            inputs = problem(keys=keys, device=device)
            assert_equal(compiled(**inputs), Pruner(budget=12)(**inputs))


def test_compiles_once_for_every_budget(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")

    @torch.compile(dynamic=True, fullgraph=True, backend=counter)
    def prune(query, key, value, modality, budget):
        return csp_ext.prune(query, key, value, modality, budget=budget)

    for keys, budget in ((40, 12), (50, 13), (333, 200)):
        inputs = problem(keys=keys, device=device)
        assert_equal(prune(**inputs, budget=budget), csp_ext.prune(**inputs, budget=budget))
    assert counter.frame_count == 1


def bad(match: str, **changes: object) -> object:
    return pytest.param({**problem(), "budget": 12, **changes}, match, id=match[:44])


BAD = [
    bad(r"csp::prune: query must be 4-D \[B, Hq, O, D\], got 3-D", query=torch.ones(4, 5, 8)),
    bad("query must be float32.*got int32", query=torch.ones(2, 4, 5, 8, dtype=torch.int32)),
    bad("query must hold at most L = 40 positions, got O = 41", query=torch.ones(2, 4, 41, 8)),
    bad("query must have a multiple of key's 2 heads, got 3", query=torch.ones(2, 3, 5, 8)),
    bad("key must be float32, got float16", key=torch.ones(2, 2, 40, 8, dtype=torch.float16)),
    bad("key must have query's head_dim = 8", key=torch.ones(2, 2, 40, 9)),
    bad("value must have key's length = 40", value=torch.ones(2, 2, 39, 6)),
    bad("value must be float32, got bfloat16", value=torch.ones(2, 2, 40, 6, dtype=torch.bfloat16)),
    bad("value must have unit stride", value=torch.ones(2, 2, 6, 40).transpose(2, 3)),
    bad("modality must be int8, got int64", modality=torch.zeros(2, 40, dtype=torch.int64)),
    bad(
        r"modality must be \[B, L\] = \[2, 40\], got \[2, 39\]",
        modality=torch.zeros(2, 39, dtype=torch.int8),
    ),
    bad(
        r"query_modality must be \[B, O\] = \[2, 5\], got \[2, 4\]",
        query_modality=torch.zeros(2, 4, dtype=torch.int8),
    ),
    bad("lse must be float32, got float64", lse=torch.zeros(2, 4, 5, dtype=torch.float64)),
    bad("n must be finite and >= 0, got -1", n=-1.0),
    bad("scale must be finite, got nan", scale=float("nan")),
    bad('heads must be "kv" or "shared", got "query"', heads="query"),
    bad("budget must be at least 1, got 0", budget=0),
    bad("budget must be between 0 and 2147483647, got 2147483648", budget=2**31),
    bad("recent must be between 0 and budget = 12, got 13", recent=13),
    bad("recent must be between 0 and budget = 4, got 5", budget=4),
    bad("cross_ratio must be between 0 and 1, got 1.5", cross_ratio=1.5),
    bad("cross_ratio must be between 0 and 1, got nan", cross_ratio=float("nan")),
    bad('combine must be .*got "sum"', combine="sum"),
    bad("k_self and k_cross go together", k_self=3),
    bad(
        "k_self and k_cross must leave room for recent = 5 in budget = 12",
        k_self=5,
        k_cross=5,
        combine="union",
    ),
    bad('pool must be .*got "mean"', pool="mean"),
    bad("pool_kernel must be odd and at least 1, got 4", pool_kernel=4),
]


@pytest.mark.parametrize(("arguments", "match"), BAD)
def test_bad_input(device, arguments, match):
    arguments = {name: moved(value, device) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=match):
        csp_ext.prune(**arguments)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.csp.prune(**arguments)


def test_a_wrong_type_is_a_type_error():
    with pytest.raises(TypeError, match="budget"):
        csp_ext.prune(**problem(), budget="many")
