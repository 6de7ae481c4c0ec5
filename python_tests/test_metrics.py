"""Scoring: every stored case of MileBench's scorer, and its traps one by one."""

from __future__ import annotations

import json
import sys

import pytest

from csp_ext.evaluation.metrics import (
    METRICS,
    extract_choice,
    gold_letter,
    metric_for,
    normalise,
    option_letters,
)
from python_tests.golden import GOLDEN, needs_golden

CASES = GOLDEN / "scoring_cases.json"


@pytest.fixture(scope="module")
def cases():
    return json.loads(CASES.read_text())


@needs_golden
def test_stored_multiple_choices_agree(cases):
    assert len(cases["multi_choice"]) > 100
    for case in cases["multi_choice"]:
        assert extract_choice(case["pred"], case["choices"]) == case["extracted"], case
        assert METRICS["multiple_choice"](case["pred"], case["gt"], case["choices"]) == case["score"], case


@needs_golden
@pytest.mark.parametrize(("kind", "metric"), [("needle", "token_match"), ("contains", "contains")])
def test_stored_matches_agree(cases, kind, metric):
    for case in cases[kind]:
        assert METRICS[metric](case["pred"], case["gt"], ()) == case["score"], case


@needs_golden
def test_stored_rouge_agrees(cases):
    pytest.importorskip("rouge")
    for case in cases["rouge_l"]:
        assert METRICS["rouge_l"](case["pred"], case["gt"], ()) == pytest.approx(case["f"], abs=1e-12), case


@needs_golden
def test_stored_normalisations_agree(cases):
    for case in cases["normalise"]:
        assert normalise(case["text"]) == case["result"], case


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("well-known fact", "well known fact"),
        ("well-known - fact", "wellknown  fact"),  # one dash beside a space deletes them all
        ("1,200 well-known", "1200 wellknown"),  # so does a number with a comma
        ("v1.5 is out. Yes.", "v1.5 is out yes"),
        ("." * 34 + "x", "..x"),  # only the first 32 periods go
        ("'quoted'", "quoted"),
        ("  Two\twords\n", "two words"),
        ("Johnson & Sons", "johnson & sons"),
    ],
)
def test_normalise(text, result):
    assert normalise(text) == result


def test_letters_go_on_after_z():
    letters = option_letters(55)
    assert letters[25:28] == ["Z", "AA", "AB"]
    assert letters[52:] == ["BA", "BB", "BC"]
    assert len(set(option_letters(702))) == 702
    with pytest.raises(ValueError, match="count must be at most 702, got 703"):
        option_letters(703)


COLOURS = ["teal", "mauve", "ochre", "beige"]


@pytest.mark.parametrize(
    ("prediction", "choices", "letter"),
    [
        ("", COLOURS, "C"),
        (" \n", COLOURS, "C"),
        ("C. ochre, not A. teal", COLOURS, "C"),  # a letter with its text: the leftmost pair
        ("Mauve or teal?", COLOURS, "B"),  # a text alone: the leftmost
        ("o c h r e", COLOURS, "C"),  # spaces do not count
        ("d", COLOURS, "D"),
        ("Probably D!", COLOURS, "BABD"),  # any sign that is a letter
        ("zzz", COLOURS, ""),
        ("a", ["b", "a"], "B"),  # texts go before letters
        ("3.5 m", ["3.5 m", "4 m"], ""),  # a text with a regex sign is never found
        ("A. 3.5 m", ["3.5 m", "4 m"], "A"),  # unless its letter comes with it
        ("salt & ink", ["pepper", "salt & ink"], "B"),  # other signs do no harm
        ("image12", [f"image{i}" for i in range(1, 15)], "A"),  # the first prefix
        ("AA image27", [f"image{i}" for i in range(1, 30)], "A"),  # one letter of two
        ("ab", [f"frame{i}" for i in range(28)], "AB"),  # but a bare name of two is whole
    ],
)
def test_extract_choice(prediction, choices, letter):
    assert extract_choice(prediction, choices) == letter


def test_the_right_letter_is_the_first_of_equals():
    assert gold_letter("Left.", ["up", "left", "LEFT"]) == "B"
    with pytest.raises(ValueError, match="reference must be one of the choices, got 'down'"):
        gold_letter("down", ["up", "left"])


def test_rouge_survives_what_models_say():
    pytest.importorskip("rouge")
    rouge_l = METRICS["rouge_l"]
    assert rouge_l("." * 50, "a cup", ()) == 0
    assert rouge_l("[]", "a cup", ()) == 0
    limit = sys.getrecursionlimit()
    assert 0 < rouge_l("so it goes " * 700, "it goes on", ()) < 1
    assert sys.getrecursionlimit() == limit


def test_rouge_counts_distinct_words():
    pytest.importorskip("rouge")
    # Words in common {b, c}: 2 of 3 in the reference, 2 of 4 in the answer.
    expected = 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)
    assert METRICS["rouge_l"]("b x c y c", "a b c", ()) == pytest.approx(expected, abs=1e-6)


def test_our_own_metrics():
    assert METRICS["exact_match"](" code ada 4 1 ", "code ada 4 1", ()) == 1
    assert METRICS["exact_match"]("code ada 4 1 2", "code ada 4 1", ()) == 0
    accuracy = METRICS["token_accuracy"]
    assert accuracy("code ben 4 1 7", "code ada 4 1", ()) == 0.75
    assert accuracy("ada 4 1", "code ada 4 1", ()) == 0
    assert accuracy("", "code", ()) == 0
    with pytest.raises(ValueError, match="reference must hold a word"):
        accuracy("code", " ", ())


def test_dispatch():
    assert metric_for("DocVQA", "multi-choice") == "multiple_choice"
    assert metric_for("IEdit", "open-ended") == "rouge_l"
    assert metric_for("TextNeedleInAHaystack", "open-ended") == "token_match"
    assert metric_for("MMCoQA", "open-ended") == "contains"
    assert metric_for("photo_code", "open-ended", "exact_match") == "exact_match"
    with pytest.raises(ValueError, match="question_type must be multi-choice or open-ended, got 'essay'"):
        metric_for("DocVQA", "essay")
    with pytest.raises(ValueError, match=r"metric must be one of multiple_choice, .* got 'bleu'"):
        metric_for("photo", "open-ended", "bleu")
