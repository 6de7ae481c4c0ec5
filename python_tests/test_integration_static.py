"""Caches of fixed capacity and csp_ext's own decode attention: the same logits as growing caches and sdpa."""

# ruff: noqa: E402  (these imports need the optional transformers)
from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from typing import Any

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

import csp_ext
from csp_ext.config import CSPConfig
from csp_ext.integration import CSPStaticCache, apply, front
from csp_ext.methods import make_method

# Left padding; the third row is shorter than the budget, the fourth has no image.
ROWS = [make_row("5i3i12", 1), make_row("2i20", 2), make_row("9", 3), make_row("33", 4)]
ONE_IMAGE_ROWS = [make_row("5i15", 1), make_row("2i20", 2), make_row("9", 3)]
BUDGET = 14
CONFIG = CSPConfig(budget=BUDGET, decode_n=1.0)
STATIC = {"cache_implementation": "static", "disable_compile": True}
ATTENTIONS = pytest.mark.parametrize("attention", [None, "csp"])


@pytest.fixture(scope="module")
def gqa64(device: str) -> Any:
    return small_llava(dtype=torch.float64, logit_gain=1.0).to(device)


@pytest.fixture(scope="module")
def gqa32(device: str) -> Any:
    return small_llava(seed=1, num_layers=3).to(device)


@pytest.fixture(scope="module")
def model() -> Any:
    return small_llava(dtype=torch.float64, logit_gain=1.0)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def logits(output: Any) -> torch.Tensor:
    return torch.stack(output.logits)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of queries of every call of ``decode``."""
    seen: list[int] = []

    def counted(query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(query.shape[2])
        return csp_ext.decode(query, *args, **kwargs)

    monkeypatch.setattr(front, "decode", counted)
    return seen


# --- against the masked full cache, and growing caches -------------------------------------


@ATTENTIONS
@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"decode_n": 0.0}, 5),
        ({"decode_n": 1.0}, 42),
        ({"decode_n": 2.5, "heads": "shared"}, 5),
        ({"decode_n": 1.0, "text_only": "leave"}, 5),
    ],
)
def test_equals_masked_full_cache(
    gqa64: Any, attention: str | None, fields: dict[str, Any], steps: int
) -> None:
    config = CSPConfig(budget=BUDGET, **fields)
    rows = ROWS[1:] if steps > 5 else ROWS
    with apply(gqa64, config, attention=attention):
        for options in ({}, STATIC):
            output = generate_batch(gqa64, rows, steps, **options)
            assert_batch_equals_rows(gqa64, output, rows, config, BUDGET)
    assert isinstance(output.past_key_values, CSPStaticCache)


@ATTENTIONS
@pytest.mark.parametrize("decode_n", [0.0, 1.0])
@pytest.mark.parametrize("name", ["csp", "snapkv", "pyramidkv-tuned", "lookm", "lookm-tp-release"])
def test_methods_in_float32(gqa32: Any, attention: str | None, decode_n: float, name: str) -> None:
    method = make_method(name, budget=BUDGET)
    if name == "csp":
        method = make_method(name, budget=BUDGET, decode_n=decode_n)
    else:
        object.__setattr__(method, "decode_n", decode_n)  # no field of theirs, but every method has one
    with apply(gqa32, method=method):
        grown = generate_batch(gqa32, ROWS, 12)
    with apply(gqa32, method=method, attention=attention):
        for options in ({}, STATIC):
            output = generate_batch(gqa32, ROWS, 12, **options)
            assert_logits_close(logits(output), logits(grown), torch.float32)


def test_a_prompt_on_its_way_into_a_buffer_is_compacted_in_place(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing beside the prompt and the buffer: the kept rows have no tensor of their own."""
    with apply(model, CONFIG):
        expected = generate_batch(model, ROWS, 4)
        monkeypatch.setattr(csp_ext.ops, "compact", None)
        output = generate_batch(model, ROWS, 4, **STATIC)
    assert_logits_close(logits(output), logits(expected), torch.float64)


