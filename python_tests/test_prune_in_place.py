"""prune_: against its parts, prune and its twin bit for bit, its memory, torch's machinery, its errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numeric import computed_in, dtypes, moved, seeds, strided
from test_prune import BAD, options, problem
from torch import Tensor

import csp_ext
from csp_ext import reference

HEADS = st.sampled_from(["kv", "shared"])


def copied(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs with caches that are free to change, strides and all."""
    fresh = {}
    for name in ("key", "value"):
        old = inputs[name]
        new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device=old.device)
        fresh[name] = new.copy_(old)
    return {**inputs, **fresh}


def assert_prunes(inputs: dict[str, Tensor], **options: object) -> None:
    """Compare with prune, and the slots behind the budget with what they were."""
    budget, before = options["budget"], copied(inputs)
    want = csp_ext.prune(**before, **options)
    got = csp_ext.prune_(**inputs, **options)
    for g, w in zip(got, want[2:], strict=True):
        assert g.dtype == w.dtype == torch.int32
        assert torch.equal(g, w)
    for name, rows in zip(("key", "value"), want[:2], strict=True):
        assert torch.equal(inputs[name][:, :, :budget], rows), name
        assert torch.equal(inputs[name][:, :, budget:], before[name][:, :, budget:]), name


@given(
    batch=st.integers(0, 3), kv_heads=st.integers(1, 3), group=st.integers(1, 3), window=st.integers(0, 8),
    spare=st.integers(0, 40), head_dim=st.integers(1, 20), value_dim=st.integers(0, 20),
    dtype=dtypes, seed=seeds, observers=st.booleans(), with_lse=st.booleans(), options=options(),
)  # fmt: skip
def test_is_prune_bit_for_bit(
    device,
    batch,
    kv_heads,
    group,
    window,
    spare,
    head_dim,
    value_dim,
    dtype,
    seed,
    observers,
    with_lse,
    options,
):
    dtype, keys = computed_in(dtype, device), max(options["budget"] + spare, window)
    inputs = problem(batch, kv_heads, group, window, keys, head_dim, value_dim, dtype, device, seed)
    inputs = {name: strided(tensor, seed // (i + 1)) for i, (name, tensor) in enumerate(inputs.items())}
    if observers:
        options["query_modality"] = torch.randint(-1, 3, (batch, window), dtype=torch.int8).to(device)
    if with_lse:
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        options["lse"] = torch.rand(batch, kv_heads * group, window).to(device, sums) + 3
    assert_prunes(inputs, **options)


@given(seed=seeds, heads=HEADS, dtype=dtypes, budget=st.integers(5, 40))
def test_is_the_chain_of_its_parts(device, seed, heads, dtype, budget):
    inputs = problem(dtype=computed_in(dtype, device), device=device, seed=seed)
    other, window = copied(inputs), inputs["modality"][:, -5:]
    of_score = {name: inputs[name] for name in ("query", "key", "modality")}
    indices, lengths = csp_ext.select(
        *csp_ext.score(**of_score, heads=heads), inputs["modality"], window, budget=budget
    )
    csp_ext.compact_(other["key"], other["value"], indices)
    got = csp_ext.prune_(**inputs, budget=budget, heads=heads)
    for g, w in zip(
        (*got, inputs["key"], inputs["value"]), (indices, lengths, other["key"], other["value"]), strict=True
    ):
        assert torch.equal(g, w)


def test_matches_the_twin_in_float64():
    for chosen in (
        {},
        {"heads": "shared", "combine": "union", "pool": "max"},
        {"combine": "calibrated", "recent": 3},
    ):
        inputs = problem(dtype=torch.float64, keys=200, window=20)
        twin = copied(inputs)
        got = csp_ext.prune_(**inputs, budget=50, **chosen)
        want = reference.prune_(**twin, budget=50, **chosen)
        for g, w in zip(
            (*got, inputs["key"], inputs["value"]), (*want, twin["key"], twin["value"]), strict=True
        ):
            assert torch.equal(g, w)


def test_a_budget_of_all_keys_only_moves_padding_out_of_the_way(device):
    inputs = problem(keys=30, device=device)
    before, real = copied(inputs), (inputs["modality"] >= 0).sum(-1)
    _, lengths = csp_ext.prune_(**inputs, budget=30)
    assert torch.equal(lengths, real.int()[:, None].expand(-1, 2))
    for b in range(2):
        kept, free = inputs["modality"][b] >= 0, 30 - int(real[b])
        for name in ("key", "value"):
            assert torch.equal(inputs[name][b, :, free:], before[name][b][:, kept])
            assert not inputs[name][b, :, :free].any()


def test_pruning_what_was_pruned(device):
    """Algorithm 1 prunes again and again: the first slots of one call are the cache of the next."""
    inputs = problem(keys=60, device=device)
    inputs["modality"] = inputs["modality"].clamp_min(0)
    for budget in (40, 20, 8):
        pruned = {**inputs, **{name: inputs[name][:, :, : 2 * budget] for name in ("key", "value")}}
        pruned["modality"] = inputs["modality"][:, : pruned["key"].shape[2]]
        assert_prunes(pruned, budget=budget)


def test_halves_of_a_wider_tensor(device):
    wide = torch.randn(2, 2, 40, 20, device=device)
    rest = wide[..., 16:].clone()
    inputs = {**problem(device=device), "key": wide[..., :8], "value": wide[..., 8:16]}
    assert_prunes(inputs, budget=12)
    assert torch.equal(wide[..., 16:], rest)


def test_a_query_that_is_a_view_of_the_cache(device):
    """Everything is read before the first row moves."""
    inputs = problem(kv_heads=2, group=1, device=device)
    apart = copied(inputs)
    apart["query"] = apart["key"][:, :, :5].clone()
    inputs["query"] = inputs["key"][:, :, :5]
    want = csp_ext.prune(**apart, budget=12)
    indices, _ = csp_ext.prune_(**inputs, budget=12)
    assert torch.equal(indices, want[2])
    assert torch.equal(inputs["value"][:, :, :12], want[1])


def test_threads_do_not_change_a_bit():
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            inputs = problem(kv_heads=4, keys=1500, window=40)
            results.append(
                (*csp_ext.prune_(**inputs, budget=300, pool="max"), inputs["key"], inputs["value"])
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- torch's machinery ----


def test_opcheck(device):
    op = torch.ops.csp.prune_.default
    for settings in [{}, {"dtype": torch.bfloat16, "group": 1}, {"batch": 0}, {"window": 0}]:
        arguments = tuple(problem(**settings, device=device).values())
        torch.library.opcheck(op, arguments, {"budget": 12})
    arguments = tuple(problem(device=device).values())
    torch.library.opcheck(op, arguments, {"budget": 40, "heads": "shared", "combine": "union", "pool": "avg"})


def prefill(query: Tensor, key: Tensor, value: Tensor, modality: Tensor, budget: int) -> tuple[Tensor, ...]:
    """One cache that is computed in the graph, one that comes from outside."""
    key = key * 2
    indices, lengths = csp_ext.prune_(query, key, value, modality, budget=budget)
    return key[:, :, :budget] + 1, indices, lengths


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_once_without_a_graph_break(device, backend):
    torch._dynamo.reset()
    compiled = torch.compile(prefill, fullgraph=True, backend=backend, dynamic=True)
    for seed, (keys, budget) in enumerate(((40, 12), (333, 200))):
        inputs = problem(keys=keys, device=device, seed=seed)
        other = copied(inputs)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            got = compiled(**inputs, budget=budget)
        for g, w in zip(got, prefill(**other, budget=budget), strict=True):
            assert torch.equal(g, w)
        assert torch.equal(inputs["key"], other["key"])
        assert torch.equal(inputs["value"], other["value"])


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_of_the_caches_size_is_allocated(compiled):
    """Under torch.compile neither: functionalised, the change still happens in place."""

    def prune(query: Tensor, key: Tensor, value: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
        return csp_ext.prune_(query, key, value, modality, budget=100)

    torch._dynamo.reset()
    call = torch.compile(prune, fullgraph=True) if compiled else prune
    inputs = problem(kv_heads=4, keys=600, head_dim=64, value_dim=64)
    other = copied(inputs)
    call(**problem(kv_heads=4, keys=600, head_dim=64, value_dim=64, seed=1))
    with torch.profiler.profile(profile_memory=True) as profile:
        call(**inputs)
    events = profile.profiler.kineto_results.events()
    allocated = sum(event.nbytes() for event in events if event.nbytes() > 0)
    assert 0 < allocated < inputs["key"].nbytes / 4
    prune(**other)
    assert torch.equal(inputs["key"], other["key"])
    assert torch.equal(inputs["value"], other["value"])


class Pruner(torch.nn.Module):
    """A module as a framework author writes one."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, modality: Tensor) -> tuple[Tensor, ...]:
        key, value = key * 2, value * 1
        return (*csp_ext.prune_(query, key, value, modality, budget=12), key[:, :, :12], value)


def test_exports(device):
    module, inputs = Pruner(), problem(device=device)
    exported = torch.export.export(module, (), kwargs=inputs)
    for g, w in zip(exported.module()(**inputs), module(**inputs), strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("name", ["key", "value"])
def test_a_gradient_is_refused_where_one_is_wanted(device, name):
    inputs = problem(device=device)
    parameter = inputs[name].clone().requires_grad_()
    match = (
        f"csp::prune_: {name} must not require a gradient, got one that does: "
        "use csp_ext.select and csp_ext.compact"
    )
    with pytest.raises(ValueError, match=match):
        csp_ext.prune_(**{**inputs, name: parameter}, budget=12)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.csp.prune_(**{**inputs, name: parameter}, budget=12)
    with torch.no_grad():
        assert_prunes({**inputs, name: parameter}, budget=12)


def test_the_query_may_come_from_a_model_that_learns(device):
    inputs = problem(device=device)
    inputs["query"].requires_grad_()
    want = csp_ext.prune(**inputs, budget=12)
    indices, lengths = csp_ext.prune_(**inputs, budget=12)
    assert torch.equal(indices, want[2])
    assert not indices.requires_grad
    assert not lengths.requires_grad


def test_autograd_notices_that_a_saved_cache_changed(device):
    inputs = problem(device=device)
    weight = torch.ones((), requires_grad=True, device=device)
    loss = (weight * inputs["value"]).sum()
    csp_ext.prune_(**inputs, budget=12)
    assert inputs["key"]._version == inputs["value"]._version == 1
    assert inputs["query"]._version == inputs["modality"]._version == 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode_and_caches_made_in_it(device):
    inputs = problem(device=device)
    with torch.inference_mode():
        made = copied(inputs)
        assert_prunes(copied(inputs), budget=12)
        assert_prunes(inputs, budget=12)
    assert inputs["value"]._version == 1
    assert_prunes(made, budget=12)


# ---- errors ----


def assert_refused(arguments: dict[str, object], match: str) -> None:
    """Both the wrapper and the raw op refuse, and leave the caches as they are."""
    before = {name: arguments[name].clone() for name in ("key", "value")}
    with pytest.raises(ValueError, match=match):
        csp_ext.prune_(**arguments)
    with pytest.raises(RuntimeError, match=match):
        torch.ops.csp.prune_(**arguments)
    for name, cache in before.items():
        assert torch.equal(arguments[name], cache), name


@pytest.mark.parametrize(("arguments", "match"), BAD)
def test_refuses_what_prune_refuses(device, arguments, match):
    arguments = {name: moved(value, device) for name, value in arguments.items()}
    assert_refused(arguments, match.replace("csp::prune:", "csp::prune_:"))


@pytest.mark.parametrize("budget", [41, 2**31 - 1])
def test_a_budget_beyond_the_cache(device, budget):
    match = f"csp::prune_: budget must be at most key's L = 40 in place, got {budget}"
    assert_refused({**problem(device=device), "budget": budget}, match)


OVERLAPS = {
    r"key must have elements that share no memory, got strides .0, 640, 16, 1.": (
        lambda wide: (wide[:1, ..., :8].expand(2, -1, -1, -1), wide.new_ones(2, 2, 40, 6))
    ),
    "value must have elements that share no memory": (
        lambda wide: (wide[..., :8], wide.new_ones(2, 2, 1, 6).expand(-1, -1, 40, -1))
    ),
    "value must be clear of key in memory.*got tensors that overlap": (
        lambda wide: (wide[..., :8], wide[..., 7:15])
    ),
    "value must be clear of key": lambda wide: (wide[..., :8], wide[..., :8]),
}


@pytest.mark.parametrize(("match", "caches"), OVERLAPS.items())
def test_memory_that_overlaps(device, match, caches):
    wide = torch.randn(2, 2, 40, 16, device=device)
    key, value = caches(wide)
    assert_refused({**problem(device=device), "key": key, "value": value, "budget": 12}, match)


def test_the_twin_needs_room_for_the_rows():
    with pytest.raises(ValueError, match="budget must be at most key's L = 40 in place, got 41"):
        reference.prune_(**problem(), budget=41)
