"""Draws which patches of each photograph every layer keeps."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from csp_ext.demo.console import replacing
from csp_ext.demo.prompts import Prompt, patch_side, seen_pixels
from csp_ext.demo.run import LayerKept, Run

SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg")
MOST_LAYERS = 8
SHADE = np.array([0.09, 0.10, 0.13])  # the dark that patches fade into
DROPPED, KEPT_BY_ONE = 0.25, 0.40  # how much of a patch shows that no head keeps, or nearly none


def chosen_layers(layers: list[LayerKept]) -> list[LayerKept]:
    """Return at most eight layers, evenly spread, the first and the last among them."""
    if len(layers) <= MOST_LAYERS:
        return layers
    return [layers[round(i * (len(layers) - 1) / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS)]


def patch_shares(layer: LayerKept, prompt: Prompt, side: int) -> np.ndarray:
    """Return the share of heads that keep each patch, float32 [images, side, side]."""
    shares = layer.share[prompt.modality == 1].numpy()
    return shares.reshape(len(prompt.photographs), side, side)


def fade(pixels: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return pixels [H, W, 3] in [0, 1] with every patch as visible as its share [side, side] of heads."""
    side, (height, width) = len(shares), pixels.shape[:2]
    rows, columns = np.arange(height) * side // height, np.arange(width) * side // width
    share = shares[rows][:, columns, None]
    # Grey tells a dropped patch from one that is merely dark.
    shown = np.where(share > 0, pixels, pixels.mean(-1, keepdims=True))
    visible = np.where(share > 0, KEPT_BY_ONE + (1 - KEPT_BY_ONE) * share, DROPPED)
    return shown * visible + SHADE * (1 - visible)


def draw(processor: Any, prompt: Prompt, run: Run, path: Path, model: str) -> None:
    """Write the picture: a row per photograph, a column per layer, the original first.

    Parameters
    ----------
    processor : ProcessorMixin
        It knows how the pixels were normalised.
    prompt : Prompt
        Its images must be squares of patches, see :func:`csp_ext.demo.prompts.why_no_patches`.
    run : Run
        A pruned one.
    path : Path
        Replaced only when the picture is complete.
    model : str
        What the picture calls the model.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = patch_side(prompt)
    layers = chosen_layers(run.layers)
    pixels = seen_pixels(processor, prompt)
    rows, columns = len(pixels), 1 + len(layers)
    left, right, top = 0.45, 0.15, 1.05
    tile = max(1.9, 8 / columns)
    width = left + tile * columns + right
    legend = textwrap.wrap(_legend(prompt, run, len(layers)), int(16.5 * width))
    bottom = 0.22 + 0.15 * len(legend)
    height = top + tile * rows + bottom
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        rows,
        columns,
        left=left / width,
        right=1 - right / width,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=0.04,
        hspace=0.04,
    )
    kept = [patch_shares(layer, prompt, side) for layer in layers]
    for row, image in enumerate(pixels):
        for column in range(columns):
            axes = figure.add_subplot(grid[row, column])
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if column == 0:
                axes.imshow(image)
                axes.set_ylabel(prompt.photographs[row].name, fontsize=10)
                if row == 0:
                    axes.set_title("what the model sees", fontsize=9)
                continue
            shares = kept[column - 1][row]
            axes.imshow(fade(image, shares))
            axes.text(
                0.97,
                0.03,
                f"{shares.mean():.0%}",
                transform=axes.transAxes,
                ha="right",
                va="bottom",
                fontsize=8,
                color="white",
                bbox={"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 1.5},
            )
            if row == 0:
                axes.set_title(f"layer {layers[column - 1].layer}", fontsize=9)
    _headline(figure, prompt, run, model, top / height)
    figure.text(0.5, 0.08 / height, "\n".join(legend), ha="center", va="bottom", fontsize=8, color="0.35")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower())


def _headline(figure: Any, prompt: Prompt, run: Run, model: str, top: float) -> None:
    """Say what was kept, in the upper `top` of the figure."""
    title = (
        f"Cross-Self Pruning, budget {run.name}: {run.kept_total(prompt):.0f} of {prompt.length} tokens kept"
    )
    counts = (
        f"{model}: {run.kept(prompt, 1):.0f} of {prompt.image_tokens} image tokens, "
        f"{run.kept(prompt, 0):.0f} of {prompt.text_tokens} text tokens (means over layers and heads)"
    )
    figure.text(0.5, 1 - top * 0.16, title, ha="center", va="top", fontsize=13, weight="bold")
    figure.text(0.5, 1 - top * 0.46, counts, ha="center", va="top", fontsize=9.5, color="0.25")


def _legend(prompt: Prompt, run: Run, shown: int) -> str:
    """Return how to read the tiles."""
    side = patch_side(prompt)
    layers = "" if shown == len(run.layers) else f" {shown} of {len(run.layers)} layers are shown."
    return (
        f"A patch ({side} x {side} per image) is as bright as the share of heads that keep it; "
        f"grey: kept by none. The number is the mean share of patches kept.{layers}"
    )