def test_sizes_differ_between_layers_and_capacity_is_exact(gqa32: Any) -> None:
    with apply(gqa32, method="pyramidkv-tuned", budget=BUDGET):
        cache = generate_batch(gqa32, ROWS[:2], 6, **STATIC).past_key_values
    slots = [layer.slots for layer in cache.layers]
    assert slots == sorted(slots, reverse=True)
    assert len(set(slots)) > 1
    assert [layer.keys.shape[2] for layer in cache.layers] == [count + 6 for count in slots]
    for layer in cache.layers:
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    assert cache.is_compileable
    assert cache.is_initialized
    longest = max(map(len, ROWS[:2]))
    assert int(cache.get_seq_length()) == longest + 5
    assert cache.get_mask_sizes(1, 0) == (slots[0] + 6, longest - slots[0])
    assert cache.layers[0].get_max_length() == longest + 6


@ATTENTIONS
@pytest.mark.parametrize("budget", [60, 200])
def test_a_prompt_within_its_budget(model: Any, attention: str | None, budget: int) -> None:
    whole = generate_batch(model, ROWS, 6)
    with apply(model, budget=budget, decode_n=1.0, attention=attention):
        same = generate_batch(model, ROWS, 6, **STATIC)
    assert_logits_close(logits(same), logits(whole), torch.float64)
    assert same.past_key_values.layers[0].slots == max(map(len, ROWS))


@ATTENTIONS
@pytest.mark.parametrize("budget", [BUDGET, 80])
@pytest.mark.parametrize("static", [False, True])
def test_padding_anywhere_in_a_plain_forward(
    model: Any, attention: str | None, budget: int, static: bool
) -> None:
    rows, config = ROWS[:2], CONFIG.replace(budget=budget)
    batch = pad_batch(rows, [[(52, 8)], [(0, 4), (25, 9), (38, 9)]])
    mask, tokens, found = batch["attention_mask"], [100, 101, 102], []
    cache: Any = CSPStaticCache(model.config, max_new_tokens=3) if static else None
    with apply(model, config, attention=attention):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        pixels = make_pixels(rows, torch.float64)
        cache = model(
            **batch, position_ids=positions, pixel_values=pixels, past_key_values=cache
        ).past_key_values
        for token in tokens:
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            output = model(
                input_ids=torch.full((2, 1), token),
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                past_key_values=cache,
            )
            found.append(output.logits[:, -1])
    for index, images in enumerate(split_pixels(rows, pixels)):
        row = RowReference(model, config, budget)
        row.feed(rows[index], images, prune=True)
        expected = torch.stack([row.feed([token])[-1] for token in tokens])
        assert_logits_close(torch.stack(found, dim=1)[index], expected, torch.float64)


def test_decode_attends_to_one_token_at_a_time(model: Any, calls: list[int]) -> None:
    with apply(model, CONFIG, attention="csp") as handle:
        assert model.config.text_config._attn_implementation == "csp"
        generate_batch(model, ROWS, 4)
        assert calls == [1] * (3 * 2)
        generate_batch(model, ROWS, 4, **STATIC)
        assert calls == [1] * (6 * 2)
        assert apply(model, CONFIG) is handle
        generate_batch(model, ROWS, 4)
        assert len(calls) == 12
    assert model.config.text_config._attn_implementation == "sdpa"


# --- compiled ------------------------------------------------------------------------------


def compiled(backend: str) -> dict[str, Any]:
    config = transformers.CompileConfig(fullgraph=True, backend=backend, mode="default")
    config._compile_all_devices = True  # transformers compiles on accelerators only, unless told otherwise
    return {"cache_implementation": "static", "compile_config": config}


@ATTENTIONS
@pytest.mark.parametrize("decode_n", [0.0, 1.0])
def test_one_graph_for_prompts_of_any_length(model: Any, attention: str | None, decode_n: float) -> None:
    longer = [[make_row("5i3i19", 1), *ROWS[1:]], [make_row("3i9i2i30", 1), *ROWS[1:]], ROWS]
    torch._dynamo.reset()
    counters.clear()
    config = CONFIG.replace(decode_n=decode_n)
    with apply(model, config, attention=attention):
        for rows in (ROWS, *longer):
            eager = generate_batch(model, rows, 6, **STATIC)
            with torch._dynamo.config.patch(error_on_recompile=True):
                output = generate_batch(model, rows, 6, **compiled("eager"))
            assert_logits_close(logits(output), logits(eager), torch.float64)
        assert_batch_equals_rows(model, output, ROWS, config, BUDGET)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


