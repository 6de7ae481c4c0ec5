"""The questions: each names what it wants, and the answer spells it out, naming it again.

``ask photo ada and code ben say`` is answered by ``photo ada 4 1 7 2 and code ben 9 0 3 5``. Mode S ends the
prompt there, so no token that needs the context comes out of the unpruned prefill; mode A gives the answer's
first words in the prompt, so the first digit does. A question about a link, ``ask link ada say``, is answered
by ``link ada photo ben 4 1 7 2``: no word of the question names what the digits are looked up by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from csp_ext.evaluation import render
from csp_ext.evaluation.vocabulary import DIGITS, EOS, ID, IMAGE, NAMES, decode, first
from csp_ext.evaluation.world import (
    DIGITS_PER_NUMBER,
    Contexts,
    Ints,
    Layout,
    linked_sources,
    sample_contexts,
)

TASKS: dict[str, tuple[str, ...]] = {
    "code": ("code",),
    "photo": ("photo",),
    "pin": ("pin",),
    "photo_photo": ("photo", "photo"),
    "photo_code": ("photo", "code"),
    "code_photo": ("code", "photo"),
    "triple": ("photo", "code", "pin"),
    "link_photo": ("link photo",),
    "link_code": ("link code",),
}
ABOUT = {
    "code": "a text needle among images",
    "photo": "an image needle",
    "pin": "what the assistant said in an earlier turn",
    "photo_photo": "the numbers of two images",
    "photo_code": "an image, then a text",
    "code_photo": "a text, then an image",
    "triple": "an image, a text and an earlier turn, in any order",
    "link_photo": "a text, and the image that only this text names",
    "link_code": "a text, and another text that only the first names",
}
SHARE_OF_ONE_NAME = 0.25


@dataclass(frozen=True)
class Questions:
    """One question of the same task to each context of a batch.

    Attributes
    ----------
    task : str
        Key of ``TASKS``.
    tokens : [B, L] int64
        Question, answer and end of sequence.
    answer : int
        Where the answer begins in `tokens`.
    evidence : [B, E] int64
        Positions in the context of the tokens that the answer needs.
    """

    task: str
    tokens: Ints
    answer: int
    evidence: Ints


def ask(rng: np.random.Generator, contexts: Contexts, task: str) -> Questions:
    """Draw one question per context."""
    sources = TASKS[task]
    order = np.tile(np.arange(len(sources)), (len(contexts.tokens), 1))
    if task == "triple":
        order = rng.permuted(order, axis=1)
    return _join(contexts, task, order, _pick(rng, contexts, sources))


def _pick(rng: np.random.Generator, contexts: Contexts, sources: tuple[str, ...]) -> list[Ints]:
    """Choose a block for each reference; equal sources get different blocks, others share a name at times."""
    batch = len(contexts.tokens)
    picks: list[Ints] = []
    for at, source in enumerate(sources):
        if source.startswith("link "):
            kinds = linked_sources(contexts.layout.links)
            leading = [link for link, kind in enumerate(kinds) if source == f"link {kind}"]
            picks.append(rng.choice(leading, batch))
            continue
        count = contexts.layout.counts[source]
        if source in sources[:at]:
            picks.append((picks[0] + rng.integers(1, count, batch)) % count)
        else:
            picks.append(rng.integers(0, count, batch))
    if len(sources) == 2 and sources[0] != sources[1]:
        wanted = np.take_along_axis(contexts.names[sources[0]], picks[0][:, None], 1)
        same = contexts.names[sources[1]] == wanted
        share = same.any(1) & (rng.random(batch) < SHARE_OF_ONE_NAME)
        picks[1] = np.where(share, same.argmax(1), picks[1])
    return picks


def _reference(contexts: Contexts, source: str, pick: Ints) -> tuple[Ints, Ints, Ints]:
    """Return what names a block in the question, what the answer says of it, and where that stands."""
    rows = np.arange(len(pick))
    if source.startswith("link "):
        link, source = source.split()
        asked = np.stack((np.full(len(pick), ID[link]), contexts.names[link][rows, pick] + first(NAMES)), 1)
        where = contexts.positions[link][rows, pick]
        _, told, digits = _reference(contexts, source, contexts.targets[rows, pick])
        return asked, np.concatenate((asked, told), 1), np.concatenate((where, digits), 1)
    asked = np.stack((np.full(len(pick), ID[source]), contexts.names[source][rows, pick] + first(NAMES)), 1)
    number = contexts.numbers[source][rows, pick] + first(DIGITS)
    return asked, np.concatenate((asked, number), 1), contexts.positions[source][rows, pick]


def _join(contexts: Contexts, task: str, order: Ints, picks: list[Ints]) -> Questions:
    rows = np.arange(len(contexts.tokens))
    parts = [_reference(contexts, s, pick) for s, pick in zip(TASKS[task], picks, strict=True)]
    # [B, references, ...], then in the order of each row's question
    asked, told, where = (
        np.take_along_axis(np.stack(kind, 1), order[..., None], 1) for kind in zip(*parts, strict=True)
    )
    question, answer = [_column(rows, "ask")], []
    for at in range(len(parts)):
        link = [_column(rows, "and")] if at else []
        question += [*link, asked[:, at]]
        answer += [*link, told[:, at]]
    question.append(_column(rows, "say"))
    tokens = np.concatenate([*question, *answer, np.full((len(rows), 1), EOS)], 1)
    return Questions(task, tokens, sum(part.shape[1] for part in question), where.reshape(len(rows), -1))


def _column(rows: Ints, word: str) -> Ints:
    return np.full((len(rows), 1), ID[word])


@dataclass(frozen=True)
class Sample:
    """One question to one context, as text and images.

    Attributes
    ----------
    task : str
        Key of ``TASKS``.
    mode : str
        "S" or "A".
    context, question : str
        The prompt is both with a space between; the context has one ``<image>`` per image.
    answer : str
        What the model should generate, without the end of the sequence.
    images : list of PIL.Image.Image
        In the order of their ``<image>``.
    evidence : list of int
        Positions in the expanded prompt, where the tokens that the answer needs stand.
    """

    task: str
    mode: str
    context: str
    question: str
    answer: str
    images: list[Any]
    evidence: list[int]

    @property
    def prompt(self) -> str:
        """Context and question."""
        return f"{self.context} {self.question}"


SUITE_LAYOUT = Layout(photos=12, codes=6, pins=4, links=6, fillers=24)


def make_samples(
    task: str, count: int, seed: int, *, mode: str = "S", layout: Layout = SUITE_LAYOUT
) -> list[Sample]:
    """Draw samples of a task, each with its own context.

    Parameters
    ----------
    task : str
        Key of ``TASKS``.
    count : int
        Samples to draw.
    seed : int
        The same seed gives the same samples.
    mode : str
        "S": the answer begins with words that need no context; "A": with the first digit or colour.
    layout : Layout
        Size of the context.
    """
    from PIL import Image

    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if mode not in ("S", "A"):
        raise ValueError(f"mode must be S or A, got {mode!r}")
    rng = np.random.default_rng([seed, list(TASKS).index(task)])
    contexts = sample_contexts(rng, layout, count)
    questions = ask(rng, contexts, task)
    begin = questions.answer
    if mode == "A":
        begin += 2
    samples = []
    for b in range(count):
        # Without the beginning of the sequence, which the tokenizer adds; an image is one word.
        tokens = [int(t) for t in contexts.tokens[b, 1:]]
        text: list[int] = []
        run = 0
        for token in tokens:
            run = (run + 1) % render.CELLS if token == IMAGE else 0
            if token != IMAGE or run == 1:
                text.append(token)
        asked = questions.tokens[b].tolist()
        samples.append(
            Sample(
                task=task,
                mode=mode,
                context=decode(text),
                question=decode(asked[:begin]),
                answer=decode(asked[begin:-1]),
                images=[Image.fromarray(image) for image in contexts.pixels[b]],
                evidence=questions.evidence[b].tolist(),
            )
        )
    return samples


__all__ = [
    "ABOUT",
    "DIGITS_PER_NUMBER",
    "SUITE_LAYOUT",
    "TASKS",
    "Questions",
    "Sample",
    "ask",
    "make_samples",
]
