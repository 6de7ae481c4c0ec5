"""Caches that are pruned again while they grow, against a loop that keeps every key and masks the dropped."""

# ruff: noqa: E402  (these imports need the optional transformers)
from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llava_reference import (
    IMAGE,
    RowReference,
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
from csp_ext.integration import CSPStaticCache, apply
from csp_ext.integration.cache import pruned_layers
from csp_ext.integration.ring import Ring
from csp_ext.integration.static import StaticPrunedLayer

BUDGET, INTERVAL = 14, 5
# Left padding; the third row is shorter than the budget, the fourth has no image.
ROWS = [make_row("5i3i12", 1), make_row("2i20", 2), make_row("9", 3), make_row("33", 4)]
STATIC = {"cache_implementation": "static", "disable_compile": True}
ATTENTIONS = pytest.mark.parametrize("attention", [None, "csp"])
KINDS = pytest.mark.parametrize("options", [{}, STATIC], ids=["dynamic", "static"])


@pytest.fixture(scope="module")
def model() -> Any:
    return small_llava(dtype=torch.float64, logit_gain=1.0)


@functools.cache
def model_with(num_kv_heads: int) -> Any:
    """The same with another grouping of its four heads."""
    return small_llava(dtype=torch.float64, logit_gain=1.0, num_kv_heads=num_kv_heads)


@pytest.fixture(scope="module")
def anywhere(device: str) -> Any:
    return small_llava(dtype=torch.float64, logit_gain=1.0).to(device)


@pytest.fixture(autouse=True, scope="module")
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def config_of(**fields: Any) -> CSPConfig:
    return CSPConfig(**{"budget": BUDGET, "decode_interval": INTERVAL, "hop": 4, **fields})


def logits(output: Any) -> torch.Tensor:
    return torch.stack(output.logits, dim=1)


def stored(cache: Any) -> int:
    """Tokens in the fullest layer."""
    return max(int(layer.written()) for layer in pruned_layers(cache))


class GrowingRow:
    """One row of a batch whose cache is pruned again: its tokens alone, and which slots the batch gives it.

    Parameters
    ----------
    row, pixels
        Its prompt.
    shown : list of bool
        Of every slot of the batch's prompt, whether the row has a token there.
    """

    def __init__(self, model: Any, row: list[int], pixels: Any, config: CSPConfig, shown: list[bool]) -> None:
        self.sizes, self.interval = config.resolve(BUDGET), config.decode_interval
        window = self.sizes.window if isinstance(self.sizes.window, int) else 64
        self.ring = min(window, self.sizes.recent + self.interval)
        self.reference = RowReference(model, config, BUDGET)
        self.shown = shown  # of the slots whose queries may be at hand
        self.waiting = config.delay  # tokens until the prompt is pruned
        self.logits = self.reference.feed(row, pixels, prune=not self.waiting)[-1]
        self._prompt_ends()

    def _prompt_ends(self) -> None:
        self.slots = self.run = len(self.shown)
        if not self.waiting and self.slots >= self.sizes.prune_from:
            self.slots, self.run = self.sizes.budget, self.sizes.recent
            self.shown = [True] * sum(self.shown)

    def feed(self, ids: list[int], shown: list[bool] | None = None) -> torch.Tensor:
        """Append tokens, in so many new slots of the batch; return the logits of the last one."""
        shown = [True] * len(ids) if shown is None else shown
        budget = self.sizes.budget
        if not self.waiting and self.slots > budget and self.slots + len(shown) > budget + self.interval:
            at_hand = min(self.ring, self.run)
            watched = sum(self.shown[-at_hand:]) if at_hand else 0
            self.reference.prune_again(watched)
            self.slots, self.run, self.shown = budget, self.sizes.recent, [True] * watched
        if ids:
            self.logits = self.reference.feed(ids, prune=self.waiting == 1)[-1]
        self.shown = self.shown + shown
        self.slots, self.run = self.slots + len(shown), self.run + len(shown)
        if self.waiting:
            self.waiting -= 1
            self._prompt_ends()
        return self.logits


def follow(
    model: Any, row: list[int], pixels: Any, config: CSPConfig, tokens: list[int], slots: int
) -> torch.Tensor:
    """Return the logits [steps, V] of a row, left-padded to `slots` tokens, that must generate `tokens`."""
    shown = [False] * (slots - len(row)) + [True] * len(row)
    growing = GrowingRow(model, row, pixels, config, shown)
    return torch.stack([growing.logits] + [growing.feed([token]) for token in tokens[:-1]])


def assert_follows(model: Any, output: Any, rows: list[list[int]], config: CSPConfig) -> None:
    longest = max(map(len, rows))
    steps, actual = len(output.logits), logits(output)
    images = split_pixels(rows, make_pixels(rows, model.dtype))
    for index, row in enumerate(rows):
        tokens = output.sequences[index, -steps:].tolist()
        expected = follow(model, row, images[index], config, tokens, longest)
        assert_logits_close(actual[index], expected, model.dtype)


# --- against the twin ----------------------------------------------------------------------


@KINDS
@ATTENTIONS
@pytest.mark.parametrize(
    "fields",
    [
        {"decode_n": 0.0},
        {"decode_n": 1.0},
        {"decode_n": 2.5, "heads": "shared", "decode_interval": 1},
        {"window": "question", "recent": 3, "combine": "union", "cross_ratio": 0.3},
        {"window": 3, "recent": 0, "decode_interval": 9, "combine": "intersection"},
    ],
    ids=["plain", "n1", "shared", "question", "narrow"],
)
def test_equals_a_masked_full_cache(
    anywhere: Any, attention: str | None, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    config = config_of(**fields)
    with apply(anywhere, config, attention=attention) as handle:
        output = generate_batch(anywhere, ROWS, 34, **options)
        cache = output.past_key_values
        assert handle.stats.renewals == 33 // config.decode_interval
    sink = int(config.decode_n > 0 and attention is None)
    assert stored(cache) <= BUDGET + config.decode_interval + sink
    assert_follows(anywhere, output, ROWS, config)


@KINDS
@ATTENTIONS
@pytest.mark.parametrize("decode_n", [0.0, 1.0])
def test_a_prompt_within_its_budget_is_pruned_when_it_has_grown(
    model: Any, attention: str | None, decode_n: float, options: dict[str, Any]
) -> None:
    config = config_of(decode_n=decode_n)
    rows = [make_row("9", 3), make_row("5", 6)]
    with apply(model, config, attention=attention) as handle:
        output = generate_batch(model, rows, 30, **options)
        assert handle.stats.renewals == 4
    assert_follows(model, output, rows, config)


@KINDS
def test_ten_times_the_budget(options: dict[str, Any]) -> None:
    """A long answer stays within T + m, and the layers' storage does not grow."""
    model = small_llava(seed=1, num_layers=3)
    rows, steps = [make_row("5i15", 1), make_row("2i20", 2)], 10 * BUDGET + 3
    config = config_of()
    sizes = set()

    class Watch(transformers.StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            layers = pruned_layers(cache)
            sizes.update(layer.keys.untyped_storage().nbytes() for layer in layers if layer.is_initialized)
            assert all(layer.written() <= BUDGET + INTERVAL for layer in layers)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    cache: Any = transformers.DynamicCache(config=model.config)
    if options:
        cache = CSPStaticCache(model.config, max_new_tokens=steps)
    with apply(model, config):
        output = generate_batch(
            model, rows, steps, past_key_values=cache, stopping_criteria=[Watch()], disable_compile=True
        )
    row_bytes = 2 * 2 * 16 * 4  # rows, KV heads, head_dim, float32
    assert max(sizes) <= (BUDGET + INTERVAL) * row_bytes
    if options:
        assert sizes == {(BUDGET + INTERVAL) * row_bytes}
    assert_follows(model, output, rows, config)


@KINDS
@ATTENTIONS
@pytest.mark.parametrize("decode_n", [0.0, 1.0])
def test_never_is_the_same_as_once(
    model: Any, attention: str | None, decode_n: float, options: dict[str, Any]
) -> None:
    found = []
    for interval in (None, 10**6):
        with apply(model, config_of(decode_n=decode_n, decode_interval=interval), attention=attention):
            found.append(generate_batch(model, ROWS, 20, **options))
    assert torch.equal(logits(found[0]), logits(found[1]))
    layers = [output.past_key_values.layers[0] for output in found]
    assert layers[0].keys.shape == layers[1].keys.shape


LAYOUTS = ["5i3i12", "2i20", "9", "33", "5", "1i1", "7i", "2", "14"]
FIELDS = {
    "decode_interval": st.sampled_from([1, 2, 3, 7, 12, 40]),
    "window": st.sampled_from(["question", "half", 1, 3, 8, 40]),
    "recent": st.sampled_from(["half", 0, 1, 3, 8, 40]),
    "heads": st.sampled_from(["kv", "shared"]),
    "decode_n": st.sampled_from([0.0, 1.0, 2.5]),
    "combine": st.sampled_from(["calibrated", "union", "intersection"]),
    "cross_ratio": st.sampled_from([0.0, 0.3, 1.0]),
    "n": st.sampled_from([0.0, 1.0]),
    "hop": st.sampled_from([0, 4]),
    # Equal scores, which pooling makes many of, may fall either way.
    "pool": st.just("none"),
}


@settings(derandomize=True)
@given(
    fields=st.fixed_dictionaries(FIELDS),
    delay=st.integers(0, 3),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3),
    heads=st.sampled_from([1, 2, 4]),
    attention=st.sampled_from([None, "csp"]),
    static=st.booleans(),
    steps=st.integers(2, 30),
)
def test_any_config(
    fields: dict[str, Any],
    delay: int,
    layouts: list[str],
    heads: int,
    attention: str | None,
    static: bool,
    steps: int,
) -> None:
    config = config_of(delay=0 if static else delay, **fields)
    model = model_with(heads)
    rows = [make_row(layout, seed) for seed, layout in enumerate(layouts)]
    with apply(model, config, attention=attention):
        output = generate_batch(model, rows, steps, **(STATIC if static else {}))
    assert_follows(model, output, rows, config)


@settings(derandomize=True)
@given(
    fields=st.fixed_dictionaries(
        {name: FIELDS[name] for name in ("window", "recent", "heads", "decode_n")}
        | {"decode_interval": st.sampled_from([6, 12])}
    ),
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=2, max_size=2),
    right=st.booleans(),
    turns=st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 6), st.booleans()).filter(any), min_size=6, max_size=20
    ),
    attention=st.sampled_from([None, "csp"]),
    static=st.booleans(),
)
def test_any_padding_of_any_turn(
    fields: dict[str, Any],
    layouts: list[str],
    right: bool,
    turns: list[tuple[int, int, bool]],
    attention: str | None,
    static: bool,
) -> None:
    """Plain forwards of turns of different lengths, padded at either side: rows do not disturb each other."""
    config, model = config_of(**fields), model_with(2)
    rows = [make_row(layout, seed) for seed, layout in enumerate(layouts)]
    pixels = make_pixels(rows, model.dtype)
    images = {} if pixels is None else {"pixel_values": pixels}
    long = max(map(len, rows))
    inputs = pad_batch(rows, [[(len(row) if right else 0, long - len(row))] for row in rows])
    mask = inputs["attention_mask"]
    with apply(model, config, attention=attention):
        cache: Any = CSPStaticCache(model.config, max_new_tokens=200) if static else None
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        output = model(**inputs, **images, position_ids=positions, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        twins = [
            GrowingRow(model, row, own, config, real.tolist())
            for row, own, real in zip(rows, split_pixels(rows, pixels), mask.bool(), strict=True)
        ]
        for seed, (one, two, on_the_right) in enumerate(turns):
            count = max(one, two, 1)
            new = [make_row(str(length), seed) for length in (one, two)]
            padding = [[(len(ids) if on_the_right else 0, count - len(ids))] for ids in new]
            inputs = pad_batch(new, padding)
            mask = torch.cat([mask, inputs["attention_mask"]], dim=1)
            output = model(
                input_ids=inputs["input_ids"],
                past_key_values=cache,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp_min(0)[:, -count:],
            )
            for index, (twin, ids) in enumerate(zip(twins, new, strict=True)):
                real = inputs["attention_mask"][index].bool()
                expected = twin.feed(ids, real.tolist())
                if ids:
                    last = int(real.nonzero()[-1])
                    assert_logits_close(output.logits[index, last], expected, torch.float64)


# --- compiled --------------------------------------------------------------------------------


@ATTENTIONS
@pytest.mark.parametrize("decode_n", [0.0, 1.0])
def test_compiled_steps(model: Any, attention: str | None, decode_n: float) -> None:
    """One graph for a generation that is pruned many times, and for the next one."""
    settings = transformers.CompileConfig(backend="eager", fullgraph=True)
    settings._compile_all_devices = True
    config = config_of(decode_n=decode_n)
    torch.compiler.reset()
    counters.clear()
    rows = ROWS[:2] + ROWS[3:]
    for seed_rows in (rows, [row[:-2] for row in rows]):
        with apply(model, config, attention=attention) as handle:
            plain = generate_batch(model, seed_rows, 40, **STATIC)
            compiled = generate_batch(
                model, seed_rows, 40, cache_implementation="static", compile_config=settings
            )
            assert handle.stats.renewals == 7
        assert_logits_close(logits(compiled), logits(plain), torch.float64)
        assert_follows(model, compiled, seed_rows, config)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_compiled_loop_of_ones_own(model: Any) -> None:
    rows = ROWS[:2]
    inputs = pad_batch(rows) | {"pixel_values": make_pixels(rows, model.dtype)}
    config, steps = config_of(), 20
    with apply(model, config, attention="csp"):
        expected = generate_batch(model, rows, steps, **STATIC)
        cache = CSPStaticCache(model.config, max_new_tokens=steps)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        output = model(**inputs, past_key_values=cache, position_ids=positions)
        position = inputs["attention_mask"].sum(-1, keepdim=True)
        step = torch.compile(model.__call__, backend="eager", fullgraph=True)
        found, pruned = [output.logits[:, -1]], 0
        for _ in range(steps - 1):
            pruned += cache.make_room()
            token = found[-1].argmax(-1, keepdim=True)
            output = step(input_ids=token, past_key_values=cache, position_ids=position)
            found.append(output.logits[:, -1])
            position = position + 1
    assert pruned == 3
    assert_logits_close(torch.stack(found, dim=1), logits(expected), torch.float64)


def test_the_device_is_read_once_per_prune(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And once when ``generate`` begins; in between the tokens are counted."""
    reads: list[int] = []
    written = StaticPrunedLayer.written

    def counted(layer: StaticPrunedLayer) -> int:
        reads.extend([1] * layer.static)  # before that it is a shape
        return written(layer)

    monkeypatch.setattr(StaticPrunedLayer, "written", counted)
    with apply(model, config_of()) as handle:
        generate_batch(model, ROWS[:2], 20, **STATIC)
        assert handle.stats.renewals == 3
    assert len(reads) == 1 + 3


# --- other ways to generate ------------------------------------------------------------------


@KINDS
def test_a_plain_loop(model: Any, options: dict[str, Any]) -> None:
    """Forwards by hand, with a growing mask and with none."""
    config, steps = config_of(), 18
    rows = [ROWS[0]]
    inputs = {"input_ids": torch.tensor(rows), "pixel_values": make_pixels(rows, model.dtype)}
    with apply(model, config) as handle:
        expected = generate_batch(model, rows, steps)
        for masked in (False, True):
            cache = CSPStaticCache(model.config, max_new_tokens=99) if options else None
            output = model(**inputs, past_key_values=cache, use_cache=True)
            cache, found = output.past_key_values, [output.logits[:, -1]]
            for count in range(1, steps):
                mask = torch.ones(1, len(rows[0]) + count, dtype=torch.int64) if masked else None
                token = found[-1].argmax(-1, keepdim=True)
                output = model(input_ids=token, past_key_values=cache, attention_mask=mask)
                found.append(output.logits[:, -1])
            assert handle.stats.renewals == 3
            assert stored(cache) <= BUDGET + INTERVAL
            assert_logits_close(torch.stack(found, dim=1), logits(expected), torch.float64)


@KINDS
@ATTENTIONS
def test_beams(model: Any, attention: str | None, options: dict[str, Any]) -> None:
    """Every beam equals what the loop says of its own tokens, so a reordered row kept its own memory."""
    config = config_of()
    rows = [ROWS[0]]
    with apply(model, config, attention=attention):
        output = generate_batch(
            model, rows, 24, num_beams=3, num_return_sequences=3, output_scores=True, **options
        )
    images = split_pixels(rows, make_pixels(rows, model.dtype))
    likelihood = model.compute_transition_scores(
        output.sequences, output.scores, output.beam_indices, normalize_logits=False
    )
    for index in range(3):
        tokens = output.sequences[index, len(rows[0]) :].tolist()
        expected = follow(model, rows[0], images[0], config, tokens, len(rows[0])).log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(tokens)[:, None])[:, 0].cumsum(0)
        # What a beam's score adds at each step, but for the first one's choice among the copies.
        assert_logits_close(likelihood[index].cumsum(0)[-1], chosen[-1], torch.float32)


def test_drafts_of_prompt_lookup(model: Any) -> None:
    """Rejected drafts leave the ring of queries, and those that they had overwritten observe nothing."""
    config = config_of(window=2, recent=2, decode_interval=12)
    row = [*make_row("5i3i", 1), 7, 8, 9, 10, 7, 8, 9, 10, 7, 8]
    with apply(model, config) as handle:
        output = generate_batch(model, [row], 40, prompt_lookup_num_tokens=4)
        assert handle.stats.renewals > 0
        assert stored(output.past_key_values) <= BUDGET + 12
        with pytest.raises(ValueError, match="decode_interval a static cache has no room for drafted"):
            generate_batch(model, [row], 40, prompt_lookup_num_tokens=4, **STATIC)


@KINDS
def test_a_second_turn_with_an_image(model: Any, options: dict[str, Any]) -> None:
    """What a later turn brings is pruned by its true modality; what its mask hides is dropped first."""
    config = config_of(decode_interval=60)
    first, second = [ROWS[0], ROWS[1]], [make_row("4i8", 8), make_row("3i2", 9)]
    with apply(model, config) as handle:
        cache = CSPStaticCache(model.config, max_new_tokens=200) if options else None
        one = generate_batch(model, first, 3, past_key_values=cache, disable_compile=True)
        cache = one.past_key_values
        whole = pad_batch(first)
        length = max(map(len, second))
        ids, mask = [], []
        for index, row in enumerate(second):
            gap = length - len(row)
            ids.append(one.sequences[index].tolist() + [0] * gap + row)
            answer = [1] * 3
            mask.append(whole["attention_mask"][index].tolist() + answer + [0] * gap + [1] * len(row))
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        inputs["pixel_values"] = make_pixels(second, model.dtype, seed=9)
        output = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=40,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            disable_compile=True,
        )
        assert handle.stats.renewals == 1
    # Each row alone, and each row's loop.
    pictures = split_pixels(first, make_pixels(first, model.dtype))
    later = split_pixels(second, make_pixels(second, model.dtype, seed=9))
    for index in range(2):
        reference = RowReference(model, config, BUDGET)
        reference.feed(first[index], pictures[index], prune=True)
        answer = one.sequences[index, -3:].tolist()
        for token in answer[:2]:
            reference.feed([token])
        expected = [reference.feed([answer[2], *second[index]], later[index])[-1]]
        tokens = output.sequences[index, -40:].tolist()
        added = 2 + 1 + length
        for token in tokens[:-1]:
            if added + 1 > 60:
                reference.prune_again(8)
                added = 0
            expected.append(reference.feed([token])[-1])
            added += 1
        assert_logits_close(logits(output)[index], torch.stack(expected), torch.float64)


def test_a_turn_that_overfills_the_cache(model: Any) -> None:
    """A growing cache takes it, pruned before and after; a static one has no room and says so beforehand."""
    row = ROWS[0]
    turn = make_row("30", 12)
    with apply(model, config_of()) as handle:
        one = generate_batch(model, [row], 4)
        ids = torch.tensor([one.sequences[0].tolist() + turn])
        model.generate(ids, past_key_values=one.past_key_values, max_new_tokens=4, do_sample=False)
        assert handle.stats.renewals == 2
        assert stored(one.past_key_values) == BUDGET + 3
        cache = CSPStaticCache(model.config, max_new_tokens=64)
        one = generate_batch(model, [row], 4, past_key_values=cache, disable_compile=True)
        assert cache.grows
        before = stored(cache), cache.layers[0].keys.clone()
        with pytest.raises(ValueError, match=r"room for .* more tokens, got 31"):
            model.generate(ids, past_key_values=cache, max_new_tokens=4, disable_compile=True)
        assert stored(cache) <= before[0]


@pytest.mark.parametrize("side", ["right", "middle"])
def test_padding_anywhere_in_a_plain_forward(model: Any, side: str) -> None:
    """The ring begins with each row's own last queries."""
    rows = [ROWS[0], ROWS[1]]
    short, long = len(rows[1]), len(rows[0])
    place = short if side == "right" else 4
    gaps = [[(0, 0)], [(place, long - short)]]
    inputs = pad_batch(rows, gaps) | {"pixel_values": make_pixels(rows, model.dtype)}
    config = config_of(decode_interval=2)
    tokens = make_row("9", 11)
    images = split_pixels(rows, make_pixels(rows, model.dtype))
    with apply(model, config) as handle:
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        output = model(**inputs, position_ids=positions, use_cache=True)
        cache, found = output.past_key_values, []
        count = mask.sum(-1, keepdim=True)
        for at, token in enumerate(tokens):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
            output = model(
                input_ids=torch.full((2, 1), token),
                past_key_values=cache,
                attention_mask=mask,
                position_ids=count + at,
            )
            found.append(output.logits[:, -1])
        assert handle.stats.renewals == 4
    for index in range(2):
        expected = follow(model, rows[index], images[index], config, [*tokens, 0], long)[1:]
        assert_logits_close(torch.stack(found, dim=1)[index], expected, torch.float64)


def test_chunks_and_forks(model: Any) -> None:
    config = config_of()
    row = ROWS[0]
    with apply(model, config):
        expected = generate_batch(model, [row], 24)
        chunked = generate_batch(model, [row], 24, prefill_chunk_size=13)
        assert_logits_close(logits(chunked), logits(expected), torch.float64)
        half = generate_batch(model, [row], 9)
        fork = copy.deepcopy(half.past_key_values)
        for cache in (half.past_key_values, fork):
            rest = model.generate(
                half.sequences,
                past_key_values=cache,
                max_new_tokens=15,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            assert_logits_close(logits(rest), logits(expected)[:, 9:], torch.float64)


def test_reset_makes_a_cache_new_in_the_same_place(model: Any) -> None:
    with apply(model, config_of()):
        cache = CSPStaticCache(model.config, max_new_tokens=30)
        expected, places = [], set()
        for row in (ROWS[0], ROWS[3], ROWS[0]):
            output = generate_batch(model, [row], 30, past_key_values=cache, disable_compile=True)
            expected.append(logits(output))
            layer = cache.layers[0]
            ring = layer.front.ring
            places.add(tuple(tensor.data_ptr() for tensor in (layer.keys, ring.queries, ring.count)))
            cache.reset()
    assert len(places) == 1
    assert torch.equal(expected[0], expected[2])


def test_positional_arguments_of_generate(model: Any) -> None:
    settings = transformers.GenerationConfig(max_new_tokens=12, do_sample=False)
    stop = transformers.StoppingCriteriaList()
    ids = torch.tensor([ROWS[3]])
    with apply(model, config_of()) as handle:
        expected = model.generate(ids, max_new_tokens=12, do_sample=False)
        assert torch.equal(model.generate(ids, settings, None, stop), expected)
        assert handle.stats.renewals == 2
    assert len(stop) == 0, "the caller's list is not changed"


# --- what a cache remembers ------------------------------------------------------------------


def test_a_cache_keeps_its_interval(model: Any) -> None:
    """Whatever is applied when it goes on: one that grows is bounded, one that does not has its capacity."""
    row = ROWS[0]

    def go_on(first: int | None, second: int | None, cache: Any) -> Any:
        with apply(model, config_of(decode_interval=first)) as handle:
            one = generate_batch(model, [row], 9, past_key_values=cache, disable_compile=True)
            handle.config = config_of(decode_interval=second)
            cache = one.past_key_values
            ids = torch.cat([one.sequences, torch.tensor([[7, 8]])], dim=1)
            model.generate(
                ids, past_key_values=cache, max_new_tokens=30, do_sample=False, disable_compile=True
            )
            return cache

    for options in (None, CSPStaticCache(model.config, max_new_tokens=24)):
        assert stored(go_on(INTERVAL, None, options)) <= BUDGET + INTERVAL
    assert stored(go_on(None, INTERVAL, None)) == BUDGET + 9 + 2 + 29
    with pytest.raises(ValueError, match="room for 16 more tokens, 32 are needed"):
        go_on(None, INTERVAL, CSPStaticCache(model.config, max_new_tokens=24))


def test_a_prompt_that_is_pruned_later_by_a_method_that_does_it_once(model: Any) -> None:
    with apply(model, config_of()) as handle:
        one = generate_batch(model, [ROWS[2]], 3)
        handle.config = config_of(decode_interval=None)
        ids = torch.cat([one.sequences, torch.tensor([ROWS[3]])], dim=1)
        model.generate(ids, past_key_values=one.past_key_values, max_new_tokens=4, do_sample=False)
        for _ in range(2):
            model(input_ids=torch.tensor([ROWS[3]]), past_key_values=one.past_key_values)
    assert stored(one.past_key_values) == BUDGET + 3 + 2 * len(ROWS[3])


def test_a_static_cache_that_cannot_grow_says_so_first(model: Any) -> None:
    """Where a prompt's images cannot be seen nothing is pruned, and nothing is again."""
    embedded = model.get_input_embeddings()(torch.tensor([ROWS[3]]))
    cache = CSPStaticCache(model.config, max_new_tokens=8)
    options = {"inputs_embeds": embedded, "past_key_values": cache, "disable_compile": True}
    with apply(model, config_of()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is left unpruned
        with pytest.raises(ValueError, match="room for 8 more tokens, 19 are needed"):
            model.generate(**options, max_new_tokens=20)
        assert not cache.static
        model.generate(**options, max_new_tokens=9)
    assert stored(cache) == len(ROWS[3]) + 8


def test_a_cropped_prompt(model: Any) -> None:
    """What is cropped leaves the window of the next prune, too."""
    config = config_of(decode_interval=100, window=64, recent=14)
    with apply(model, config) as handle:
        cache = model(input_ids=torch.tensor([make_row("12", 3)]), use_cache=True).past_key_values
        cache.crop(2)
        for turn in (make_row("14", 5), make_row("110", 6)):
            output = model(input_ids=torch.tensor([turn]), past_key_values=cache)
        assert handle.stats.renewals == 1
    growing = GrowingRow(model, make_row("12", 3)[:2], None, config, [True] * 2)
    growing.feed(make_row("14", 5))
    expected = growing.feed(make_row("110", 6))
    assert_logits_close(output.logits[0, -1], expected, torch.float64)


def test_out_of_inference_mode(model: Any) -> None:
    with apply(model, config_of()):
        expected = generate_batch(model, [ROWS[0]], 24)
        with torch.inference_mode():
            one = generate_batch(model, [ROWS[0]], 9)
        rest = model.generate(
            one.sequences.clone(), past_key_values=one.past_key_values, max_new_tokens=15, do_sample=False
        )
    assert torch.equal(rest, expected.sequences)


def test_what_the_stock_model_has_continued_is_not_pruned_again(model: Any) -> None:
    token = torch.tensor([[7]])
    with apply(model, config_of(decode_n=0.0)):
        cache = generate_batch(model, [ROWS[0]], 2).past_key_values
    model(input_ids=token, past_key_values=cache)
    with apply(model, config_of(decode_n=0.0)) as handle:
        for _ in range(10):
            model(input_ids=token, past_key_values=cache)
        assert handle.stats.renewals == 0
    assert stored(cache) == BUDGET + 1 + 11


def test_masks_over_the_slots(model: Any) -> None:
    """A dynamic cache takes one that was made before a prune; a static one has moved what it shows."""
    config, tokens = config_of(), make_row("12", 9)
    row = {"input_ids": torch.tensor([ROWS[0]]), "pixel_values": make_pixels([ROWS[0]], model.dtype)}

    def step(cache: Any, token: int) -> torch.Tensor:
        layer = cache.layers[0]
        columns = layer.keys.shape[2] if layer.is_compileable else layer.written() + 1
        mask = (torch.arange(columns) <= layer.written())[None, None, None]
        output = model(input_ids=torch.tensor([[token]]), past_key_values=cache, attention_mask=mask)
        return output.logits[0, -1]

    with apply(model, config):
        expected = follow(model, ROWS[0], row["pixel_values"], config, [*tokens, 0], len(ROWS[0]))[1:]
        cache = model(**row, use_cache=True).past_key_values
        found = torch.stack([step(cache, token) for token in tokens])
        assert_logits_close(found, expected, torch.float64)
        cache, found = CSPStaticCache(model.config, max_new_tokens=99), []
        model(**row, past_key_values=cache)
        for count, token in enumerate(tokens):
            if count == INTERVAL:
                with pytest.raises(ValueError, match="moved its slots"):
                    step(cache, token)
            cache.make_room()
            found.append(step(cache, token))
        assert_logits_close(torch.stack(found), expected, torch.float64)


@ATTENTIONS
def test_a_padded_turn_in_chunks(model: Any, attention: str | None) -> None:
    rows = [ROWS[0], ROWS[1]]
    turn = pad_batch([make_row("20", 8), make_row("8", 9)])
    found = []
    with apply(model, config_of(decode_interval=40), attention=attention):
        for chunk in (None, 7):
            one = generate_batch(model, rows, 3)
            mask = [pad_batch(rows)["attention_mask"], torch.ones(2, 3, dtype=torch.int64)]
            output = model.generate(
                torch.cat([one.sequences, turn["input_ids"]], dim=1),
                attention_mask=torch.cat([*mask, turn["attention_mask"]], dim=1),
                past_key_values=one.past_key_values,
                prefill_chunk_size=chunk,
                max_new_tokens=60,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            found.append(logits(output))
    assert_logits_close(found[0], found[1], torch.float64)


# --- parts -----------------------------------------------------------------------------------


def test_ring() -> None:
    """Against a list of all queries."""
    generator = torch.Generator().manual_seed(0)
    seen = list(torch.randn(3, 1, 2, 4, generator=generator).unbind(0))  # tokens of [B, Hq, D]
    begin = torch.stack([torch.zeros(1, 2, 4)] * 2 + seen, dim=2)
    ring = Ring(begin, torch.tensor([[3]]))
    intact = 3  # of the last ones
    for add, take in ((1, 0), (2, 1), (4, 3), (7, 0), (1, 1), (3, 2)):
        new = torch.randn(1, 2, add, 4, generator=generator)
        ring.write(new)
        seen += list(new.unbind(2))
        intact = min(5, intact + add)
        if take:
            ring.crop(take)
            seen = seen[:-take]
            intact -= take
        query, there = ring.last(5)
        assert there.tolist() == [[False] * (5 - intact) + [True] * intact]
        for back in range(1, intact + 1):
            assert torch.equal(query[:, :, -back], seen[-back])
        assert torch.equal(ring.last(2)[0], query[:, :, -2:])


def test_ring_closes_gaps() -> None:
    """Each row keeps the queries of its real tokens, and knows how many."""
    tokens = torch.arange(6.0)[None, None, :, None].expand(2, 1, -1, 1)
    ring = Ring(tokens[:, :, :4].clone(), torch.tensor([[4], [2]]))
    ring.write(tokens[:, :, 4:])
    ring.close_gaps(torch.tensor([[True, False, True], [True, True, True]]))
    query, there = ring.last(4)
    assert there.tolist() == [[False, False, True, True], [False, True, True, True]]
    assert query[0, 0, 2:, 0].tolist() == [3, 5]
    assert query[1, 0, 1:, 0].tolist() == [3, 4, 5]


def test_the_config_says_what_does_not_go() -> None:
    for bad, message in (
        ({"decode_interval": 0}, "decode_interval must be at least 1, got 0"),
        ({"decode_interval": 4, "text_only": "leave"}, "decode_interval must be None beside text_only"),
    ):
        with pytest.raises(ValueError, match=message):
            CSPConfig(**bad)
    with pytest.raises(TypeError, match=r"decode_interval must be an int, got float 2\.5"):
        CSPConfig(decode_interval=2.5)
    with pytest.raises(TypeError, match="decode_interval"):
        csp_ext.methods.make_method("snapkv", decode_interval=4)
    release = CSPConfig.release()
    with pytest.raises(ValueError, match="decode_interval must be off beside hh_ratio, got 4"):
        release.replace(text_only="prune", decode_interval=4)


def test_stats_say_how_often(model: Any) -> None:
    with apply(model, config_of()) as handle:
        generate_batch(model, [ROWS[0]], 20)
        assert "pruned again 3 times" in str(handle.stats)
        assert json.loads(json.dumps(handle.stats.to_dict()))["renewals"] == 3
        generate_batch(model, [ROWS[0]], 2)
        assert handle.stats.renewals == 0
        assert "again" not in str(handle.stats)


def test_images_among_the_ids_of_a_turn_are_seen(model: Any) -> None:
    with apply(model, config_of(decode_interval=40)):
        cache = generate_batch(model, [ROWS[0]], 2).past_key_values
        turn = make_row("2i1", 5)
        pixels = make_pixels([turn], model.dtype)
        model(input_ids=torch.tensor([turn]), pixel_values=pixels, past_key_values=cache)
        kinds = [0] + [int(token == IMAGE) for token in turn]
        assert cache.layers[0].growth.later[0].tolist() == kinds
        embedded = model.get_input_embeddings()(torch.tensor([turn]))
        model(inputs_embeds=embedded, pixel_values=pixels, past_key_values=cache)
        assert cache.layers[0].growth.later[0].tolist() == kinds + kinds[1:]