@ATTENTIONS
def test_a_share_of_the_prompt_compiles_with_a_dynamic_size(model: Any, attention: str | None) -> None:
    torch._dynamo.reset()
    counters.clear()
    with apply(model, CONFIG.replace(budget=0.25), attention=attention):
        for words in (12, 22, 32, 27):
            rows = [make_row(f"5i3i{words}", 1), ROWS[1]]
            grown = generate_batch(model, rows, 4)
            output = generate_batch(model, rows, 4, **compiled("eager"))
            assert_logits_close(logits(output), logits(grown), torch.float64)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_compiled_model_before_and_after(model: Any) -> None:
    torch._dynamo.reset()
    whole = generate_batch(model, ROWS, 4)
    assert_logits_close(
        logits(generate_batch(model, ROWS, 4, **compiled("eager"))), logits(whole), torch.float64
    )
    for attention in (None, "csp", None):
        with apply(model, CONFIG, attention=attention):
            output = generate_batch(model, ROWS, 4, **compiled("eager"))
        assert_batch_equals_rows(model, output, ROWS, CONFIG, BUDGET)
    assert_logits_close(
        logits(generate_batch(model, ROWS, 4, **compiled("eager"))), logits(whole), torch.float64
    )


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a compiler")
def test_inductor() -> None:
    model = small_llava(num_layers=1)
    torch._dynamo.reset()
    counters.clear()
    with apply(model, CONFIG, attention="csp"):
        for rows in (ROWS, [make_row("5i3i19", 1), *ROWS[1:]]):
            grown = generate_batch(model, rows, 4)
            output = generate_batch(model, rows, 4, **compiled("inductor"))
            assert_logits_close(logits(output), logits(grown), torch.float32)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# --- generation of other kinds, and several of them ----------------------------------------


@ATTENTIONS
@pytest.mark.parametrize("graph", [False, True])
def test_beams_are_reordered_in_place(model: Any, attention: str | None, graph: bool) -> None:
    beams = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True}
    torch._dynamo.reset()
    with apply(model, CONFIG, attention=attention):
        grown = generate_batch(model, ONE_IMAGE_ROWS, 6, **beams)
        cache = CSPStaticCache(model.config, max_new_tokens=6)
        generate_batch(model, ONE_IMAGE_ROWS, 6, **beams, past_key_values=cache, disable_compile=True)
        place = cache.layers[0].keys
        cache.reset()
        options = compiled("eager") if graph else dict(STATIC)
        options["cache_implementation"] = None
        output = generate_batch(model, ONE_IMAGE_ROWS, 6, **beams, **options, past_key_values=cache)
        assert cache.layers[0].keys is place
    assert torch.equal(output.sequences, grown.sequences)
    assert (output.sequences_scores - grown.sequences_scores).abs().max() < 1e-6


@ATTENTIONS
def test_sampling_and_chunks(model: Any, attention: str | None) -> None:
    cases: list[tuple[Any, dict[str, Any]]] = [
        (ONE_IMAGE_ROWS, {"do_sample": True, "num_return_sequences": 3}),
        (ONE_IMAGE_ROWS, {"prefill_chunk_size": 7}),
    ]
    with apply(model, CONFIG, attention=attention):
        for rows, options in cases:
            torch.manual_seed(0)
            grown = generate_batch(model, rows, 8, **options)
            torch.manual_seed(0)
            output = generate_batch(model, rows, 8, **options, **STATIC)
            assert_logits_close(logits(output), logits(grown), torch.float64)
            assert isinstance(output.past_key_values, CSPStaticCache)
            assert output.past_key_values.layers[0].slots == grown.past_key_values.layers[0].slots


