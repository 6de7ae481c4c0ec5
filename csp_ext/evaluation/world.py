"""The generated world: photos that show numbers and objects, codes in text, pins from an earlier turn.

Links say of a name where its number is: in the photo, or the code, of another name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from csp_ext.evaluation import render
from csp_ext.evaluation.vocabulary import BOS, COLOURS, DIGITS, FILLERS, ID, IMAGE, NAMES, SHAPES, first

Ints = NDArray[np.int64]

DIGITS_PER_NUMBER = 4
OBJECTS = 3
PHOTO = (ID["photo"], -1, *(IMAGE,) * render.CELLS)
CODE = (ID["code"], -1, *(-2,) * DIGITS_PER_NUMBER)
# An exchange earlier in the conversation: the user asked for a pin, the assistant gave it.
PIN = (ID["ask"], ID["pin"], -1, ID["say"], ID["pin"], -1, *(-2,) * DIGITS_PER_NUMBER)
LINK = (ID["link"], -1, -2, -2)
BLOCKS = {"photo": PHOTO, "code": CODE, "pin": PIN, "link": LINK}
NUMBERED = ("photo", "code", "pin")
# What links lead to, in turn.
LINKED = ("photo", "code")


@dataclass(frozen=True)
class Layout:
    """How much a context holds.

    Attributes
    ----------
    photos, codes, pins, links : int
        Images, facts in text, earlier exchanges, and references to another name; at most 24 each.
    fillers : int
        Words without meaning, strewn between them.
    """

    photos: int
    codes: int
    pins: int
    links: int
    fillers: int

    @property
    def counts(self) -> dict[str, int]:
        """Blocks per source."""
        return {"photo": self.photos, "code": self.codes, "pin": self.pins, "link": self.links}

    @property
    def length(self) -> int:
        """Tokens of a context, images expanded, the beginning of the sequence included."""
        return 1 + self.fillers + sum(len(BLOCKS[source]) * count for source, count in self.counts.items())


@dataclass(frozen=True)
class Contexts:
    """A batch of contexts with one layout.

    Attributes
    ----------
    layout : Layout
        Of every context.
    tokens : [B, L] int64
        Images expanded to one ``<image>`` per cell.
    content, colour : [B, photos, 16] int64
        The cells, see :func:`csp_ext.evaluation.render.render`; colour is -1 where there is no object.
    pixels : [B, photos, 32, 32, 3] uint8
        In the order of the photos' names, which is also their order in the text.
    names : dict of [B, count] int64
        Per source, an index into ``NAMES`` for each block.
    numbers : dict of [B, count, 4] int64
        Per source but links, the digits of each block; they differ within a number.
    targets : [B, links] int64
        The block each link leads to, of the source ``LINKED[link % 2]``.
    positions : dict of [B, count, 4] int64
        Per source, where those digits stand in `tokens`; for links [B, count, 2], the source and the name.
    image_starts : [B, photos] int64
        Where each image's first token stands.
    """

    layout: Layout
    tokens: Ints
    content: Ints
    colour: Ints
    pixels: NDArray[np.uint8]
    names: dict[str, Ints]
    numbers: dict[str, Ints]
    targets: Ints
    positions: dict[str, Ints]
    image_starts: Ints


def sample_cells(rng: np.random.Generator, numbers: Ints) -> tuple[Ints, Ints, Ints]:
    """Draw one image per number: it fills a row, and three objects stand in other cells.

    Returns
    -------
    content, colour : [N, 16] int64
        The colour is -1 in cells without an object.
    row : [N] int64
        Where the number stands.
    """
    count = len(numbers)
    content = np.full((count, render.CELLS), render.NOTHING)
    colour = np.full((count, render.CELLS), -1)
    image = np.arange(count)[:, None]
    row = rng.integers(0, render.GRID, count)
    content[image, row[:, None] * render.GRID + np.arange(render.GRID)] = numbers
    free = rng.permuted(np.tile(np.arange(render.CELLS - render.GRID), (count, 1)), axis=1)[:, :OBJECTS]
    cells = free + render.GRID * (free >= row[:, None] * render.GRID)
    shapes = rng.permuted(np.tile(np.arange(len(SHAPES)), (count, 1)), axis=1)[:, :OBJECTS]
    content[image, cells] = render.FIRST_SHAPE + shapes
    colour[image, cells] = rng.integers(0, len(COLOURS), (count, OBJECTS))
    return content, colour, row


def sample_numbers(rng: np.random.Generator, count: int) -> Ints:
    """Draw [count, 4] digits, different within a row."""
    return rng.permuted(np.tile(np.arange(len(DIGITS)), (count, 1)), axis=1)[:, :DIGITS_PER_NUMBER]


def linked_sources(count: int) -> list[str]:
    """Return the source that each of `count` links leads to."""
    return [LINKED[link % len(LINKED)] for link in range(count)]


def _told(names: dict[str, Ints], targets: Ints) -> Ints:
    """Return [B, links, 2], the source and the name that each link tells."""
    rows = np.arange(len(targets))
    told = np.empty((*targets.shape, 2), np.int64)
    for link, source in enumerate(linked_sources(targets.shape[1])):
        told[:, link, 0] = ID[source]
        told[:, link, 1] = names[source][rows, targets[:, link]] + first(NAMES)
    return told


def sample_contexts(rng: np.random.Generator, layout: Layout, batch: int) -> Contexts:
    """Draw `batch` contexts; blocks and fillers come in random order.

    Parameters
    ----------
    rng : numpy.random.Generator
        The only source of randomness.
    layout : Layout
        Shared by the batch, so all contexts have the same length.
    batch : int
        Contexts to draw.
    """
    counts = layout.counts
    names = {
        s: rng.permuted(np.tile(np.arange(len(NAMES)), (batch, 1)), axis=1)[:, :n] for s, n in counts.items()
    }
    numbers = {
        s: sample_numbers(rng, batch * counts[s]).reshape(batch, counts[s], DIGITS_PER_NUMBER)
        for s in NUMBERED
    }
    targets = np.stack([rng.integers(0, counts[s], batch) for s in linked_sources(layout.links)], 1)
    told = {s: numbers[s] + first(DIGITS) for s in NUMBERED} | {"link": _told(names, targets)}
    content, colour, row = sample_cells(rng, numbers["photo"].reshape(-1, DIGITS_PER_NUMBER))
    pixels = render.render(content, colour, rng)

    kinds = [source for source, count in counts.items() for _ in range(count)]
    order = rng.permuted(np.tile(np.arange(len(kinds) + layout.fillers), (batch, 1)), axis=1)
    fillers = rng.integers(0, len(FILLERS), (batch, layout.fillers)) + first(FILLERS)
    tokens = np.empty((batch, layout.length), np.int64)
    starts = {source: np.empty((batch, count), np.int64) for source, count in counts.items()}
    for b in range(batch):
        text = [BOS]
        used = dict.fromkeys(counts, 0)
        for piece in order[b]:
            if piece >= len(kinds):
                text.append(fillers[b, piece - len(kinds)])
                continue
            source = kinds[piece]
            index = used[source]
            used[source] += 1
            starts[source][b, index] = len(text)
            facts = iter(told[source][b, index])
            name = names[source][b, index] + first(NAMES)
            text += [name if t == -1 else next(facts) if t == -2 else t for t in BLOCKS[source]]
        tokens[b] = text

    step = np.arange(DIGITS_PER_NUMBER)
    image_starts = starts["photo"] + 2
    row = row.reshape(batch, layout.photos)
    positions = {s: starts[s][..., None] + len(BLOCKS[s]) - DIGITS_PER_NUMBER + step for s in ("code", "pin")}
    positions["link"] = starts["link"][..., None] + len(LINK) - 2 + np.arange(2)
    positions["photo"] = image_starts[..., None] + render.GRID * row[..., None] + step
    cells = (batch, layout.photos, render.CELLS)
    return Contexts(
        layout=layout,
        tokens=tokens,
        content=content.reshape(cells),
        colour=colour.reshape(cells),
        pixels=pixels.reshape(batch, layout.photos, render.SIZE, render.SIZE, 3),
        names=names,
        numbers=numbers,
        targets=targets,
        positions=positions,
        image_starts=image_starts,
    )
