"""Models loaded with flash_attention_2, on a stand-in for flash-attn: as with sdpa, and half the score."""

# ruff: noqa: E402  (these imports need the optional transformers)
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flash_stand_in
import pytest
import torch
from llava_reference import (
    RowReference,
    assert_batch_equals_rows,
    assert_logits_close,
    generate_batch,
    make_pixels,
    make_row,
    pad_batch,
    small_llava,
    split_pixels,
)

transformers = pytest.importorskip("transformers")

from torch._dynamo.utils import counters

from csp_ext import ops
from csp_ext.config import CSPConfig
from csp_ext.integration import CSPStaticCache, apply, flash
from csp_ext.integration import attention as attentions
from csp_ext.integration.front import Front
from csp_ext.methods import make_method

# Left padding; the third row is shorter than the budget, the fourth has no image.
ROWS = [make_row("5i3i12", 1), make_row("2i20", 2), make_row("9", 3), make_row("33", 4)]
BUDGET = 14
CONFIG = CSPConfig(budget=BUDGET, decode_n=1.0)
STATIC = {"cache_implementation": "static", "disable_compile": True}
FLASH = {"text_config": "flash_attention_2"}


@pytest.fixture(scope="module", autouse=True)
def flash_calls() -> Iterator[list[str]]:
    """The functions of flash-attn that were called."""
    with flash_stand_in.installed() as calls:
        yield calls


