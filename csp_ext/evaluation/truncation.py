"""Contexts of text and images, and how MileBench cuts those that are too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Tokenizer(Protocol):
    """What truncation needs of a tokenizer; those of transformers have it."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Any:
        """Return a mapping whose ``input_ids`` are the ids of `text`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""


@dataclass(frozen=True)
class Limit:
    """How long a prompt may be.

    Attributes
    ----------
    tokens : int
        Of instruction and context together; what a template adds is not counted, as in MileBench.
    tokens_per_image : int
        What one image takes.
    tokenizer : Tokenizer
        Counts the rest.
    """

    tokens: int
    tokens_per_image: int
    tokenizer: Tokenizer

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.tokens_per_image < 1:
            raise ValueError(
                "tokens and tokens_per_image must be at least 1, "
                f"got {self.tokens} and {self.tokens_per_image}"
            )


@dataclass(frozen=True)
class Dropped:
    """What truncation took from the beginning of a context."""

    images: int = 0
    text_tokens: int = 0


@dataclass(frozen=True)
class Context:
    """Text with images in it.

    Attributes
    ----------
    fragments : tuple of str
        The text before, between and after the images; one more than there are images.
    images : tuple of Path
        In the order of the text, an image once for every time that the text refers to it.
    question : tuple of (int, int) or None
        Where the question begins, counted from the end: in the fragment that so many others follow, and so
        many characters before its end.
    """

    fragments: tuple[str, ...]
    images: tuple[Path, ...]
    question: tuple[int, int] | None


def truncate(
    context: Context, budget: int, tokens_per_image: int, tokenizer: Tokenizer
) -> tuple[Context, Dropped]:
    """Cut a context from the left until it fits.

    From the end, fragments and the images before them are taken as long as they fit whole; only of the last
    fragment the end is taken if the whole does not fit. Whole fragments keep their text, where MileBench
    takes what their tokens decode to.

    Parameters
    ----------
    context : Context
        What to cut.
    budget : int
        Tokens that it may have.
    tokens_per_image : int
        What one image takes.
    tokenizer : Tokenizer
        Counts the rest.

    Returns
    -------
    Context
        Begins with an image if the fragment before that image did not fit.
    Dropped
        What is missing.
    """
    ids = [token_ids(tokenizer, fragment) for fragment in context.fragments]
    taken: list[str] = []
    used = text_used = images = 0
    for fragment, tokens in zip(reversed(context.fragments), reversed(ids), strict=True):
        if used + len(tokens) > budget:
            break
        taken.append(fragment)
        used += len(tokens)
        text_used += len(tokens)
        if len(taken) == len(ids) or used + tokens_per_image > budget:
            break
        used += tokens_per_image
        images += 1
    if not taken:
        end = ids[-1][max(len(ids[-1]) - max(budget, 0), 0) :]
        taken.append(tokenizer.decode(end) if end else "")
        text_used = len(end)
    elif len(taken) == images:
        taken.append("")
    cut = Context(
        tuple(reversed(taken)), context.images[len(context.images) - images :], _still(context, taken)
    )
    return cut, Dropped(len(context.images) - images, sum(map(len, ids)) - text_used)


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text alone, without those that begin or end a sequence."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _still(context: Context, taken: list[str]) -> tuple[int, int] | None:
    """Return where the question begins in what is left of it; `taken` runs from the end."""
    if context.question is None:
        return None
    after, characters = context.question
    if after >= len(taken):
        return len(taken) - 1, len(taken[-1])
    return after, min(characters, len(taken[after]))
