"""How answers are scored: MileBench's rules as its published results follow them, and two of our own.

MileBench's rules have traps, kept because its published numbers contain them: an empty answer to a multiple
choice counts as "C", the answer "image10" is read as the option "image1", and an option whose text holds a
sign that regular expressions use is never found by its text alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from string import ascii_uppercase

from csp_ext.demo.console import require

SIGNS = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
LAST_PERIODS = re.compile(r"\.(?!\d)")
# As many periods as are deleted at most.
PERIODS = 32
# The signs that MileBench escapes in an option's text, and then takes for part of it.
ESCAPED = frozenset("\\.^$*+?{}[]|()")
# What an empty answer to a multiple choice counts as.
LETTER_OF_SILENCE = "C"


def normalise(text: str) -> str:
    """Return `text` as MileBench compares it: without most signs, in lower case.

    A sign is deleted everywhere if it stands beside a space anywhere, or if the text holds a number such as
    1,200; otherwise it becomes a space. Periods that no digit follows are deleted, the first 32 of them.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    numeric = DIGIT_COMMA_DIGIT.search(text) is not None
    bare = text
    for sign in SIGNS:
        beside_a_space = f"{sign} " in text or f" {sign}" in text
        bare = bare.replace(sign, "" if numeric or beside_a_space else " ")
    bare = LAST_PERIODS.sub("", bare, count=PERIODS)
    return bare.strip("'").strip('"').strip().lower()


def option_letters(count: int) -> list[str]:
    """Return the names of `count` options: A to Z, AA to AZ, BA and so on."""
    prefixes = ["", *ascii_uppercase]
    if count > len(prefixes) * len(ascii_uppercase):
        raise ValueError(f"count must be at most {len(prefixes) * len(ascii_uppercase)}, got {count}")
    names = (prefix + letter for prefix in prefixes for letter in ascii_uppercase)
    return [name for name, _ in zip(names, range(count), strict=False)]


def extract_choice(prediction: str, choices: Sequence[str]) -> str:
    """Return the letter, or letters, of the option that an answer names; empty if it names none.

    Parameters
    ----------
    prediction : str
        What the model said.
    choices : sequence of str
        Texts of the options, in the order of their letters.
    """
    said = normalise(prediction)
    if not said:
        return LETTER_OF_SILENCE
    texts = [normalise(choice) for choice in choices]
    letters = option_letters(len(texts))

    hit = _leftmost(said, [normalise(f"{a} {text}") for a, text in zip(letters, texts, strict=True)])
    if hit:
        return hit[0].upper()

    # Normalised twice, as in the pairs above: a quote that signs had enclosed goes only now.
    packed = [normalise(text).replace(" ", "") for text in texts]
    hit = _leftmost(said.replace(" ", ""), packed)
    if hit is not None and ESCAPED.isdisjoint(hit):
        return letters[packed.index(hit)]

    if len(said) <= 2 and said.upper() in letters:
        return said.upper()
    return "".join(sign.upper() for sign in said if sign.upper() in letters)


def _leftmost(text: str, wanted: Sequence[str]) -> str | None:
    """Return which of `wanted` begins first in `text`, the earlier one where two begin together."""
    found = [(text.find(word), order) for order, word in enumerate(wanted) if word in text]
    return wanted[min(found)[1]] if found else None


def gold_letter(reference: str, choices: Sequence[str]) -> str:
    """Return the letter of the first option that is the right one.

    Raises
    ------
    ValueError
        If no option is.
    """
    texts = [normalise(choice) for choice in choices]
    gold = normalise(reference)
    if gold not in texts:
        raise ValueError(f"reference must be one of the choices, got {reference!r}")
    return option_letters(len(texts))[texts.index(gold)]


def multiple_choice(prediction: str, reference: str, choices: Sequence[str]) -> float:
    """Return 1 if the answer names the right option and no other, else 0."""
    return float(extract_choice(prediction, choices) == gold_letter(reference, choices))


def token_match(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """Return 1 if the reference is one of the answer's words, else 0."""
    return float(normalise(reference) in normalise(prediction).split())


def contains(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """Return 1 if the reference stands anywhere in the answer, else 0."""
    return float(normalise(reference) in normalise(prediction))


def rouge_l(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """Return the F value of ROUGE-L, as the package ``rouge`` defines it.

    Raises
    ------
    UserError
        If that package is not installed.
    """
    require("eval", "rouge")
    from rouge import Rouge

    said, gold = normalise(prediction), normalise(reference)
    # The package splits sentences at periods and refuses a text of none.
    if not said.strip(".") or not gold.strip("."):
        return 0.0
    with _recursion(len(said.split()) + len(gold.split())):
        return float(Rouge(metrics=["rouge-l"]).get_scores(said, gold)[0]["rouge-l"]["f"])


@contextmanager
def _recursion(depth: int) -> Iterator[None]:
    """Allow `depth` more calls: the package recurses once per word of both texts."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + depth)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def exact_match(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """Return 1 if the answer has the reference's words and no others, else 0."""
    return float(prediction.split() == reference.split())


def token_accuracy(prediction: str, reference: str, choices: Sequence[str] = ()) -> float:
    """Return the share of the reference's words that the answer has in the same place."""
    said, gold = prediction.split(), reference.split()
    if not gold:
        raise ValueError("reference must hold a word, got none")
    return sum(a == b for a, b in zip(said, gold, strict=False)) / len(gold)


# Each takes the answer, the reference and the options' texts, and gives a value from 0 to 1.
METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "multiple_choice": multiple_choice,
    "token_match": token_match,
    "contains": contains,
    "rouge_l": rouge_l,
    "exact_match": exact_match,
    "token_accuracy": token_accuracy,
}


def metric_for(dataset_name: str, question_type: str, declared: str | None = None) -> str:
    """Return which of ``METRICS`` scores a data set.

    Parameters
    ----------
    dataset_name : str
        Needles and MMCoQA have metrics of their own.
    question_type : str
        "multi-choice" or "open-ended"; decides for all others.
    declared : str, optional
        What a generated data set names itself; it goes first.

    Raises
    ------
    ValueError
        If the metric or the question type is unknown.
    """
    if declared is not None:
        if declared not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {declared!r}")
        return declared
    if "NeedleInAHaystack" in dataset_name:
        return "token_match"
    if "MMCoQA" in dataset_name:
        return "contains"
    if question_type == "multi-choice":
        return "multiple_choice"
    if question_type == "open-ended":
        return "rouge_l"
    raise ValueError(f"question_type must be multi-choice or open-ended, got {question_type!r}")
