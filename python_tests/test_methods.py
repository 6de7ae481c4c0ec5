"""Every registered method inside a model: batches, padding, GQA, budgets, and pruning from a recording."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llava_reference import (
    assert_logits_close,
    generate_batch,
    make_pixels,
    make_row,
    pad_batch,
    small_llava,
    split_pixels,
)

pytest.importorskip("transformers")

from csp_ext.integration import apply
from csp_ext.integration.recording import Recording
from csp_ext.methods import METHODS, Method, make_method

# Left padding everywhere; the third row is shorter than the budget, the fourth has no image, and the last is
# shorter than what the first layer of a pyramid would keep.
ROWS = [make_row("5i3i12", 1), make_row("2i20", 2), make_row("9", 3), make_row("33", 4), make_row("2i2", 5)]
LONG = [row for row in ROWS if len(row) > 9]
BUDGET, RECENT = 14, 4
STEPS = 4
# The methods' own sizes are for longer prompts: here nothing would be left to choose.
SMALL: dict[str, dict[str, Any]] = {
    "snapkv": {"recent": RECENT, "window": 6},
    "snapkv-raw": {"recent": RECENT, "window": 6},
    "pyramidkv": {"recent": RECENT, "window": 6},
    "roco": {"recent": RECENT, "sinks": 1, "protected": 3},
    "random": {"recent": RECENT},
    # As the release: a share of each batch's longest prompt.
    "csp-release": {"budget": 0.4},
}
UNEVEN = {"full", "csp-release", "lookm-tp-release", "pyramidkv", "pyramidkv-tuned"}


def method_of(name: str, **fields: Any) -> Method:
    return make_method(name, **{"budget": BUDGET, **SMALL.get(name, {}), **fields})


@pytest.fixture(scope="module")
def gqa64() -> Any:
    return small_llava(dtype=torch.float64, num_layers=3, num_heads=4, num_kv_heads=2, logit_gain=1.0)


@pytest.fixture(scope="module")
def mha32() -> Any:
    return small_llava(seed=1, num_heads=2, num_kv_heads=2)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    return pad_batch(ROWS) | {"pixel_values": make_pixels(ROWS, torch.float64)}


@pytest.fixture(scope="module")
def recording(gqa64: Any, inputs: dict[str, Any]) -> Recording:
    with apply(gqa64) as handle:
        return Recording.of(handle, inputs)


@pytest.fixture(scope="module")
def untouched(gqa64: Any) -> Any:
    return generate_batch(gqa64, ROWS, STEPS)


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def generate_alone(model: Any, row: list[int], pixels: torch.Tensor | None) -> torch.Tensor:
    """Return the logits [steps, V] of one row."""
    images = {} if pixels is None else {"pixel_values": pixels}
    settings = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(input_ids=torch.tensor([row]), max_new_tokens=STEPS, **images, **settings)
    return torch.stack(output.logits, dim=1)[0]


@pytest.mark.parametrize(
    ("kind", "rows"), [("gqa64", ROWS), ("gqa64", LONG), ("mha32", ROWS)], ids=["gqa", "long", "mha"]
)
def test_a_padded_batch_equals_its_rows(
    request: pytest.FixtureRequest, name: str, kind: str, rows: list[list[int]]
) -> None:
    model = request.getfixturevalue(kind)
    with apply(model, method=method_of(name)) as handle:
        together = generate_batch(model, rows, STEPS)
        assert (sum(layer.dropped for layer in handle.stats.layers) > 0) == (name != "full")
        logits = torch.stack(together.logits, dim=1)
        assert logits.isfinite().all()
        if name in ("random", "csp-release"):
            return
        for index, pixels in enumerate(split_pixels(rows, make_pixels(rows, model.dtype))):
            assert_logits_close(logits[index], generate_alone(model, rows[index], pixels), model.dtype)


def test_pruning_shows_in_the_answer(gqa64: Any, untouched: Any, name: str) -> None:
    with apply(gqa64, method=method_of(name)):
        pruned = generate_batch(gqa64, ROWS, STEPS)
    assert torch.equal(pruned.logits[0], untouched.logits[0])
    difference = (pruned.logits[1] - untouched.logits[1]).abs().amax(-1)
    changed = difference > 1e-3
    # The short row is whole everywhere; both releases leave a row of text alone.
    leaves_text = name in ("full", "csp-release", "lookm-tp-release")
    prunes = name != "full"
    assert changed.tolist() == [prunes, prunes, False, not leaves_text, prunes]


def test_a_large_budget_is_the_untouched_model(gqa64: Any, untouched: Any, name: str) -> None:
    with apply(gqa64, method=method_of(name, budget=1.2 if name == "csp-release" else 60)) as handle:
        same = generate_batch(gqa64, ROWS, STEPS)
    assert torch.equal(same.sequences, untouched.sequences)
    assert all(torch.equal(one, two) for one, two in zip(same.logits, untouched.logits, strict=True))
    assert handle.stats.bytes_after == handle.stats.bytes_before


def test_a_recording_is_pruned_as_the_model(
    gqa64: Any, inputs: dict[str, Any], recording: Recording, name: str
) -> None:
    method = method_of(name)
    with apply(gqa64, method=method) as handle:
        # A recording counts positions as generate does; a plain forward counts the padding, too.
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        output = gqa64(**inputs, position_ids=positions, use_cache=True)
        cache, stats = recording.pruned(method)
        torch.testing.assert_close(recording.logits, output.logits[:, -1], rtol=1e-9, atol=1e-9)
        pairs = zip(cache.layers, output.past_key_values.layers, strict=True)
        for layer, (ours, theirs) in enumerate(pairs):
            assert torch.equal(stats.layers[layer].indices, handle.stats.layers[layer].indices)
            assert (ours.bias is None) == (theirs.bias is None)
            if ours.bias is not None:
                assert torch.equal(ours.bias, theirs.bias)
            real = slots_in_use(ours)
            for one, two in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                torch.testing.assert_close(one * real, two * real, rtol=1e-9, atol=1e-9)


def slots_in_use(layer: Any) -> torch.Tensor:
    """Return which slots [B, 1 or Hkv, S, 1] some token sees."""
    if layer.bias is None:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool)
    bias = layer.bias[:, :, 0]
    return (bias[:, :: max(1, bias.shape[1] // 2)] > -1e9)[..., None]


@pytest.mark.parametrize("name", sorted(METHODS.keys() - UNEVEN))
def test_budgets_are_exact(recording: Recording, name: str) -> None:
    _, stats = recording.pruned(method_of(name))
    for layer in stats.layers:
        want = torch.tensor([min(len(row), BUDGET) for row in ROWS])
        assert torch.equal(layer.lengths, want[:, None].expand_as(layer.lengths))


def test_heads_share_a_mask_where_the_budget_is_exact(recording: Recording, name: str) -> None:
    method = method_of(name)
    cache, stats = recording.pruned(method)
    lengths = [len(row) for row in ROWS]
    exact = method.start(recording.modality, max(lengths), True).exact
    for layer, kept in zip(cache.layers, stats.layers, strict=True):
        if layer.bias is not None:
            assert layer.bias.shape[1] == (1 if exact else 4)
        assert not exact or (kept.lengths == kept.lengths[:, :1]).all()


def test_a_pyramid_has_its_budget_over_all_layers(recording: Recording) -> None:
    _, stats = recording.pruned(method_of("pyramidkv"))
    lengths = torch.stack([layer.lengths for layer in stats.layers])
    assert lengths.shape == (3, 5, 2)
    total = torch.tensor([3 * min(len(row), BUDGET) for row in ROWS])
    assert torch.equal(lengths.sum(0), total[:, None].expand(5, 2))
    # 10 slots beside the recent ones: 20, 10 and 0; of 20 tokens 16 are not recent
    assert lengths[:, 0, 0].tolist() == [RECENT + 20, RECENT + 10, RECENT]
    assert lengths[:, 4, 0].tolist() == [RECENT + 16, RECENT + 10, RECENT + 4]


def test_the_released_text_prior_keeps_all_text(recording: Recording) -> None:
    _, stats = recording.pruned(method_of("lookm-tp-release"))
    half = BUDGET // 2
    for layer in stats.layers:
        for row, ids in enumerate(ROWS):
            text = sum(token != 3 for token in ids[:-half])
            assert layer.lengths[row].tolist() == [min(len(ids), max(half, text) + half)] * 2
        assert layer.share_kept(0) == 1


def test_merging_changes_the_cache_and_nothing_else(recording: Recording) -> None:
    plain, stats = recording.pruned(make_method("lookm", merge="none", budget=BUDGET))
    for name in ("lookm", "lookm-average", "lookm-weighted"):
        merged, same = recording.pruned(method_of(name))
        for index, layer in enumerate(merged.layers):
            assert torch.equal(stats.layers[index].indices, same.layers[index].indices)
            assert not torch.allclose(layer.keys, plain.layers[index].keys)
            assert not torch.allclose(layer.values, plain.layers[index].values)
            # The short row lost nothing that could be merged.
            assert torch.equal(layer.keys[2], plain.layers[index].keys[2])


def test_names_are_different_methods(recording: Recording) -> None:
    left = set()
    for name in METHODS.keys() - {"full"}:
        cache, stats = recording.pruned(method_of(name))
        indices = [layer.indices.tolist() for layer in stats.layers]
        left.add(str((indices, [float(layer.keys.sum()) for layer in cache.layers])))
    assert len(left) == len(METHODS) - 1


BAD_FIELDS: list[tuple[str, str, Any]] = [
    ("random", "seed", "one"),
    ("streaming", "sinks", -1),
    ("snapkv", "pool", "min"),
    ("snapkv", "pool_kernel", 4),
    ("snapkv-raw", "pool_kernel", 0),
    ("snapkv-release", "window", 0),
    ("pyramidkv", "recent", -1),
    ("h2o", "window", "answer"),
    ("roco", "sinks", 1.0),
    ("roco", "protected", 1.5),
    ("roco", "protected", -1),
    ("roco", "protected", "some"),
    ("lookm", "merge", "sum"),
    ("lookm", "merge", None),
    ("lookm-tp", "text_prior", True),
    ("lookm-average", "aligned", 1),
    ("lookm-weighted", "aligned", False),
    ("csp", "combine", "sum"),
    ("csp-paper", "n", -1),
    ("csp-release", "cross_ratio", 2),
]


@pytest.mark.parametrize(("method", "field", "value"), BAD_FIELDS)
def test_a_bad_field_is_named(method: str, field: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"\b{field}\b.*{value}"):
        make_method(method, **{field: value})


@pytest.mark.parametrize("value", [-1, -0.2, "half", None, True])
def test_a_bad_budget_is_named(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^budget .*{value}"):
        make_method(name, budget=value)


def test_unknown_fields_and_names(name: str) -> None:
    with pytest.raises((TypeError, ValueError), match="budgets"):
        make_method(name, budgets=3)
    with pytest.raises(ValueError, match=f"^method must be one of .*{name}.*, got 'h3o'"):
        make_method("h3o")