@ATTENTIONS
def test_assisted_decoding(model: Any, attention: str | None) -> None:
    assistant = small_llava(dtype=torch.float64, logit_gain=1.0)
    row = make_row("5i3", 1) + make_row("4", 9) * 6
    cases: list[tuple[Any, dict[str, Any]]] = [
        ([row], {"prompt_lookup_num_tokens": 3, "eos_token_id": 2}),
        (ROWS[:1], {"assistant_model": assistant, "eos_token_id": 2}),
    ]
    with apply(model, CONFIG, attention=attention):
        for rows, options in cases:
            grown = generate_batch(model, rows, 8, **options)
            try:
                output = generate_batch(model, rows, 8, **options, **STATIC)
            except ValueError as error:
                pytest.skip(f"transformers {transformers.__version__} refuses it: {error}")
            assert_logits_close(logits(output), logits(grown), torch.float64)
            assert output.past_key_values.layers[0].slots == grown.past_key_values.layers[0].slots


@ATTENTIONS
@pytest.mark.parametrize("words", [1, 6, 12])
@pytest.mark.parametrize("hidden", [0, 1])
def test_a_second_turn(model: Any, attention: str | None, words: int, hidden: int, calls: list[int]) -> None:
    """Also one whose own tokens are padded, which only a mask can express."""
    new = torch.randint(4, 384, (len(ROWS), words), generator=torch.Generator().manual_seed(11))

    def talk(**options: Any) -> Any:
        first = generate_batch(model, ROWS, 4, disable_compile=True, **options)
        calls.clear()
        mask = pad_batch(ROWS)["attention_mask"]
        mask = torch.cat([mask, mask.new_ones(len(ROWS), 4 + words)], dim=1)
        mask[1, -words:][:hidden] = 0
        return model.generate(
            input_ids=torch.cat([first.sequences, new], dim=1),
            attention_mask=mask,
            past_key_values=first.past_key_values,
            max_new_tokens=4,
            disable_compile=True,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )

    with apply(model, CONFIG):
        expected = logits(talk())
    with apply(model, CONFIG, attention=attention):
        for cache in ({}, {"past_key_values": CSPStaticCache(model.config, max_new_tokens=20)}):
            assert_logits_close(logits(talk(**cache)), expected, torch.float64)
            own = attention == "csp" and not hidden
            assert calls == ([words + 1] * 2 * (words < 8) + [1] * 2 * 3) * own


@ATTENTIONS
def test_autocast(attention: str | None) -> None:
    model = small_llava()
    with torch.autocast("cpu", torch.bfloat16):
        with apply(model, CONFIG):
            grown = generate_batch(model, ROWS, 4)
        with apply(model, CONFIG, attention=attention):
            output = generate_batch(model, ROWS, 4, **STATIC)
    assert (logits(output) - logits(grown)).abs().max() < 0.02 * logits(grown).abs().max()


def test_two_generations_share_nothing(model: Any) -> None:
    other = [make_row("4i9", 8), make_row("i2i30", 9), make_row("7", 5), make_row("i5", 6)]
    with apply(model, CONFIG) as handle:
        first = generate_batch(model, ROWS, 4, **STATIC)
        stored = [layer.keys.clone() for layer in first.past_key_values.layers]
        generate_batch(model, other, 4, **STATIC)
        again = generate_batch(model, ROWS, 4, **STATIC)
        assert torch.equal(logits(first), logits(again))
        for layer, keys in zip(first.past_key_values.layers, stored, strict=True):
            assert torch.equal(layer.keys, keys)
        # A cache that nobody was given serves the next generation.
        for steps, rows in ((4, other), (3, ROWS), (4, other)):
            plain = generate_batch(model, rows, steps, return_dict_in_generate=False, output_logits=False)
            spare = list(handle._static._spare)
            options = {"return_dict_in_generate": False, "output_logits": False, **STATIC}
            assert torch.equal(generate_batch(model, rows, steps, **options), plain)
            assert not spare or handle._static._spare[0] is spare[0]


