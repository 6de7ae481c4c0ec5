"""A generation over a pruned cache equals one over a full cache whose dropped keys are masked."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from llava_reference import (
    assert_batch_equals_rows,
    assert_logits_close,
    generate_batch,
    generate_row,
    make_pixels,
    make_row,
    small_llava,
    split_pixels,
)

pytest.importorskip("transformers")

from csp_ext.config import CSPConfig
from csp_ext.integration import apply

# Left padding everywhere; the third row is shorter than the budget, the last has no image.
ROWS = [make_row("5i3i12", 1), make_row("2i20", 2), make_row("9", 3), make_row("33", 4)]
# Older versions of transformers hand the images of a row that has several to the wrong copies of it.
ONE_IMAGE_ROWS = [make_row("5i15", 1), make_row("2i20", 2), make_row("9", 3)]
# The stock eager kernel takes its softmax in float32, where a float64 mask overflows and padding gives NaN.
EVEN_ROWS = [make_row("5i3i12", 1), make_row("i8i12", 2)]
BUDGET = 14


# On a GPU the twins prune the float64 model and the compiled ops the other.
@pytest.fixture(scope="module")
def gqa64(device: str) -> Any:
    return small_llava(dtype=torch.float64, num_heads=4, num_kv_heads=2, logit_gain=1.0).to(device)


@pytest.fixture(scope="module")
def mha32(device: str) -> Any:
    return small_llava(seed=1, num_layers=3, num_heads=4, num_kv_heads=4).to(device)


@pytest.fixture(autouse=True)
def stock_sdpa(gqa64: Any, mha32: Any) -> None:
    for model in (gqa64, mha32):
        model.set_attn_implementation("sdpa")


def assert_untouched(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    """Compare generations of the same arithmetic: to the bit, but a GPU picks its kernels itself."""
    for one, two in zip(actual, expected, strict=True):
        if one.is_cuda:
            assert_logits_close(one, two, one.dtype)
        else:
            assert torch.equal(one, two)


@pytest.mark.parametrize("base", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", ["kv", "shared"])
@pytest.mark.parametrize("decode_n", [0.0, 1.0, 2.5])
def test_equals_masked_full_cache(gqa64: Any, base: str, heads: str, decode_n: float) -> None:
    config = CSPConfig(budget=BUDGET, heads=heads, decode_n=decode_n)
    gqa64.set_attn_implementation(base)
    rows = ROWS if base == "sdpa" else EVEN_ROWS
    with apply(gqa64, config) as handle:
        output = generate_batch(gqa64, rows, 6)
    assert_batch_equals_rows(gqa64, output, rows, config, BUDGET)
    images = split_pixels(rows, make_pixels(rows, torch.float64))
    expected = generate_row(gqa64, rows[1], images[1], config, BUDGET, 1)
    shift = max(map(len, rows)) - len(rows[1])
    for layer, kept in zip(handle.stats.layers, expected.kept, strict=True):
        for head, positions in enumerate(layer.indices[1]):
            assert (positions[positions >= 0] - shift).tolist() == kept[head].nonzero().flatten().tolist()


@pytest.mark.parametrize("base", ["eager", "sdpa"])
@pytest.mark.parametrize(("heads", "decode_n"), [("kv", 0.0), ("kv", 1.0), ("shared", 2.5)])
def test_float32_and_mha(mha32: Any, base: str, heads: str, decode_n: float) -> None:
    config = CSPConfig(budget=BUDGET, heads=heads, decode_n=decode_n)
    mha32.set_attn_implementation(base)
    with apply(mha32, config):
        output = generate_batch(mha32, ROWS, 6)
    assert_batch_equals_rows(mha32, output, ROWS, config, BUDGET)


@pytest.mark.parametrize("combine", ["intersection", "union", "calibrated"])
def test_rules_and_windows(gqa64: Any, combine: str) -> None:
    rows = ROWS[:2]
    for config in (
        CSPConfig(budget=BUDGET, combine=combine, window=5, recent=2, pool="none", decode_n=1.0),
        CSPConfig(budget=BUDGET, combine=combine, window="half", recent="half", pool="avg", pool_kernel=3),
    ):
        with apply(gqa64, config):
            output = generate_batch(gqa64, rows, 4)
        assert_batch_equals_rows(gqa64, output, rows, config, BUDGET)


def test_pruning_shows_in_the_answer(gqa64: Any) -> None:
    whole = generate_batch(gqa64, ROWS[:1], 4)
    with apply(gqa64, budget=BUDGET):
        pruned = generate_batch(gqa64, ROWS[:1], 4)
    assert_untouched(pruned.logits[:1], whole.logits[:1])
    following = generate_row(
        gqa64, ROWS[0], make_pixels(ROWS[:1], torch.float64), None, 0, 4, pruned.sequences[0, -4:].tolist()
    )
    assert (following.logits[1:] - torch.stack(pruned.logits)[1:, 0]).abs().max() > 0.1


@pytest.mark.parametrize(
    "config", [CSPConfig.paper(BUDGET), CSPConfig.release(0.2, 0.2)], ids=["paper", "release"]
)
def test_both_readings(gqa64: Any, config: CSPConfig) -> None:
    # The release's sizes follow from each prompt's length, so its rows are compared one at a time.
    for row in ROWS[:2]:
        with apply(gqa64, config):
            output = generate_batch(gqa64, [row], 5)
        assert_batch_equals_rows(gqa64, output, [row], config, BUDGET)


def test_the_release_leaves_text_alone(gqa64: Any) -> None:
    config = CSPConfig.release(0.2, 0.2)
    with apply(gqa64, config) as handle:
        output = generate_batch(gqa64, [make_row("40", 5)], 4)
        assert handle.stats.layers[0].dropped == 0
    assert_batch_equals_rows(gqa64, output, [make_row("40", 5)], None, BUDGET)


@pytest.mark.parametrize("decode_n", [0.0, 1.0])
def test_text_only_rows_left_whole(gqa64: Any, decode_n: float) -> None:
    config = CSPConfig(budget=BUDGET, text_only="leave", decode_n=decode_n)
    with apply(gqa64, config) as handle:
        output = generate_batch(gqa64, ROWS, 4)
    assert_batch_equals_rows(gqa64, output, ROWS, config, BUDGET)
    lengths = handle.stats.layers[0].lengths[:, 0].tolist()
    assert lengths == [BUDGET, BUDGET, len(ROWS[2]), len(ROWS[3])]


def test_an_image_that_ends_the_prompt(gqa64: Any) -> None:
    rows = [make_row("6i", 1), make_row("i4i", 2)]
    config = CSPConfig(budget=BUDGET, decode_n=1.0)
    with apply(gqa64, config):
        output = generate_batch(gqa64, rows, 4)
    assert_batch_equals_rows(gqa64, output, rows, config, BUDGET)


@pytest.mark.parametrize("budget", [60, 1.0])
@pytest.mark.parametrize("base", ["eager", "sdpa"])
def test_a_large_budget_is_the_untouched_model(mha32: Any, base: str, budget: float) -> None:
    mha32.set_attn_implementation(base)
    whole = generate_batch(mha32, ROWS, 6)
    with apply(mha32, budget=budget, decode_n=1.0) as handle:
        same = generate_batch(mha32, ROWS, 6)
    assert torch.equal(whole.sequences, same.sequences)
    assert_untouched(same.logits, whole.logits)
    assert handle.stats.bytes_after == handle.stats.bytes_before


def test_a_short_prompt_grows_past_the_budget(mha32: Any) -> None:
    rows = [make_row("9", 3)]
    whole = generate_batch(mha32, rows, 12)
    with apply(mha32, budget=BUDGET, decode_n=1.0):
        same = generate_batch(mha32, rows, 12)
    assert_untouched(same.logits, whole.logits)


def test_a_share_is_of_the_longest_prompt(gqa64: Any) -> None:
    rows = ROWS[:2]
    longest = max(map(len, rows))
    with apply(gqa64, budget=0.25) as handle:
        output = generate_batch(gqa64, rows, 4)
    assert handle.stats.layers[0].lengths.tolist() == [[longest // 4] * 2] * 2
    assert_batch_equals_rows(gqa64, output, rows, CSPConfig(budget=longest // 4), longest // 4)


def test_sampling_and_returned_sequences(gqa64: Any) -> None:
    config = CSPConfig(budget=BUDGET, decode_n=1.0)
    torch.manual_seed(0)
    with apply(gqa64, config):
        output = generate_batch(gqa64, ONE_IMAGE_ROWS, 5, do_sample=True, num_return_sequences=3)
    assert output.sequences.shape[0] == 9
    assert_batch_equals_rows(gqa64, output, ONE_IMAGE_ROWS, config, BUDGET, repeats=3)


def test_beam_search(gqa64: Any) -> None:
    """The score of every beam is the log-probability the reference gives to its tokens."""
    config, steps, beams = CSPConfig(budget=BUDGET, decode_n=1.0), 6, 3
    with apply(gqa64, config):
        output = generate_batch(
            gqa64,
            ONE_IMAGE_ROWS,
            steps,
            num_beams=beams,
            num_return_sequences=beams,
            output_scores=True,
            length_penalty=0.0,
        )
    images = split_pixels(ONE_IMAGE_ROWS, make_pixels(ONE_IMAGE_ROWS, torch.float64))
    for index, sequence in enumerate(output.sequences):
        row, forced = index // beams, sequence[-steps:].tolist()
        expected = generate_row(gqa64, ONE_IMAGE_ROWS[row], images[row], config, BUDGET, steps, forced)
        chosen = expected.logits.log_softmax(-1).gather(1, sequence[-steps:, None]).sum()
        assert abs(float(chosen) - float(output.sequences_scores[index])) < 1e-5


def test_a_padded_batch_equals_its_rows(gqa64: Any) -> None:
    with apply(gqa64, budget=BUDGET, decode_n=1.0):
        together = generate_batch(gqa64, ROWS, 5)
        images = split_pixels(ROWS, make_pixels(ROWS, torch.float64))
        for index, (row, pixels) in enumerate(zip(ROWS, images, strict=True)):
            alone = gqa64.generate(
                input_ids=torch.tensor([row], device=gqa64.device),
                max_new_tokens=5,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
                **({} if pixels is None else {"pixel_values": pixels.to(gqa64.device)}),
            )
            batched = torch.stack(together.logits, dim=1)[index]
            assert_logits_close(batched, torch.stack(alone.logits, dim=1)[0], torch.float64)


def test_memory_is_what_the_budget_says(mha32: Any) -> None:
    steps = 3
    with apply(mha32, budget=BUDGET, decode_n=1.0) as handle:
        output = generate_batch(mha32, ROWS[:2], steps)
    for layer, stats in zip(output.past_key_values.layers, handle.stats.layers, strict=True):
        # T tokens, the sink, and the generated tokens but the last.
        assert layer.keys.shape == (2, 4, BUDGET + 1 + steps - 1, 16)
        for stored in (layer.keys, layer.values):
            assert stored.untyped_storage().nbytes() == stored.nbytes
        assert stats.bytes_after == 2 * 2 * 4 * (BUDGET + 1) * 16 * 4
        assert stats.bytes_before == 2 * 2 * 4 * max(map(len, ROWS[:2])) * 16 * 4
    assert output.past_key_values.get_seq_length() == max(map(len, ROWS[:2])) + steps - 1


@pytest.mark.parametrize("delay", [1, 3])
def test_a_delayed_prune_is_one_of_the_longer_prompt(gqa64: Any, delay: int) -> None:
    """Tokens generated before the prune count as prompt: the window is longer by them, and they stay."""
    rows, steps = [make_row("9i2i14", 5), make_row("4i9", 6)], 7
    config = CSPConfig(budget=BUDGET, decode_n=1.0)
    with apply(gqa64, config, delay=delay) as handle:
        output = generate_batch(gqa64, rows, steps)
        assert all(bool((layer.lengths == BUDGET + delay).all()) for layer in handle.stats.layers)
    same = config.replace(window=8 + delay, recent=8 + delay)
    images = split_pixels(rows, make_pixels(rows, gqa64.dtype))
    logits = torch.stack(output.logits, dim=1)
    for index, row in enumerate(rows):
        generated = output.sequences[index, -steps:].tolist()
        longer = row + generated[:delay]
        want = generate_row(
            gqa64, longer, images[index], same, BUDGET + delay, steps - delay, generated[delay:]
        )
        assert_logits_close(logits[index, delay:], want.logits, gqa64.dtype)


def test_an_answer_shorter_than_the_delay_is_not_pruned(gqa64: Any) -> None:
    rows = [make_row("9i2i14", 5)]
    plain = generate_batch(gqa64, rows, 3)
    with warnings.catch_warnings(), apply(gqa64, CSPConfig(budget=BUDGET, delay=8)) as handle:
        warnings.simplefilter("error")
        output = generate_batch(gqa64, rows, 3)
        assert not handle.stats.layers
    assert_untouched(output.logits, plain.logits)


def test_a_delay_follows_the_beams(gqa64: Any) -> None:
    """Beams are reordered while the queries of the prompt wait: each has the score of its own tokens."""
    row, steps, delay = make_row("9i14", 5), 6, 2
    config = CSPConfig(budget=BUDGET)
    images = make_pixels([row], gqa64.dtype)
    with apply(gqa64, config, delay=delay):
        output = generate_batch(gqa64, [row], steps, num_beams=3, num_return_sequences=3, output_scores=True)
    same = config.replace(window=8 + delay, recent=8 + delay)
    for index, sequence in enumerate(output.sequences[:, -steps:].tolist()):
        longer = row + sequence[:delay]
        want = generate_row(
            gqa64, longer, images, same, BUDGET + delay, steps - delay, sequence[delay:]
        ).logits.log_softmax(-1)
        got = generate_row(gqa64, row, images, None, 0, delay, sequence[:delay]).logits.log_softmax(-1)
        total = sum(float(got[t, sequence[t]]) for t in range(delay))
        total += sum(float(want[t, sequence[t + delay]]) for t in range(steps - delay))
        # generate() adds up in float32.
        assert float(output.sequences_scores[index]) * steps == pytest.approx(total, rel=1e-5)
