"""The demo's questions to the trained model, and the picture of what is kept of their evidence."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
from PIL import Image

from csp_ext.demo import evidence_picture, questions, scoreboard
from csp_ext.demo.console import UserError
from csp_ext.demo.evidence_picture import Box, cell_boxes, faded, frames, shares_of, tile_boxes, word_boxes
from csp_ext.demo.run import LayerKept, compare
from csp_ext.evaluation import load_eval_model, make_samples

BUDGETS = {"20 %": 0.2, "10 tok": 10}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_eval_model()


@pytest.fixture(scope="module")
def question(loaded: tuple[Any, Any]) -> questions.Question:
    model, processor = loaded
    sample = questions.draw_sample("photo_code", 3)
    posed = questions.pose(model, processor, sample, questions.attempts(BUDGETS, "snapkv"))
    compare(model, posed.prompt, [attempt.run for attempt in posed.attempts], questions.NEW_TOKENS)
    return posed.answered(processor)


def test_a_question_is_the_sample(question: questions.Question) -> None:
    sample, prompt = question.sample, question.prompt
    assert sample.prompt == make_samples("photo_code", 1, 3)[0].prompt
    text = [word for word, kind in zip(question.words, prompt.modality, strict=True) if kind == 0]
    assert ["<s>", *sample.prompt.replace("<image>", "").split()] == text
    for number, photograph in enumerate(prompt.photographs):
        first = int(torch.nonzero(prompt.modality == 1)[16 * number])
        assert question.words[first - 2 : first] == ["photo", photograph.name]


def test_attempts_come_in_the_order_of_the_table(question: questions.Question) -> None:
    assert [(a.method, a.budget) for a in question.attempts] == [
        ("full", "100 %"),
        ("csp", "20 %"),
        ("snapkv", "20 %"),
        ("csp", "10 tok"),
        ("snapkv", "10 tok"),
    ]
    assert len({attempt.run.name for attempt in question.attempts}) == 5
    slots = int(0.2 * question.prompt.length)
    kept = [attempt.run.kept_total(question.prompt) for attempt in question.attempts]
    assert kept == pytest.approx([question.prompt.length, slots, slots, 10, 10])


def test_answers_are_what_was_generated(question: questions.Question) -> None:
    assert question.answers[0] == question.sample.answer
    rows = json.loads(json.dumps(scoreboard.rows(question)))
    assert [row["answer"] for row in rows] == list(question.answers)
    assert [row["right"] for row in rows] == [a == question.sample.answer for a in question.answers]
    assert not rows[4]["right"]


def test_a_long_answer_is_shortened(question: questions.Question) -> None:
    expected = question.sample.answer
    assert question.shortened(expected) == expected
    assert question.shortened(f"{expected} and so on") == f"{expected} ..."


def test_the_table_says_right_and_wrong_in_words(question: questions.Question) -> None:
    file = io.StringIO()
    Console(width=100, file=file).print(scoreboard.table(question))
    lines = [line for line in file.getvalue().splitlines() if " ms " in line]
    verdicts = ["right" if answer == question.sample.answer else "WRONG" for answer in question.answers]
    assert [line.split()[-1] for line in lines] == verdicts


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(UserError, match=r"task must be one of code, .*, got 'riddle'"):
        questions.draw_sample("riddle", 0)


# ---- the picture ----


def test_the_layer_shown_is_the_one_that_looks_up_the_digits(
    loaded: tuple[Any, Any], question: questions.Question
) -> None:
    """Over the full cache, the query that says a digit attends to the digit's evidence there."""
    _, processor = loaded
    model = load_eval_model()[0]
    model.set_attn_implementation("eager")
    sample = question.sample
    text = f"{sample.prompt} {sample.answer}"
    inputs = processor(text=text, images=sample.images, return_tensors="pt")
    with torch.no_grad():
        attention = torch.stack(model(**inputs, output_attentions=True).attentions)[:, 0]
    words = sample.answer.split()
    # The query stands one token before what it says.
    asking = [question.prompt.length + i - 1 for i, word in enumerate(words) if word.isdigit()]
    found = attention[:, :, asking, sample.evidence].mean(-1).amax(1)
    assert found.argmax() == evidence_picture.LAYER
    assert found[evidence_picture.LAYER] > 0.6


