"""Draws the prompt of a question token by token: what each attempt kept, and where the evidence is."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from csp_ext.demo.console import replacing
from csp_ext.demo.picture import patch_shares
from csp_ext.demo.prompts import patch_side, seen_pixels
from csp_ext.demo.questions import Attempt, Question
from csp_ext.demo.report import size
from csp_ext.demo.run import LayerKept

# The layer whose heads look up the digits: half of them put most of their attention on the digit to come.
LAYER = 1
MARK, FRAME, RIGHT, WRONG = "#ffc933", "#c2007a", "#006b3c", "#b00020"
# How much is seen of an image's token that no head keeps; the grey of such a word.
DROPPED, GREY = 0.13, 0.8
# Inches; `CHARACTER` is the width of one of the fixed-width letters at `LETTERS` points.
WIDTH, MARGIN, TOP, BLOCK = 11.6, 0.25, 0.9, 2.86
TILE, TILE_GAP, TILES_PER_ROW, NAME = 0.84, 0.07, 6, 0.2
LETTERS, LINE = 9.4, 0.188
CHARACTER = 0.602 * LETTERS / 72
IMAGE_MARK = "▦"
CAPTION_LINE = 0.18
TITLES = {"full": "Full cache", "csp": "Cross-Self Pruning", "snapkv": "SnapKV"}
DPI = 110


@dataclass(frozen=True)
class Box:
    """Where a token is drawn, in inches from the upper left."""

    left: float
    top: float
    right: float
    bottom: float

    def touches(self, other: Box) -> bool:
        """Whether `other` follows on the same line."""
        return self.top == other.top and 0 <= other.left - self.right < 2 * CHARACTER


def shares_of(attempt: Attempt, length: int) -> torch.Tensor:
    """Return the share of heads that keep each token in the layer shown, float32 [length]."""
    layers = attempt.run.layers
    return layers[min(LAYER, len(layers) - 1)].share if layers else torch.ones(length)


def tile_boxes(images: int, top: float) -> list[Box]:
    """Return where the images are drawn."""
    boxes = []
    for index in range(images):
        row, column = divmod(index, TILES_PER_ROW)
        left = MARGIN + column * (TILE + TILE_GAP)
        upper = top + row * (TILE + NAME)
        boxes.append(Box(left, upper, left + TILE, upper + TILE))
    return boxes


def word_boxes(words: list[str], left: float, right: float, top: float) -> list[Box]:
    """Return where the words are drawn, in lines from `left` to `right`."""
    boxes = []
    x, y = left, top
    for word in words:
        if x + len(word) * CHARACTER > right:
            x, y = left, y + LINE
        boxes.append(Box(x, y, x + len(word) * CHARACTER, y + LINE))
        x += (len(word) + 1) * CHARACTER
    return boxes


def cell_boxes(tiles: list[Box], side: int) -> list[Box]:
    """Return where each image token is drawn, in the order of the prompt."""
    cell = TILE / side
    return [
        Box(
            tile.left + column * cell,
            tile.top + row * cell,
            tile.left + (column + 1) * cell,
            tile.top + (row + 1) * cell,
        )
        for tile in tiles
        for row in range(side)
        for column in range(side)
    ]


def frames(evidence: list[tuple[Box, bool]]) -> list[tuple[Box, bool]]:
    """Join the boxes of evidence that stand side by side and share their fate, kept or not."""
    joined = evidence[:1]
    for (_, was), (box, kept) in pairwise(evidence):
        last = joined[-1][0]
        if was == kept and last.touches(box):
            joined[-1] = (Box(last.left, last.top, box.right, box.bottom), kept)
        else:
            joined.append((box, kept))
    return joined


def faded(pixels: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return pixels [H, W, 3] in [0, 1], each patch the nearer to white the lower its share [side, side]."""
    height, width = pixels.shape[0] // len(shares), pixels.shape[1] // len(shares)
    visible = DROPPED + (1 - DROPPED) * np.kron(shares, np.ones((height, width)))[..., None]
    return pixels * visible + 1 - visible


