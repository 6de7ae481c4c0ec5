"""Teaches the vision tower to say what a cell shows, in the decoder's own embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csp_ext.evaluation import render
from csp_ext.evaluation.vocabulary import COLOURS, DIGITS, ID, PAD, SHAPES, first
from csp_ext.evaluation.world import Ints, sample_cells, sample_numbers

BATCH = 128
LEARNING_RATE = 4e-3
WARM_UP = 0.1


def pixel_values(images: NDArray[np.uint8]) -> Tensor:
    """Return [N, 3, 32, 32] float32 in -1..1, as the image processor makes it from the same pixels."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def image_tokens(model: Any, images: NDArray[np.uint8]) -> Tensor:
    """Return [N, 16, hidden], what the decoder gets for images [N, 32, 32, 3]."""
    features = model.vision_tower(pixel_values(images), output_hidden_states=True).hidden_states[-1]
    return model.multi_modal_projector(features[:, 1:])


def captions(embedding: Tensor, head: Tensor, content: Ints, colour: Ints) -> Tensor:
    """Return [N, 16, hidden]: the words for what is in each cell, its colour, row and column, summed.

    Parameters
    ----------
    embedding, head : [words, hidden]
        Of the untrained decoder: what a word adds to the part that all embeddings share is its row of `head`.
    content, colour : [N, 16]
        The cells.
    """
    shown = [ID[word] for word in (*DIGITS, *SHAPES, "blank")]
    cell = torch.arange(render.CELLS)
    target = embedding[PAD] - head[PAD] + head[torch.tensor(shown)[torch.from_numpy(content)]]
    target = target + head[ID["row1"] + cell // render.GRID] + head[ID["col1"] + cell % render.GRID]
    tint = torch.from_numpy(colour)
    return target + torch.where(tint[..., None] >= 0, head[first(COLOURS) + tint.clamp(min=0)], 0.0)


def align(model: Any, seed: int, steps: int, report: Callable[[float], None]) -> float:
    """Train the vision tower and the projector on captions of single cells.

    Parameters
    ----------
    model : LlavaModel with its `lm_head`
        Of :func:`csp_ext.evaluation.architecture.build_model`, untrained.
    seed : int
        Of the images.
    steps : int
        Batches of 128 images.
    report : callable
        Gets the loss after every step.

    Returns
    -------
    float
        The share of fresh cells for which the nearest content is the right one.
    """
    rng = np.random.default_rng([seed, 1])
    embedding = model.model.language_model.embed_tokens.weight.detach()
    head = model.lm_head.weight.detach()
    weights = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.01)
    warm = max(1, int(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 1 - max(0, step - warm) / max(1, steps - warm))
    )
    for content, colour, images in _batches(rng, steps):
        target = captions(embedding, head, content, colour)
        loss = (image_tokens(model.model, images) - target).square().sum(-1).mean()
        optimizer.zero_grad()
        # The last vision norm and the class token's path get no gradient; AdamW leaves them.
        loss.backward()
        optimizer.step()
        schedule.step()
        report(float(loss.detach()))
    with torch.no_grad():
        ((content, _, images),) = _batches(rng, 1)
        shown = head[[ID[word] for word in (*DIGITS, *SHAPES, "blank")]]
        nearest = (image_tokens(model.model, images) @ shown.T).argmax(-1)
    return float((nearest == torch.from_numpy(content)).float().mean())


def _batches(rng: np.random.Generator, count: int) -> Iterator[tuple[Ints, Ints, NDArray[np.uint8]]]:
    for _ in range(count):
        content, colour, _ = sample_cells(rng, sample_numbers(rng, BATCH))
        yield content, colour, render.render(content, colour, rng)
