"""Long generations over pruned caches: growing, fixed and compiled ones do the same."""

# ruff: noqa: E402  (these imports need the optional transformers)
from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from llava_reference import (
    RowResult,
    assert_logits_close,
    generate_batch,
    generate_row,
    make_pixels,
    make_row,
    pad_batch,
    small_llava,
    split_pixels,
)

transformers = pytest.importorskip("transformers")

from torch._dynamo.utils import counters

from csp_ext.config import CSPConfig
from csp_ext.integration import CSPStaticCache, apply

# Left padding; the third row is shorter than the budget, the fourth has no image.
ROWS = [make_row("5i3i12", 1), make_row("2i20", 2), make_row("9", 3), make_row("33", 4)]
LONGER = [make_row("3i9i2i30", 6), make_row("2i20", 2), make_row("9", 3), make_row("i41", 5)]
ONE_IMAGE_ROWS = [make_row("5i15", 1), make_row("2i20", 2), make_row("9", 3)]
BUDGET = 14
STEPS = 208
STATIC = {"cache_implementation": "static", "disable_compile": True}
ATTENTIONS = pytest.mark.parametrize("attention", [None, "csp"])
MODELS = {
    "gqa in float64": {"dtype": torch.float64, "num_heads": 4, "num_kv_heads": 1, "logit_gain": 1.0},
    "mha in float32": {"seed": 1, "num_heads": 4, "num_kv_heads": 4},
}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, device: str) -> Any:
    return small_llava(**MODELS[request.param]).to(device)


@pytest.fixture(scope="module")
def gqa() -> Any:
    return small_llava(**MODELS["gqa in float64"])


def logits(output: Any) -> torch.Tensor:
    return torch.stack(output.logits, dim=1)


def config(decode_n: float = 1.0) -> CSPConfig:
    return CSPConfig(budget=BUDGET, decode_n=decode_n)


def compiled(backend: str) -> dict[str, Any]:
    options = transformers.CompileConfig(fullgraph=True, backend=backend, mode="default")
    options._compile_all_devices = True  # transformers compiles on accelerators only, unless told otherwise
    return {"cache_implementation": "static", "compile_config": options}


# --- growing, fixed and masked -------------------------------------------------------------


@pytest.fixture(scope="module", params=[0.0, 1.0])
def masked(request: pytest.FixtureRequest, model: Any) -> tuple[CSPConfig, list[RowResult]]:
    """Every row alone, greedily, over a full cache whose dropped keys are masked."""
    chosen = config(request.param)
    images = split_pixels(ROWS, make_pixels(ROWS, model.dtype))
    rows = zip(ROWS, images, strict=True)
    return chosen, [generate_row(model, row, pixels, chosen, BUDGET, STEPS) for row, pixels in rows]


@ATTENTIONS
@pytest.mark.parametrize("options", [{}, STATIC], ids=["growing", "fixed"])
def test_equals_the_masked_full_cache(
    model: Any, masked: tuple[CSPConfig, list[RowResult]], attention: str | None, options: dict[str, Any]
) -> None:
    chosen, rows = masked
    with apply(model, chosen, attention=attention):
        output = generate_batch(model, ROWS, STEPS, **options)
    found = logits(output)
    for index, row in enumerate(rows):
        assert output.sequences[index, -STEPS:].tolist() == row.tokens
        assert_logits_close(found[index], row.logits, model.dtype)


@ATTENTIONS
def test_a_padded_batch_equals_its_rows_alone(gqa: Any, attention: str | None) -> None:
    pixels = split_pixels(ROWS, make_pixels(ROWS, gqa.dtype))
    with apply(gqa, config(), attention=attention):
        batch = logits(generate_batch(gqa, ROWS, 24, **STATIC))
        for index, row in enumerate(ROWS):
            images = {} if pixels[index] is None else {"pixel_values": pixels[index]}
            alone = gqa.generate(
                **pad_batch([row]),
                **images,
                **STATIC,
                max_new_tokens=24,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            assert_logits_close(batch[index], logits(alone)[0], torch.float64)


# --- compiled ------------------------------------------------------------------------------


def assert_compiled_equals_eager(model: Any, backend: str) -> None:
    """Two long generations from prompts of two lengths: one graph, whole, and the logits of eager steps."""
    torch._dynamo.reset()
    counters.clear()
    for rows in (ROWS, LONGER):
        eager = generate_batch(model, rows, STEPS, **STATIC)
        with torch._dynamo.config.patch(error_on_recompile=True):
            output = generate_batch(model, rows, STEPS, **compiled(backend))
        assert torch.equal(output.sequences, eager.sequences)
        assert_logits_close(logits(output), logits(eager), model.dtype)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(("attention", "decode_n"), [(None, 0.0), ("csp", 1.0)])
def test_one_graph_for_two_long_generations(model: Any, attention: str | None, decode_n: float) -> None:
    with apply(model, config(decode_n), attention=attention):
        assert_compiled_equals_eager(model, "eager")


def test_another_room_compiles_once_more(gqa: Any) -> None:
    torch._dynamo.reset()
    counters.clear()
    with apply(gqa, config(), attention="csp"):
        for steps in (8, 6, 7, 12):
            eager = generate_batch(gqa, ROWS, steps, **STATIC)
            output = generate_batch(gqa, ROWS, steps, **compiled("eager"))
            assert_logits_close(logits(output), logits(eager), torch.float64)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a compiler")
def test_inductor() -> None:
    model = small_llava(num_layers=1, **MODELS["mha in float32"])
    with apply(model, config()):
        assert_compiled_equals_eager(model, "inductor")


# --- generation of other kinds, and several of them ----------------------------------------


@ATTENTIONS
@pytest.mark.parametrize("graph", [False, True])
def test_long_beams(gqa: Any, attention: str | None, graph: bool) -> None:
    beams = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True}
    torch._dynamo.reset()
    with apply(gqa, config()):
        grown = generate_batch(gqa, ONE_IMAGE_ROWS, 40, **beams)
    with apply(gqa, config(), attention=attention):
        output = generate_batch(gqa, ONE_IMAGE_ROWS, 40, **beams, **(compiled("eager") if graph else STATIC))
    own = torch.arange(9)[:, None].expand_as(grown.beam_indices)
    assert (grown.beam_indices != own).any()  # beams did move
    assert torch.equal(output.sequences, grown.sequences)
    assert torch.equal(output.beam_indices, grown.beam_indices)
    assert (output.sequences_scores - grown.sequences_scores).abs().max() < 1e-6


