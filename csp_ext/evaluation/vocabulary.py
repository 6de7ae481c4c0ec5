"""The words of the evaluation model: one word is one token."""

from __future__ import annotations

SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
NAMES = (
    *("ada", "ben", "cleo", "dan", "eve", "finn", "gus", "hana", "ivo", "jane", "kai", "lea"),
    *("max", "nina", "omar", "pia", "quin", "rosa", "sam", "tess", "uma", "vic", "wren", "yara"),
)
DIGITS = tuple("0123456789")
COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan", "orange", "violet")
SHAPES = ("square", "disk", "cross", "ring", "triangle", "bars", "saltire", "diamond")
PLACES = ("row1", "row2", "row3", "row4", "col1", "col2", "col3", "col4")
BLANK = ("blank",)
SOURCES = ("photo", "code", "pin", "link")
FRAME = ("ask", "and", "say")
FILLERS = (
    *("the", "so", "well", "of", "also", "then", "now", "here"),
    *("it", "was", "quite", "still", "just", "very", "some", "much"),
)

WORDS = (*SPECIAL, *NAMES, *DIGITS, *COLOURS, *SHAPES, *PLACES, *BLANK, *SOURCES, *FRAME, *FILLERS)
ID = {word: index for index, word in enumerate(WORDS)}
PAD, BOS, EOS, IMAGE, UNKNOWN = (ID[word] for word in SPECIAL)


def first(group: tuple[str, ...]) -> int:
    """Return the id of a group's first word; the others follow it."""
    return ID[group[0]]


def encode(text: str) -> list[int]:
    """Return the ids of words separated by spaces."""
    return [ID[word] for word in text.split()]


def decode(ids: list[int]) -> str:
    """Return the words of `ids`, separated by spaces."""
    return " ".join(WORDS[index] for index in ids)