def test_shares_are_those_of_the_layer(question: questions.Question) -> None:
    length = question.prompt.length
    assert torch.equal(shares_of(question.attempts[0], length), torch.ones(length))
    run = question.attempts[1].run
    assert torch.equal(shares_of(question.attempts[1], length), run.layers[evidence_picture.LAYER].share)
    single = replace(question.attempts[1], run=replace(run, layers=[LayerKept(0, torch.zeros(length))]))
    assert shares_of(single, length).sum() == 0


def test_dropped_patches_fade_into_the_paper() -> None:
    pixels = np.full((8, 8, 3), 0.2)
    shown = faded(pixels, np.array([[1.0, 0.0], [0.5, 0.0]]))
    np.testing.assert_allclose(shown[:4, :4], 0.2)
    assert shown[:4, 4:].min() > 0.85
    assert 0.2 < shown[4:, :4].mean() < shown[:4, 4:].mean()


def test_words_stay_in_their_column() -> None:
    words = ["photo", "a"] * 60
    boxes = word_boxes(words, 2.0, 5.0, 1.0)
    assert all(2.0 <= box.left < box.right <= 5.0 for box in boxes)
    for one, other in pairwise(boxes):
        assert other.left > one.right if other.top == one.top else other.left == 2.0


def test_cells_fill_their_images_in_row_major_order() -> None:
    tiles = tile_boxes(7, 1.0)
    assert tiles[6].top > tiles[5].bottom
    cells = cell_boxes(tiles, 4)
    assert len(cells) == 7 * 16
    assert (cells[0].left, cells[0].top) == (tiles[0].left, tiles[0].top)
    assert cells[1].left > cells[0].left
    assert cells[4].top > cells[3].top
    assert (cells[-1].right, cells[-1].bottom) == pytest.approx((tiles[6].right, tiles[6].bottom))


def test_frames_join_neighbours_of_the_same_fate() -> None:
    row = [Box(0.1 * i, 0.0, 0.1 * i + 0.1, 0.1) for i in range(4)]
    below = Box(0.4, 0.1, 0.5, 0.2)
    joined = frames([(row[0], True), (row[1], True), (row[2], False), (row[3], False), (below, False)])
    assert joined == [
        (Box(0.0, 0.0, row[1].right, 0.1), True),
        (Box(row[2].left, 0.0, row[3].right, 0.1), False),
        (below, False),
    ]


def test_draw_frames_the_evidence(
    loaded: tuple[Any, Any], question: questions.Question, tmp_path: Path
) -> None:
    """The picture without evidence differs from the one with it in the frames' places only."""
    bare = replace(question, sample=replace(question.sample, evidence=[]))
    for name, asked in (("with", question), ("without", bare)):
        evidence_picture.draw(loaded[1], asked, [0, 3], tmp_path / f"{name}.png")
    drawn = []
    for name in ("with", "without"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.format == "PNG"
            drawn.append(np.asarray(image.convert("RGB")).astype(int))
    assert drawn[0].shape == drawn[1].shape
    assert drawn[0].std() > 30
    changed = np.abs(drawn[0] - drawn[1]).max(-1) > 0
    assert 0.0005 < changed.mean() < 0.02
    frame = np.abs(drawn[0] - np.array([0xC2, 0x00, 0x7A])).max(-1) < 30
    assert frame[: len(frame) // 2].sum() > 500
    assert not (np.abs(drawn[1] - np.array([0xC2, 0x00, 0x7A])).max(-1) < 5).any()


def test_one_thread_is_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with questions.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