def draw(processor: Any, question: Question, chosen: list[int], path: Path) -> None:
    """Write the picture: one block per chosen attempt, images on the left, words on the right.

    Parameters
    ----------
    processor : ProcessorMixin
        It knows how the pixels were normalised.
    question : Question
        Answered, with images that are squares of tokens.
    chosen : list of int
        Indices of the attempts to show.
    path : Path
        Replaced only when the picture is complete.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    legend = textwrap.wrap(_legend(question), 178)
    height = TOP + BLOCK * len(chosen) + 0.2 + CAPTION_LINE * len(legend)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    sample, prompt = question.sample, question.prompt
    title = (
        f"What stays in the cache of {len(prompt.photographs)} images and the words between them, "
        "and what the model answers"
    )
    axes.text(MARGIN, 0.3, title, fontsize=14, weight="bold", va="center")
    asked = f'Asked: "{sample.question}". Right: "{sample.answer}".'
    axes.text(MARGIN, 0.58, asked, fontsize=10, va="center")
    pixels = seen_pixels(processor, prompt)
    for block, index in enumerate(chosen):
        _draw_attempt(axes, question, index, pixels, TOP + block * BLOCK)
    foot = height - 0.08
    axes.text(MARGIN, foot, "\n".join(legend), fontsize=8.5, color="0.3", va="bottom", linespacing=1.3)
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(height, 0)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower())


def _draw_attempt(axes: Any, question: Question, index: int, pixels: list[np.ndarray], top: float) -> None:
    """Draw what one attempt kept, and its answer under it."""
    attempt, prompt = question.attempts[index], question.prompt
    share = shares_of(attempt, prompt.length)
    side = patch_side(prompt)
    axes.plot((MARGIN, WIDTH - MARGIN), (top, top), color="0.8", linewidth=0.8)
    _headline(axes, question, attempt, top + 0.17)

    body = top + 0.36
    tiles = tile_boxes(len(pixels), body)
    patches = patch_shares(LayerKept(LAYER, share), prompt, side)
    for tile, image, kept, photograph in zip(tiles, pixels, patches, prompt.photographs, strict=True):
        axes.imshow(
            faded(image, kept),
            extent=(tile.left, tile.right, tile.bottom, tile.top),
            interpolation="nearest",
            aspect="auto",
        )
        middle = (tile.left + tile.right) / 2
        axes.text(
            middle, tile.bottom + 0.08, photograph.name, fontsize=7.5, color="0.35", ha="center", va="center"
        )

    left = MARGIN + TILES_PER_ROW * (TILE + TILE_GAP) + 0.12
    boxes = _draw_words(axes, question, share, left, body)
    cells = iter(cell_boxes(tiles, side))
    for position in torch.nonzero(prompt.modality == 1).flatten().tolist():
        boxes[position] = next(cells)
    _frame(axes, [(boxes[position], bool(share[position] > 0)) for position in question.sample.evidence])
    _draw_answer(axes, question, question.answers[index], top + BLOCK - 0.24)


def _headline(axes: Any, question: Question, attempt: Attempt, y: float) -> None:
    run, prompt = attempt.run, question.prompt
    name = TITLES.get(attempt.method, attempt.method)
    budget = f", budget {attempt.budget}" if run.method else ""
    axes.text(MARGIN, y, f"{name}{budget}", fontsize=12, weight="bold", va="center")
    kept = f"{run.kept_total(prompt):.0f} of {prompt.length} tokens kept, {size(run.cache_bytes)}"
    axes.text(WIDTH - MARGIN, y, kept, fontsize=10, color="0.25", ha="right", va="center")


def _draw_words(
    axes: Any, question: Question, share: torch.Tensor, left: float, top: float
) -> dict[int, Box]:
    """Draw the text; each image is one sign in it. Return where the tokens of text are."""
    image = question.prompt.modality == 1
    tokens = patch_side(question.prompt) ** 2
    # The first token of every image stands for it.
    shown = [i for i in range(len(image)) if not image[i] or not image[i - 1]]
    words = [IMAGE_MARK if image[i] else question.words[i] for i in shown]
    boxes = dict(zip(shown, word_boxes(words, left, WIDTH - MARGIN, top), strict=True))
    half = CHARACTER / 2
    for position, word in zip(shown, words, strict=True):
        box = boxes[position]
        kept = float(share[position : position + tokens].mean() if image[position] else share[position])
        marked = Box(box.left - half, box.top, box.right + half, box.bottom)
        _patch(axes, marked, facecolor=MARK, alpha=kept, edgecolor="none")
        _letters(axes, box.left, (box.top + box.bottom) / 2, word, color=str(GREY * (1 - kept)))
    return boxes


def _letters(axes: Any, x: float, y: float, word: str, scale: float = 1.0, **style: Any) -> None:
    # Half the height of a digit below the middle is the line that all words stand on.
    foot = y + 0.36 * LETTERS * scale / 72
    axes.text(x, foot, word, fontsize=LETTERS * scale, family="monospace", va="baseline", **style)


def _frame(axes: Any, evidence: list[tuple[Box, bool]]) -> None:
    for box, kept in frames(evidence):
        wide = Box(box.left - 0.025, box.top - 0.005, box.right + 0.025, box.bottom + 0.005)
        # White below the colour sets a frame off from the image around it.
        _patch(axes, wide, fill=False, edgecolor="white", linewidth=4)
        _patch(axes, wide, fill=False, edgecolor=FRAME, linewidth=2, linestyle="-" if kept else (0, (2, 1.2)))


def _patch(axes: Any, box: Box, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((box.left, box.top), box.right - box.left, box.bottom - box.top, **style))


def _draw_answer(axes: Any, question: Question, answer: str, y: float) -> None:
    """Write the answer, its wrong words underlined, and the verdict in a word and a sign."""
    right = answer == question.sample.answer
    expected = question.sample.answer.split()
    words = ["answer:", *question.shortened(answer).split(), "✓ right" if right else "✗ wrong"]
    scale = 1.25
    x = MARGIN
    for number, word in enumerate(words, start=-1):
        verdict, label = number == len(words) - 2, number < 0
        wrong = not (verdict or label) and (number >= len(expected) or word != expected[number])
        colour = "0.35" if label else RIGHT if right else WRONG if wrong or verdict else "black"
        weight = "normal" if label else "bold"
        end = x + len(word) * CHARACTER * scale
        _letters(axes, x, y, word, scale, color=colour, weight=weight)
        if wrong:
            axes.plot((x, end), (y + 0.1, y + 0.1), color=WRONG, linewidth=2)
        x = end + CHARACTER * scale


def _legend(question: Question) -> str:
    """Return how to read the picture."""
    side = patch_side(question.prompt)
    return (
        f"Layer {LAYER} of the decoder, where the digits are looked up. An image is {side} x {side} tokens, "
        f"a word is one; {IMAGE_MARK} is where an image stands in the text. The fewer heads keep a token, "
        "the fainter it is. Framed: the tokens that the answer needs, dashed where no head keeps them. One "
        "sample proves nothing, and the default seed was chosen to show a difference: docs/quality.md has "
        "the rates."
    )
