"""Caches that live longer than one greedy generation: turns, chunks, drafts, forwards, foreign caches."""

# ruff: noqa: E402  (these imports need the optional transformers)
from __future__ import annotations

import copy
import warnings
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
from torch import Tensor

transformers = pytest.importorskip("transformers")

from csp_ext.config import CSPConfig
from csp_ext.integration import apply
from csp_ext.integration.cache import PrunedLayer, adopt_cache
from csp_ext.integration.front import Front

ROWS = [make_row("5i3i12", 1), make_row("2i20", 2)]
BUDGET = 14
CONFIG = CSPConfig(budget=BUDGET, decode_n=1.0)
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module")
def model() -> Any:
    return small_llava(dtype=torch.float64, logit_gain=1.0)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def images() -> list[Tensor | None]:
    return split_pixels(ROWS, make_pixels(ROWS, torch.float64))


def next_turn(first: Any, words: int) -> tuple[dict[str, Tensor], Tensor]:
    """The whole conversation so far and `words` new ones per row."""
    generator = torch.Generator().manual_seed(11)
    new = torch.randint(4, 384, (len(ROWS), words), generator=generator)
    ids = torch.cat([first.sequences, new], dim=1)
    mask = pad_batch(ROWS)["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(len(ROWS), ids.shape[1] - mask.shape[1])], dim=1)
    return {"input_ids": ids, "attention_mask": mask}, new


def assert_second_turn(model: Any, first: Any, second: Any, new: Tensor, config: CSPConfig = CONFIG) -> None:
    """The second turn follows the reference, in which the first turn's dropped keys stay masked."""
    steps = len(second.logits)
    logits = torch.stack(second.logits, dim=1)
    for index, pixels in enumerate(images()):
        row = RowReference(model, config, BUDGET)
        row.feed(ROWS[index], pixels, prune=True)
        answer = first.sequences[index, -len(first.logits) :].tolist()
        expected = [row.feed(answer + new[index].tolist())[-1]]
        for token in second.sequences[index, -steps:-1].tolist():
            expected.append(row.feed([token])[-1])
        assert_logits_close(logits[index], torch.stack(expected), torch.float64)


@pytest.mark.parametrize("decode_n", [0.0, 1.0, 2.5])
def test_a_second_turn_over_a_pruned_cache(model: Any, decode_n: float) -> None:
    config = CONFIG.replace(decode_n=decode_n)
    with apply(model, config):
        first = generate_batch(model, ROWS, 4)
        cache = first.past_key_values
        turn, new = next_turn(first, 6)
        second = model.generate(**turn, past_key_values=cache, max_new_tokens=4, **GREEDY)
    assert_second_turn(model, first, second, new, config)
    # Pruned once: the second turn is appended whole.
    sink = int(decode_n > 0)
    assert cache.layers[0].keys.shape[-2] == BUDGET + sink + 4 + 6 + 3
    assert cache.get_seq_length() == turn["input_ids"].shape[1] + 3


def test_a_conversation_can_fork(model: Any) -> None:
    with apply(model, CONFIG):
        first = generate_batch(model, ROWS, 4)
        turn, new = next_turn(first, 6)
        fork = copy.deepcopy(first.past_key_values)
        for cache in (fork, first.past_key_values):
            second = model.generate(**turn, past_key_values=cache, max_new_tokens=4, **GREEDY)
            assert_second_turn(model, first, second, new)


@pytest.mark.parametrize("static", [False, True])
def test_the_layers_share_the_mask_of_a_forward(
    model: Any, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made once, also where the next forward is given the very same mask with other contents."""
    rows = [*ROWS, make_row("9", 3)]  # shorter than the budget
    config = CSPConfig(budget=14)
    options = {"cache_implementation": "static", "disable_compile": True} if static else {}
    made: list[int] = []
    make = Front._mask

    def counted(front: Front, *args: Any) -> Any:
        made.append(1)
        return make(front, *args)

    monkeypatch.setattr(Front, "_mask", counted)
    with apply(model, config):
        output = generate_batch(model, rows, 6, **options)
        assert len(made) == 5
        assert_batch_equals_rows(model, output, rows, config, 14)
        cache = copy.deepcopy(output.past_key_values)
        if static:
            return
        stored = cache.layers[0].keys.shape[2] + 1
        mask = torch.zeros(len(rows), 1, 1, stored, dtype=torch.float64)
        token = output.sequences[:, -1:]
        seen = model(input_ids=token, past_key_values=copy.deepcopy(cache), attention_mask=mask).logits
        mask[..., -3] = torch.finfo(mask.dtype).min
        hidden = model(input_ids=token, past_key_values=copy.deepcopy(cache), attention_mask=mask).logits
        again = model(input_ids=token, past_key_values=cache, attention_mask=mask.clone()).logits
    assert torch.equal(hidden, again)
    assert (hidden - seen).abs().max() > 1e-3


def test_the_stock_model_goes_on_where_its_masks_suffice(model: Any) -> None:
    with apply(model, CONFIG):
        first = generate_batch(model, ROWS, 4)
    turn, new = next_turn(first, 6)
    second = model.generate(**turn, past_key_values=first.past_key_values, max_new_tokens=4, **GREEDY)
    assert_second_turn(model, first, second, new)


def test_the_stock_model_refuses_where_they_do_not(model: Any) -> None:
    with apply(model, CONFIG, decode_n=2.5):
        first = generate_batch(model, ROWS, 4)
    turn, _ = next_turn(first, 6)
    with pytest.raises(RuntimeError, match="pruned by csp_ext"):
        model.generate(**turn, past_key_values=first.past_key_values, max_new_tokens=4)


def test_an_unpruned_turn_may_be_pruned_with_the_next(model: Any) -> None:
    """A short system prompt is kept whole; the prompt that goes over the budget is pruned, from its start."""
    # The queries of the earlier turn are gone, so its tokens cannot be asked in a hop.
    config = CONFIG.replace(hop=0)
    prefix, row = make_row("9", 5), make_row("9i2i14", 5)
    assert row[:9] == prefix
    with apply(model, config):
        start = model(input_ids=torch.tensor([prefix]))
        assert start.past_key_values.layers[0].slots == 0
        output = model.generate(
            input_ids=torch.tensor([row]),
            pixel_values=make_pixels([row], torch.float64),
            past_key_values=start.past_key_values,
            max_new_tokens=5,
            **GREEDY,
        )
    assert output.past_key_values.layers[0].keys.shape[-2] == BUDGET + 1 + 4
    assert_batch_equals_rows(model, output, [row], config, BUDGET)


def test_a_cache_begun_without_csp(model: Any) -> None:
    # The queries of the earlier turn are gone, so its tokens cannot be asked in a hop.
    config = CONFIG.replace(hop=0)
    prefix, row = make_row("9", 5), make_row("9i2i14", 5)
    cache = model(input_ids=torch.tensor([prefix])).past_key_values
    with apply(model, config):
        output = model.generate(
            input_ids=torch.tensor([row]),
            pixel_values=make_pixels([row], torch.float64),
            past_key_values=cache,
            max_new_tokens=5,
            **GREEDY,
        )
    assert_batch_equals_rows(model, output, [row], config, BUDGET)


def test_only_the_new_words_of_a_turn(model: Any) -> None:
    """An unpruned cache and ids that do not cover it: the images of the earlier turn cannot be seen."""
    row = make_row("i4", 5)
    with apply(model, CONFIG, budget=30) as handle:
        cache = model(
            input_ids=torch.tensor([row]), pixel_values=make_pixels([row], torch.float64)
        ).past_key_values
        new = torch.tensor([make_row("12", 6)])
        mask = torch.ones(1, len(row) + 12, dtype=torch.long)
        turn = {"input_ids": new, "attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
        with pytest.warns(UserWarning, match="positions are images"):
            model.generate(**turn, past_key_values=copy.deepcopy(cache))
        modality = torch.tensor([[1] * 16 + [0] * 16])
        with handle.prompt(modality=modality):
            model.generate(**turn, past_key_values=cache)
        assert cache.layers[0].slots == 31


@pytest.mark.parametrize("chunk", [1, 7, 16, 51])
def test_chunked_prefill(model: Any, chunk: int) -> None:
    stock = generate_batch(model, ROWS, 1, prefill_chunk_size=chunk).logits[0]
    if not torch.allclose(stock, generate_batch(model, ROWS, 1).logits[0], atol=1e-4):
        pytest.skip(f"transformers {transformers.__version__} itself mixes up images in a chunked prefill")
    with apply(model, CONFIG):
        output = generate_batch(model, ROWS, 4, prefill_chunk_size=chunk)
    assert output.past_key_values.layers[0].keys.shape[-2] == BUDGET + 1 + 3
    assert_batch_equals_rows(model, output, ROWS, CONFIG, BUDGET)


def test_chunks_by_hand(model: Any) -> None:
    row = ROWS[0]
    modality = (torch.tensor([row]) == 3).long()
    pixels = make_pixels([row], torch.float64)
    with apply(model, CONFIG) as handle, handle.prompt(length=len(row), modality=modality):
        cache = model(input_ids=torch.tensor([row[:24]]), pixel_values=pixels[:1]).past_key_values
        assert cache.layers[0].slots == 0
        model(input_ids=torch.tensor([row[24:]]), pixel_values=pixels[1:], past_key_values=cache)
        assert cache.layers[0].slots == BUDGET + 1
        assert cache.get_seq_length() == len(row)
        after = model(input_ids=torch.tensor([[99]]), past_key_values=cache).logits[0]
    reference = RowReference(model, CONFIG, BUDGET)
    reference.feed(row, pixels, prune=True)
    assert_logits_close(after, reference.feed([99]), torch.float64)


def test_guidance_runs_a_prompt_of_its_own(model: Any) -> None:
    """The negative prompt has a cache of its own, longer than the prompt here, and is pruned as itself."""
    negative = torch.tensor([make_row("70", 13)])
    seen: list[Any] = []
    with apply(model, CONFIG):
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["past_key_values"]), with_kwargs=True
        )
        output = generate_batch(model, ROWS[:1], 4, guidance_scale=1.5, negative_prompt_ids=negative)
        hook.remove()
    assert_batch_equals_rows(model, output, ROWS[:1], CONFIG, BUDGET)
    caches = {id(cache): cache for cache in seen}
    assert len(caches) == 2
    assert all(cache.layers[0].slots == BUDGET + 1 for cache in caches.values())
    assert max(cache.get_seq_length() for cache in caches.values()) > 70


def test_prompt_lookup(model: Any) -> None:
    row = make_row("5i3", 1) + make_row("4", 9) * 6
    with apply(model, CONFIG):
        output = generate_batch(model, [row], 8, prompt_lookup_num_tokens=3, eos_token_id=2)
    assert_batch_equals_rows(model, output, [row], CONFIG, BUDGET)
    assert output.past_key_values.layers[0].slots == BUDGET + 1


@pytest.mark.parametrize("pruned_assistant", [False, True])
def test_assisted_decoding(model: Any, pruned_assistant: bool) -> None:
    """Drafts come in the first forward too, and see the pruned prompt; the drafting model is not pruned."""
    assistant = small_llava(dtype=torch.float64, logit_gain=1.0)
    options = {"assistant_model": assistant, "eos_token_id": 2}
    with apply(model, CONFIG):
        if pruned_assistant:
            apply(assistant, CONFIG)
            with pytest.warns(UserWarning, match="drafts for another"):
                output = generate_batch(model, ROWS[:1], 9, **options)
        else:
            output = generate_batch(model, ROWS[:1], 9, **options)
    assert_batch_equals_rows(model, output, ROWS[:1], CONFIG, BUDGET)
    assert output.past_key_values.layers[0].slots == BUDGET + 1


def test_drafts_in_the_first_forward(model: Any) -> None:
    row, drafts = ROWS[0], make_row("4", 12)
    with apply(model, CONFIG) as handle, handle.prompt(length=len(row)):
        output = model(input_ids=torch.tensor([row + drafts]), pixel_values=make_pixels([row], torch.float64))
        cache = output.past_key_values
        assert cache.get_seq_length() == len(row) + 4
        cache.crop(-2)
        assert cache.get_seq_length() == len(row) + 2
        after = model(input_ids=torch.tensor([[99]]), past_key_values=cache).logits[0]
        with pytest.raises(ValueError, match="after the pruned prompt"):
            cache.crop(-4)
    reference = RowReference(model, CONFIG, BUDGET)
    expected = [reference.feed(row, images()[0], prune=True), reference.feed(drafts[:2])]
    assert_logits_close(output.logits[0, : len(row) + 2], torch.cat(expected), torch.float64)
    assert_logits_close(after, reference.feed([99]), torch.float64)


@pytest.mark.parametrize("decode_n", [0.0, 1.0])
@pytest.mark.parametrize(
    "gaps",
    [
        [[(52, 8)], [(38, 22)]],  # right
        [[(52, 8)], [(0, 4), (25, 9), (38, 9)]],  # left, middle and right
    ],
)
def test_padding_anywhere_in_a_plain_forward(model: Any, decode_n: float, gaps: Any) -> None:
    config = CONFIG.replace(decode_n=decode_n)
    rows = [ROWS[0], ROWS[1]]
    batch = pad_batch(rows, gaps)
    mask = batch["attention_mask"]
    tokens, logits = [100, 101, 102], []
    with apply(model, config) as handle:
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        cache = model(
            **batch, position_ids=positions, pixel_values=make_pixels(rows, torch.float64)
        ).past_key_values
        assert handle.stats.layers[0].lengths.unique().tolist() == [BUDGET]
        for token in tokens:
            mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            output = model(
                input_ids=torch.full((2, 1), token),
                attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
                past_key_values=cache,
            )
            logits.append(output.logits[:, -1])
    for index, pixels in enumerate(images()):
        row = RowReference(model, config, BUDGET)
        row.feed(rows[index], pixels, prune=True)
        expected = torch.stack([row.feed([token])[-1] for token in tokens])
        assert_logits_close(torch.stack(logits, dim=1)[index], expected, torch.float64)


def test_a_plain_forward_counts_positions_from_the_true_length(model: Any) -> None:
    with apply(model, CONFIG):
        cache = model(input_ids=torch.tensor([ROWS[0]]), pixel_values=images()[0]).past_key_values
        logits = [
            model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits[0, -1]
            for token in (40, 41)
        ]
    row = RowReference(model, CONFIG, BUDGET)
    row.feed(ROWS[0], images()[0], prune=True)
    expected = torch.stack([row.feed([token])[-1] for token in (40, 41)])
    assert_logits_close(torch.stack(logits), expected, torch.float64)


def test_a_user_made_cache(model: Any) -> None:
    for cache in (transformers.DynamicCache(), transformers.DynamicCache(config=model.config)):
        with apply(model, CONFIG):
            output = generate_batch(model, ROWS, 4, past_key_values=cache)
        assert output.past_key_values is cache
        assert cache.layers[0].slots == BUDGET + 1
        assert_batch_equals_rows(model, output, ROWS, CONFIG, BUDGET)


def test_reset_makes_a_cache_new(model: Any) -> None:
    with apply(model, CONFIG):
        cache = generate_batch(model, ROWS, 4).past_key_values
        cache.reset()
        assert cache.get_seq_length() == 0
        output = generate_batch(model, ROWS, 4, past_key_values=cache)
    assert_batch_equals_rows(model, output, ROWS, CONFIG, BUDGET)


def test_a_stock_static_cache_is_left_unpruned_with_one_warning(model: Any) -> None:
    whole = generate_batch(model, ROWS, 4)
    with apply(model, CONFIG) as handle:
        generate_batch(model, ROWS, 2)
        for turn in range(2):
            cache = transformers.StaticCache(config=model.config, max_cache_len=80)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                output = generate_batch(model, ROWS, 4, past_key_values=cache)
            assert sum("left unpruned" in str(one.message) for one in caught) == (1 if turn == 0 else 0)
            assert_logits_close(torch.stack(output.logits), torch.stack(whole.logits), torch.float64)
            assert handle.stats.layers == []


def test_other_caches_are_recognised(model: Any) -> None:
    """An offloaded cache needs an accelerator to run; here it is only asked whether it may be pruned."""
    text = model.config.text_config
    offloaded = transformers.DynamicCache(config=text)
    offloaded.offloading = True
    assert "offloaded" in adopt_cache(offloaded, text)
    assert not any(isinstance(layer, PrunedLayer) for layer in offloaded.layers)
    assert "decoder-only" in adopt_cache("cache", text)
    both = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    assert "decoder-only" in adopt_cache(both, text)
    other_model = transformers.LlamaConfig(num_hidden_layers=5)
    assert "5 layers" in adopt_cache(transformers.DynamicCache(config=other_model), text)


def test_a_cache_without_the_model_s_sliding_layers_is_refused() -> None:
    kinds = ["sliding_attention", "full_attention"]
    text = transformers.Gemma3TextConfig(num_hidden_layers=2, layer_types=kinds, sliding_window=8)
    started = transformers.DynamicCache()
    for index in range(2):
        started.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), index)
    assert "layer 0 is not of the model's type" in adopt_cache(started, text)
    empty = transformers.DynamicCache()
    assert adopt_cache(empty, text) == ""
    assert [isinstance(layer, PrunedLayer) for layer in empty.layers] == [False, True]


def test_embeddings(model: Any) -> None:
    """Embeddings whose placeholders the model fills are recognised; merged ones need their modality."""
    row, pixels = ROWS[0], images()[0]
    ids = torch.tensor([row])
    table = model.get_input_embeddings()
    expected_ids = {"max_new_tokens": 4, **GREEDY}
    with apply(model, CONFIG) as handle:
        output = model.generate(inputs_embeds=table(ids), pixel_values=pixels, **expected_ids)
        assert_batch_equals_rows(model, output, [row], CONFIG, BUDGET)
        features = torch.cat(
            list(model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)
        )
        merged = table(ids).detach()
        merged[ids == 3] = features
        with pytest.warns(UserWarning, match="handle.prompt"):
            whole = model.generate(inputs_embeds=merged, **expected_ids)
        assert_batch_equals_rows(model, whole, [row], None, BUDGET)
        with handle.prompt(modality=(ids == 3).long()):
            output = model.generate(inputs_embeds=merged, **expected_ids)
            assert_batch_equals_rows(model, output, [row], CONFIG, BUDGET)
            beams = model.generate(inputs_embeds=merged, num_beams=2, **expected_ids)
            assert beams.past_key_values.layers[0].slots == BUDGET + 1


def test_a_wrong_modality_is_refused(model: Any) -> None:
    ids = torch.tensor([ROWS[0]])
    with apply(model, CONFIG) as handle:
        with (
            handle.prompt(modality=torch.zeros(1, 7, dtype=torch.long)),
            pytest.raises(ValueError, match="modality"),
        ):
            model.generate(input_ids=ids, pixel_values=images()[0], max_new_tokens=2)
        with pytest.raises(ValueError, match="integers"), handle.prompt(modality=torch.zeros(1, 7)):
            pass
        with pytest.raises(ValueError, match="length is 9"), handle.prompt(modality=ids, length=9):
            pass
        output = generate_batch(model, ROWS, 3)
    assert_batch_equals_rows(model, output, ROWS, CONFIG, BUDGET)


def test_batch_operations_of_a_pruned_cache(model: Any) -> None:
    config = CONFIG.replace(decode_n=2.5)
    with apply(model, config):
        cache = generate_batch(model, ROWS, 1).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        mask = pad_batch(ROWS)["attention_mask"][[1, 0]]
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        logits = model(
            input_ids=torch.full((2, 1), 77),
            attention_mask=mask,
            position_ids=mask.sum(-1, keepdim=True) - 1,
            past_key_values=cache,
        ).logits[:, -1]
    for index in range(2):
        row = RowReference(model, config, BUDGET)
        row.feed(ROWS[1 - index], images()[1 - index], prune=True)
        assert_logits_close(logits[index], row.feed([77])[-1], torch.float64)