def test_reset_makes_a_cache_new_in_the_same_place(model: Any) -> None:
    cache = CSPStaticCache(model.config, CONFIG, max_new_tokens=4)
    with apply(model, method="snapkv", budget=20):
        with torch.inference_mode():
            generate_batch(model, ROWS, 4, past_key_values=cache, disable_compile=True)
        cache.reset()
        output = generate_batch(model, ROWS, 4, past_key_values=cache, disable_compile=True)
        assert_batch_equals_rows(model, output, ROWS, CONFIG, BUDGET)
        place = cache.layers[0].keys
        fork = copy.deepcopy(cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        with torch.inference_mode():
            generate_batch(model, ROWS, 4, past_key_values=cache, disable_compile=True)
        cache.reset()
        output = generate_batch(model, ROWS, 4, past_key_values=cache, disable_compile=True)
        assert_batch_equals_rows(model, output, ROWS, CONFIG, BUDGET)
        assert cache.layers[0].keys is place
        # A fork goes on by itself.
        step = {"input_ids": torch.full((4, 1), 77)}
        assert torch.equal(
            model(**step, past_key_values=fork).logits, model(**step, past_key_values=cache).logits
        )


def test_batch_operations(model: Any) -> None:
    with apply(model, CONFIG, attention="csp"):
        caches = [
            generate_batch(model, ONE_IMAGE_ROWS, 2, disable_compile=True, **options).past_key_values
            for options in ({}, {"past_key_values": CSPStaticCache(model.config, max_new_tokens=4)})
        ]
        found = []
        for cache in caches:
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([3, 0]))
            found.append(model(input_ids=torch.full((2, 1), 77), past_key_values=cache).logits)
    assert_logits_close(found[1], found[0], torch.float64)


@ATTENTIONS
def test_a_prompt_that_cannot_be_judged_stays_whole(model: Any, attention: str | None) -> None:
    ids, pixels = torch.tensor([ROWS[0]]), make_pixels(ROWS[:1], torch.float64)
    merged = model.get_input_embeddings()(ids)
    merged[ids == 3] = torch.cat(list(model.get_image_features(pixel_values=pixels).pooler_output))
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options |= {"max_new_tokens": 4, "inputs_embeds": merged, **STATIC}
    with apply(model, CONFIG, attention=attention) as handle:
        with pytest.warns(UserWarning, match="left unpruned"):
            output = model.generate(**options)
        assert_batch_equals_rows(model, output, ROWS[:1], None, BUDGET)
        assert output.past_key_values.free() == 1
        with handle.prompt(modality=(ids == 3).long()):
            output = model.generate(**options)
        assert_batch_equals_rows(model, output, ROWS[:1], CONFIG, BUDGET)


# --- capacity ------------------------------------------------------------------------------


def test_running_out_of_capacity_changes_nothing(model: Any) -> None:
    cache = CSPStaticCache(model.config, max_new_tokens=3)
    step = {"input_ids": torch.full((4, 1), 77), "past_key_values": cache}
    with apply(model, CONFIG):
        with pytest.raises(ValueError, match="room for 3 more tokens, 4 are needed"):
            generate_batch(model, ROWS, 5, past_key_values=cache, disable_compile=True)
        generate_batch(model, ROWS, 3, past_key_values=cache, disable_compile=True)
        assert cache.free() == 1
        before = [layer.keys.clone() for layer in cache.layers]
        with pytest.raises(ValueError, match="room for 1 more tokens, got 2"):
            model(input_ids=torch.full((4, 2), 77), past_key_values=cache)
        ids = torch.ones(4, int(cache.get_seq_length()) + 1, dtype=torch.long)
        with pytest.raises(ValueError, match="room for 1 more tokens, 2 are needed"):
            model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=2)
        assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
        model(**step)
        with pytest.raises(ValueError, match="room for 0"):
            model(**step)
        drafts = CSPStaticCache(model.config, max_new_tokens=2)
        with (
            apply(model).prompt(length=len(ROWS[3])),
            pytest.raises(ValueError, match="room for 2 new tokens, got 3"),
        ):
            model(input_ids=torch.tensor([ROWS[3] + [9, 9, 9]]), past_key_values=drafts)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_the_room_is_what_generate_was_asked_for(model: Any) -> None:
    length = max(map(len, ROWS))
    config = transformers.GenerationConfig(max_new_tokens=7, cache_implementation="static", do_sample=False)
    inputs = pad_batch(ROWS) | {"pixel_values": make_pixels(ROWS, torch.float64)}
    with apply(model, CONFIG):
        cases: list[dict[str, Any]] = [
            {"max_new_tokens": 5, "cache_implementation": "static"},
            {"max_length": length + 25, "cache_implementation": "static"},
            {"cache_implementation": "static"},
            {"generation_config": config},
        ]
        for options, room in zip(cases, (5, 25, 20, 7), strict=True):
            output = model.generate(
                **inputs, **options, disable_compile=True, do_sample=False, return_dict_in_generate=True
            )
            assert output.past_key_values.max_new_tokens == room
            assert output.past_key_values.free() == 1
        output = model.generate(inputs.pop("input_ids"), config, **inputs, return_dict_in_generate=True)
        assert output.past_key_values.max_new_tokens == 7
    assert config.cache_implementation == "static"


