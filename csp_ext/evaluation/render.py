"""Draws the images of the generated world: a 4 x 4 grid of cells of 8 x 8 pixels, one per image token."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from csp_ext.evaluation.vocabulary import COLOURS, DIGITS, SHAPES

GRID = 4
CELL = 8
SIZE = GRID * CELL
CELLS = GRID * GRID

# What a cell shows: a digit, a shape or nothing.
FIRST_SHAPE = len(DIGITS)
NOTHING = FIRST_SHAPE + len(SHAPES)

# Lit segments of the digits: top, upper left, upper right, middle, lower left, lower right, bottom.
SEGMENTS = (
    "1110111",
    "0010010",
    "1011101",
    "1011011",
    "0111010",
    "1101011",
    "1101111",
    "1010010",
    "1111111",
    "1111011",
)
RGB = {
    "red": (230, 30, 30),
    "green": (30, 200, 40),
    "blue": (50, 70, 255),
    "yellow": (240, 230, 40),
    "magenta": (235, 50, 230),
    "cyan": (40, 225, 230),
    "orange": (250, 135, 20),
    "violet": (130, 70, 200),
}
DIGIT_RGB = (235, 235, 235)
NOISE = 12.0
BACKGROUND = 60


def _digit(segments: str) -> NDArray[np.bool_]:
    mask = np.zeros((CELL, CELL), bool)
    top, upper_left, upper_right, middle, lower_left, lower_right, bottom = (mark == "1" for mark in segments)
    mask[0, 1:6] |= top
    mask[3, 1:6] |= middle
    mask[6, 1:6] |= bottom
    mask[0:4, 1] |= upper_left
    mask[0:4, 5] |= upper_right
    mask[3:7, 1] |= lower_left
    mask[3:7, 5] |= lower_right
    return mask


def _shape(name: str) -> NDArray[np.bool_]:
    y, x = np.mgrid[0:7, 0:7] - 3
    distance = np.hypot(y, x)
    drawn = {
        "square": (abs(y) <= 2) & (abs(x) <= 2),
        "disk": distance <= 3.2,
        "cross": (abs(y) <= 0) | (abs(x) <= 0),
        "ring": (distance <= 3.2) & (distance > 2.0),
        "triangle": abs(x) <= (y + 3) / 2,
        "bars": (y % 2 == 1) & (abs(x) <= 3),
        "saltire": abs(y) == abs(x),
        "diamond": abs(y) + abs(x) <= 3,
    }[name]
    mask = np.zeros((CELL, CELL), bool)
    mask[:7, :7] = drawn
    return mask


@functools.cache
def _masks() -> NDArray[np.bool_]:
    """Return [kinds, 4 shifts, CELL, CELL]: every cell content, moved by 0 or 1 pixel down and right."""
    plain = [_digit(segments) for segments in SEGMENTS] + [_shape(name) for name in SHAPES]
    plain.append(np.zeros((CELL, CELL), bool))
    return np.stack(
        [np.stack([np.roll(mask, (dy, dx), (0, 1)) for dy in (0, 1) for dx in (0, 1)]) for mask in plain]
    )


@functools.cache
def _palette() -> NDArray[np.float32]:
    return np.array([*(RGB[name] for name in COLOURS), DIGIT_RGB], np.float32)


def render(
    content: NDArray[np.integer], colour: NDArray[np.integer], rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Draw images.

    Parameters
    ----------
    content : [N, 16] int
        Per cell a digit, ``FIRST_SHAPE`` plus a shape, or ``NOTHING``.
    colour : [N, 16] int
        Index of the colour of a shape; digits are near white.
    rng : numpy.random.Generator
        Draws shift, brightness and background of each cell, and the noise.

    Returns
    -------
    [N, 32, 32, 3] uint8
    """
    count = len(content)
    mask = _masks()[content, rng.integers(0, 4, content.shape)]
    ink = _palette()[np.where(content < FIRST_SHAPE, len(COLOURS), colour)]
    ink = ink * rng.uniform(0.8, 1.0, (*content.shape, 1)).astype(np.float32)
    ground = rng.integers(0, BACKGROUND, (count, 1, 3)).astype(np.float32)
    cells = np.where(mask[..., None], ink[:, :, None, None], ground[:, :, None, None])
    image = (
        cells.reshape(count, GRID, GRID, CELL, CELL, 3)
        .transpose(0, 1, 3, 2, 4, 5)
        .reshape(count, SIZE, SIZE, 3)
    )
    image = image + NOISE * rng.standard_normal(image.shape, np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