@pytest.fixture(scope="module")
def model() -> Any:
    model = small_llava(dtype=torch.float64, logit_gain=1.0)
    model.set_attn_implementation(FLASH)
    return model


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def lses(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of ``score`` was given an LSE; one that was is also run without."""
    seen: list[bool] = []
    score = ops.score

    def watched(*args: Any, lse: torch.Tensor | None = None, **kwargs: Any) -> Any:
        seen.append(lse is not None)
        found = score(*args, lse=lse, **kwargs)
        for given, own in zip(found, score(*args, **kwargs), strict=True):
            rtol = 1e-12 if given.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(given, own, rtol=rtol, atol=1e-12)
        return found

    monkeypatch.setattr(ops, "score", watched)
    return seen


def logits(output: Any) -> torch.Tensor:
    return torch.stack(output.logits)


# --- the same as sdpa ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("csp", {"hop": 0.0}),
        ("csp", {"hop": 0.45, "decode_n": 1.0}),
        ("csp", {"window": "question", "combine": "union", "cross_ratio": 0.5}),
        ("h2o", {}),
        ("snapkv", {}),
        ("pyramidkv-tuned", {}),
        ("lookm", {}),
    ],
)
def test_keeps_what_sdpa_keeps(
    name: str, fields: dict[str, Any], dtype: torch.dtype, lses: list[bool]
) -> None:
    method = make_method(name, budget=BUDGET, **fields)
    model = small_llava(dtype=dtype, logit_gain=1.0)
    for rows in (ROWS[:1], ROWS):
        with apply(model, method=method) as handle:
            expected = generate_batch(model, rows, 4)
        kept = [layer.indices for layer in handle.stats.layers]
        assert not any(lses)
        model.set_attn_implementation(FLASH)
        lses.clear()
        with apply(model, method=method) as handle:
            for options in ({}, STATIC):
                output = generate_batch(model, rows, 4, **options)
                assert_logits_close(logits(output), logits(expected), dtype)
                for layer, indices in zip(handle.stats.layers, kept, strict=True):
                    assert torch.equal(layer.indices, indices)
        # Twice two layers; the hop asks queries of its own, whose LSE nobody kept.
        window = [True, False] if fields.get("hop") or "combine" in fields else [True]
        assert lses == window * 4
        model.set_attn_implementation({"text_config": "sdpa"})
        lses.clear()


@pytest.mark.parametrize("steps", [4, 42])
def test_equals_the_masked_full_cache(model: Any, flash_calls: list[str], steps: int) -> None:
    rows = ROWS[1:] if steps > 5 else ROWS
    with apply(model, CONFIG):
        for options in ({}, STATIC):
            flash_calls.clear()
            output = generate_batch(model, rows, steps, **options)
            assert_batch_equals_rows(model, output, rows, CONFIG, BUDGET)
            assert flash_calls == ["flash_attn_varlen_func"] * 2  # the prompt, and nothing behind it


def test_bfloat16_and_autocast() -> None:
    for autocast in (False, True):
        model = small_llava()
        if not autocast:
            model.to(torch.bfloat16)
        found = []
        for base in ("sdpa", "flash_attention_2"):
            model.set_attn_implementation({"text_config": base})
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), apply(model, CONFIG):
                found.append(logits(generate_batch(model, ROWS, 1)).float())
        assert (found[0] - found[1]).abs().max() < 0.03 * found[0].abs().max()


# --- prompts and turns of every kind -------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("budget", [BUDGET, 80])
def test_padding_anywhere(model: Any, lses: list[bool], budget: int, static: bool) -> None:
    rows, config = ROWS[:2], CONFIG.replace(budget=budget)
    batch = pad_batch(rows, [[(52, 8)], [(0, 4), (25, 9), (38, 9)]])
    mask, tokens = batch["attention_mask"], [100, 101, 102]
    cache: Any = CSPStaticCache(model.config, max_new_tokens=3) if static else None
    pixels = make_pixels(rows, torch.float64)
    with apply(model, config):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        cache = model(
            **batch, position_ids=positions, pixel_values=pixels, past_key_values=cache
        ).past_key_values
        assert lses == [True, False] * 2 * (budget == BUDGET)
        found = []
        for token in tokens:
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            step = {"input_ids": torch.full((2, 1), token), "attention_mask": mask}
            position = mask.sum(-1, keepdim=True) - 1
            output = model(**step, position_ids=position, past_key_values=cache)
            found.append(output.logits[:, -1])
    for index, images in enumerate(split_pixels(rows, pixels)):
        row = RowReference(model, config, budget)
        row.feed(rows[index], images, prune=True)
        expected = torch.stack([row.feed([token])[-1] for token in tokens])
        assert_logits_close(torch.stack(found, dim=1)[index], expected, torch.float64)


def test_chunks_drafts_and_beams(model: Any, lses: list[bool]) -> None:
    rows = [make_row("5i15", 1), make_row("2i20", 2), make_row("9", 3)]
    repeated = [make_row("5i3", 1) + make_row("4", 9) * 6]
    cases: list[tuple[list[list[int]], dict[str, Any], bool]] = [
        (rows, {"prefill_chunk_size": 7}, False),  # the window's queries come from several forwards
        (repeated, {"prompt_lookup_num_tokens": 3, "eos_token_id": 2}, True),
        (rows, {"num_beams": 3, "num_return_sequences": 3}, True),
    ]
    config = CONFIG.replace(hop=0.0)
    for prompts, options, arrives in cases:
        model.set_attn_implementation({"text_config": "sdpa"})
        with apply(model, config):
            expected = generate_batch(model, prompts, 8, **options)
        model.set_attn_implementation(FLASH)
        lses.clear()
        with apply(model, config):
            output = generate_batch(model, prompts, 8, **options)
        assert torch.equal(output.sequences, expected.sequences)
        assert_logits_close(logits(output), logits(expected), torch.float64)
        assert lses == [arrives] * 2


@pytest.mark.parametrize(("words", "hidden"), [(1, 0), (6, 0), (6, 1), (12, 0), (12, 1)])
@pytest.mark.parametrize("budget", [BUDGET, 54])
def test_a_second_turn(model: Any, words: int, hidden: int, budget: int) -> None:
    """Its tokens may be padded, too; with the larger budget it is the second turn that exceeds it."""
    new = torch.randint(4, 384, (len(ROWS), words), generator=torch.Generator().manual_seed(11))
    mask = pad_batch(ROWS)["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(len(ROWS), 4 + words)], dim=1)
    mask[1, -words:][:hidden] = 0

    def talk(**options: Any) -> torch.Tensor:
        first = generate_batch(model, ROWS, 4, disable_compile=True, **options)
        output = model.generate(
            input_ids=torch.cat([first.sequences, new], dim=1),
            attention_mask=mask,
            past_key_values=first.past_key_values,
            max_new_tokens=4,
            disable_compile=True,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return logits(output)

    caches: list[dict[str, Any]] = [{}]
    if budget == BUDGET:  # a static cache is not pruned by a later turn
        caches.append({"past_key_values": CSPStaticCache(model.config, max_new_tokens=20)})
    model.set_attn_implementation({"text_config": "sdpa"})
    with apply(model, CONFIG.replace(budget=budget)):
        expected = talk()
    model.set_attn_implementation(FLASH)
    with apply(model, CONFIG.replace(budget=budget)):
        for cache in caches:
            assert_logits_close(talk(**cache), expected, torch.float64)


def test_one_graph_for_compiled_steps(model: Any) -> None:
    torch._dynamo.reset()
    counters.clear()
    settings = transformers.CompileConfig(fullgraph=True, backend="eager", mode="default")
    settings._compile_all_devices = True  # transformers compiles on accelerators only, unless told otherwise
    with apply(model, CONFIG):
        for rows in (ROWS, [make_row("5i3i19", 1), *ROWS[1:]]):
            output = generate_batch(model, rows, 6, cache_implementation="static", compile_config=settings)
            assert_batch_equals_rows(model, output, rows, CONFIG, BUDGET)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# --- in and out ----------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [None, "csp"])
def test_the_model_is_given_back(model: Any, attention: str | None) -> None:
    text = model.config.text_config
    before = generate_batch(model, ROWS, 3)
    with apply(model, CONFIG, attention=attention) as handle:
        assert text._attn_implementation == "csp_fa2"
        assert model.config.vision_config._attn_implementation == "sdpa"
        generate_batch(model, ROWS, 3)
        assert apply(model, budget=BUDGET) is handle
        assert text._attn_implementation == "csp_fa2"
    assert text._attn_implementation == "flash_attention_2"
    assert torch.equal(logits(generate_batch(model, ROWS, 3)), logits(before))


def test_a_model_that_is_flash_throughout(model: Any) -> None:
    model.set_attn_implementation("flash_attention_2")
    try:
        with apply(model, CONFIG):
            assert model.config.vision_config._attn_implementation == "flash_attention_2"
            output = generate_batch(model, ROWS, 3)
        assert model.config.text_config._attn_implementation == "flash_attention_2"
        assert_batch_equals_rows(model, output, ROWS, CONFIG, BUDGET)
    finally:
        model.set_attn_implementation("sdpa")
        model.set_attn_implementation(FLASH)


def test_a_prompt_within_its_budget_goes_on_as_before(model: Any, flash_calls: list[str]) -> None:
    whole = generate_batch(model, ROWS, 5)
    flash_calls.clear()
    with apply(model, budget=80, decode_n=1.0):
        same = generate_batch(model, ROWS, 5)
    assert torch.equal(logits(same), logits(whole))
    assert flash_calls == ["flash_attn_varlen_func"] * 2 * 5


# --- the LSE -------------------------------------------------------------------------------


def states(seed: int, queries: int, keys: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 4, queries, 16), (2, 2, keys, 16), (2, 2, keys, 16))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.fixture
def module(model: Any) -> Any:
    return model.model.language_model.layers[0].self_attn


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"sliding_window": 4},
        {"is_causal": False},
        {"s_aux": torch.zeros(4)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_more_than_plain_attention_is_left_to_transformers(module: Any, options: dict[str, Any]) -> None:
    query, key, value = states(0, 9, 9)
    plain, plain_lse = flash.attend_with_lse(module, query, key, value, None, scaling=0.3)
    assert plain_lse is not None
    output, lse = flash.attend_with_lse(module, query, key, value, None, scaling=0.3, **options)
    assert lse is None
    # FA2 knows no sinks; the other options change the output.
    assert torch.equal(output, plain) == ("s_aux" in options)
    assert torch.equal(output, flash.attend(module, query, key, value, None, scaling=0.3, **options)[0])


def test_the_lse_of_a_later_turn_is_of_all_keys(module: Any) -> None:
    query, key, value = states(1, 5, 14)
    _, lse = flash.attend_with_lse(module, query, key, value, None)
    scores = query @ key.repeat_interleave(2, dim=1).mT / 4
    hidden = torch.ones(5, 14, dtype=torch.bool).triu(10)
    assert lse is not None
    torch.testing.assert_close(lse, scores.masked_fill(hidden, -torch.inf).logsumexp(-1))
    # With padding, transformers packs such a turn itself.
    assert flash.attend_with_lse(module, query, key, value, torch.ones(2, 14, dtype=torch.bool))[1] is None


def test_the_lse_of_older_versions_is_dropped(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import flash_attn

    def older(*args: Any, **kwargs: Any) -> Any:
        output, lse, _ = flash_stand_in.flash_attn_varlen_func(*args, **kwargs)
        return output, lse.new_zeros(2, lse.shape[0], args[5]), None

    query, key, value = states(2, 9, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    expected, known = flash.attend_with_lse(module, query, key, value, mask)
    assert known is not None
    assert torch.equal(known[1, :, :4], torch.full((4, 4), -torch.inf))
    monkeypatch.setattr(flash_attn, "flash_attn_varlen_func", older)
    output, lse = flash.attend_with_lse(module, query, key, value, mask)
    assert lse is None
    assert torch.equal(output, expected)
    assert torch.equal(output, flash.attend(module, query, key, value, mask)[0])


def test_values_of_another_width(module: Any) -> None:
    query, key, value = states(3, 7, 7)
    expected, _ = flash.attend(module, query, key, value, None)
    narrow, lse = flash.attend_with_lse(module, query, key, value[..., :12], None)
    assert lse is None
    assert torch.equal(narrow, expected[..., :12])


def test_padding_that_only_the_modality_knows(model: Any, lses: list[bool]) -> None:
    """Attention saw it, so its LSE is not that of the scores."""
    row = torch.tensor([make_row("40", 5)])
    modality, kept = torch.zeros_like(row), []
    for hidden in (0, 12):
        modality[:, 8 : 8 + hidden] = -1
        for base in ("sdpa", "flash_attention_2"):
            model.set_attn_implementation({"text_config": base})
            with apply(model, CONFIG.replace(hop=0.0)) as handle, handle.prompt(modality=modality):
                model(input_ids=row)
            kept.append(handle.stats.layers[0].indices)
        assert torch.equal(kept[-2], kept[-1])
    assert lses == [False, False, True, True] + [False] * 4


@pytest.mark.parametrize("queries", [1, 3])
def test_softcap_behind_a_pruned_prompt_is_the_model_s_own(queries: int) -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    module = Gemma2Attention(transformers.Gemma2Config(**sizes, num_hidden_layers=1), 0).double()
    query, key, value = states(4, queries, 9)
    start = torch.tensor([[0, 2], [1, 4]], dtype=torch.int32)
    key.csp_front = Front(6, start=start, n=2.5)  # type: ignore[attr-defined]
    output, _ = attentions._attend_flash(module, query, key, value, None, scaling=0.3, softcap=2.0)
    logits = (query @ key.repeat_interleave(2, dim=1).mT * 0.3 / 2).tanh() * 2
    seen = torch.ones(queries, 9, dtype=torch.bool).tril(9 - queries)
    seen = seen & (torch.arange(9) >= start.repeat_interleave(2, dim=1)[:, :, None, None])
    mass = logits.exp() * seen
    expected = mass / (mass.sum(-1, keepdim=True) + 2.5) @ value.repeat_interleave(2, dim=1)
    torch.testing.assert_close(output.transpose(1, 2), expected, rtol=0, atol=1e-6)