def test_drafts_and_crop(model: Any) -> None:
    row, drafts = ROWS[0], make_row("4", 12)
    pixels = make_pixels([row], torch.float64)
    for attention in (None, "csp"):
        cache = CSPStaticCache(model.config, max_new_tokens=6)
        with apply(model, CONFIG, attention=attention) as handle, handle.prompt(length=len(row)):
            ids = torch.tensor([row + drafts])
            output = model(input_ids=ids, pixel_values=pixels, past_key_values=cache)
            cache.crop(-2)
            assert int(cache.get_seq_length()) == len(row) + 2
            after = model(input_ids=torch.tensor([[99, 98]]), past_key_values=cache).logits[0]
            assert cache.free() == 2
            with pytest.raises(ValueError, match="after the pruned prompt"):
                cache.crop(-5)
        reference = RowReference(model, CONFIG, BUDGET)
        expected = [reference.feed(row, pixels, prune=True), reference.feed(drafts[:2])]
        assert_logits_close(output.logits[0, : len(row) + 2], torch.cat(expected), torch.float64)
        assert_logits_close(after, reference.feed([99, 98]), torch.float64)


# --- refusals ------------------------------------------------------------------------------


def test_refusals(model: Any) -> None:
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        CSPStaticCache(model.config, max_new_tokens=0)
    with pytest.raises(TypeError, match="max_new_tokens must be an int, got float"):
        CSPStaticCache(model.config, max_new_tokens=2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="method must be a name, a Method or a CSPConfig, got int"):
        CSPStaticCache(model.config, 3, max_new_tokens=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="attention must be 'csp' or None, got 'flash'"):
        apply(model, CONFIG, attention="flash")
    with apply(model, CONFIG, delay=2), pytest.raises(ValueError, match="set delay=0"):
        generate_batch(model, ROWS, 4, **STATIC)
    with pytest.raises(RuntimeError, match=r"csp_ext\.apply"):
        generate_batch(
            model,
            ROWS,
            4,
            past_key_values=CSPStaticCache(model.config, max_new_tokens=4),
            disable_compile=True,
        )


@pytest.mark.parametrize(
    ("attention", "decode_n", "refused"), [(None, 1.0, False), (None, 2.5, True), ("csp", 1.0, True)]
)
def test_the_stock_model_goes_on_where_its_masks_suffice(
    model: Any, attention: str | None, decode_n: float, refused: bool
) -> None:
    rows, config = ROWS[:2], CONFIG.replace(decode_n=decode_n)
    mask = pad_batch([[*row, 9, 9, 9] for row in rows])["attention_mask"]
    step = {
        "input_ids": torch.tensor([[77], [78]]),
        "attention_mask": mask,
        "position_ids": mask.sum(-1, keepdim=True) - 1,
    }
    with apply(model, config):
        grown = generate_batch(model, rows, 3).past_key_values
        expected = model(**step, past_key_values=grown).logits
    cache = CSPStaticCache(model.config, max_new_tokens=4)
    with apply(model, config, attention=attention):
        generate_batch(model, rows, 3, past_key_values=cache, disable_compile=True)
    if refused:
        with pytest.raises(RuntimeError, match="pruned by csp_ext"):
            model(**step, past_key_values=cache)
    else:
        assert_logits_close(model(**step, past_key_values=cache).logits, expected, torch.float64)