@ATTENTIONS
def test_drafts_that_are_taken_back(gqa: Any, attention: str | None) -> None:
    """Another model's drafts are wrong more often than not, so that the cache is cropped all the time."""
    assistant = small_llava(seed=3, dtype=torch.float64, logit_gain=1.0)
    drafts = {"assistant_model": assistant, "eos_token_id": 2}
    with apply(gqa, config()):
        alone = generate_batch(gqa, ROWS[:1], 40, eos_token_id=2)
    with apply(gqa, config(), attention=attention):
        grown = generate_batch(gqa, ROWS[:1], 40, **drafts)
        assert_logits_close(logits(grown), logits(alone), torch.float64)
        try:
            output = generate_batch(gqa, ROWS[:1], 40, **drafts, **STATIC)
        except ValueError as error:
            pytest.skip(f"transformers {transformers.__version__} refuses it: {error}")
    assert torch.equal(output.sequences, alone.sequences)
    assert_logits_close(logits(output), logits(alone), torch.float64)


@ATTENTIONS
def test_two_compiled_generations_share_nothing(gqa: Any, attention: str | None) -> None:
    """One after another, and step by step in turn through the same graph."""
    torch._dynamo.reset()
    prompts = (ROWS[:1], LONGER[:1], ROWS[1:2])
    with apply(gqa, config(), attention=attention):
        again = [generate_batch(gqa, rows, 12, **compiled("eager")) for rows in (ROWS, LONGER, ROWS)]
        assert torch.equal(logits(again[0]), logits(again[2]))
        whole = [generate_batch(gqa, rows, 12) for rows in prompts]
        caches = [CSPStaticCache(gqa.config, max_new_tokens=12) for _ in prompts]
        for rows, cache in zip(prompts, caches, strict=True):
            generate_batch(gqa, rows, 1, past_key_values=cache, disable_compile=True)
        torch._dynamo.reset()
        counters.clear()
        forward = torch.compile(gqa.__call__, backend="eager", fullgraph=True)
        for step in range(11):
            for expected, cache in zip(whole, caches, strict=True):
                token = torch.full((1, 1), int(expected.sequences[0, step - 12]))
                found = forward(input_ids=token, past_key_values=cache).logits[:, -1]
                assert_logits_close(found, expected.logits[step + 1], torch.float64)
    # The masks are made inside the graph here: with the second prompt its length becomes dynamic.
    assert counters["stats"]["unique_graphs"] == 2


# --- capacity ------------------------------------------------------------------------------


def contents(cache: Any) -> list[torch.Tensor]:
    return [t.clone() for layer in cache.layers for t in (layer.keys, layer.values, layer.end, layer.offset)]


@ATTENTIONS
def test_what_does_not_fit_is_refused_before_anything_is_written(gqa: Any, attention: str | None) -> None:
    cache = CSPStaticCache(gqa.config, max_new_tokens=3)
    inputs = pad_batch(ROWS) | {"pixel_values": make_pixels(ROWS, gqa.dtype)}
    options = {"past_key_values": cache, "disable_compile": True, "do_sample": False}
    length = inputs["input_ids"].shape[1]
    with apply(gqa, config(), attention=attention):
        with pytest.raises(ValueError, match="room for 3 more tokens, 4 are needed"):
            gqa.generate(**inputs, **options, max_length=length + 5)
        assert cache.get_seq_length() == 0
        gqa.generate(**inputs, **options, max_length=length + 3)
        before = contents(cache)
        refused: list[tuple[str, Callable[[], Any]]] = [
            ("room for 1 more tokens, got 2", lambda: gqa(input_ids=torch.full((4, 2), 7), **state)),
            (
                "room for 1 more tokens, got 3",
                lambda: gqa(inputs_embeds=gqa.get_input_embeddings()(torch.full((4, 3), 7)), **state),
            ),
            (
                "room for 1 more tokens, 2 are needed",
                lambda: gqa.generate(input_ids=ids, **options, max_length=ids.shape[1] + 2),
            ),
        ]
        state = {"past_key_values": cache}
        ids = torch.ones(4, int(cache.get_seq_length()) + 1, dtype=torch.long)
        for message, call in refused:
            with pytest.raises(ValueError, match=message):
                call()
            assert all(map(torch.equal, contents(cache), before))
        step = torch.compile(gqa.__call__, backend="eager", fullgraph=True)
        torch._dynamo.reset()
        step(input_ids=torch.full((4, 1), 7), **state)
        before = contents(cache)
        with pytest.raises(IndexError, match="index"):
            step(input_ids=torch.full((4, 1), 7), **state)
        assert all(map(torch.equal, contents(cache), before))
