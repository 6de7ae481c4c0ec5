"""Figures 1, 3 and 4: how self and cross attention weights are distributed, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from csp_ext.analysis.attention import CROSS, SELF
from csp_ext.analysis.density import density
from csp_ext.analysis.plots import Line, Panel, draw_heat, draw_panels
from csp_ext.demo.console import UserError
from csp_ext.evaluation.encoding import Encoder
from csp_ext.paper.request import Finding, Request, Tell, percent
from csp_ext.paper.weights import Weights, collect, divergence, summary

GRID = np.linspace(-10, 0, 301)
ALL = "all data sets"
ABOUT_JSD = (
    "JSD: Jensen-Shannon divergence between the self and the cross weights of a head, in bits, 0 for equal "
    "distributions and 1 for disjoint ones; over histograms of the weights' logarithms, 10 bins a decade."
)


def _collected(request: Request, tell: Tell) -> tuple[Weights, list[str]]:
    (subject,) = request.subjects
    settings = request.settings
    datasets = [dataset for of_seed in request.datasets.values() for dataset in of_seed]
    total, done = sum(len(dataset.samples) for dataset in datasets), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        tell(done, total)

    encoder = Encoder(subject.model, subject.processor, settings.template, settings.context_len)
    weights = collect(
        subject.model,
        encoder,
        datasets,
        window=request.window,
        batch_image=settings.batch_images,
        progress=advance,
    )
    if not weights.counts:
        raise UserError(f"no sample can be used: {weights.problems[0]}")
    notes = [
        f"Attention weights of the observation window: {_window(request.window)}. A softmax over all keys "
        "that a query sees, over the full cache; self: query and key of one modality, cross: of two.",
        request.asked(weights.prompts),
    ]
    return weights, notes


def _window(window: float | int | str) -> str:
    if isinstance(window, str):
        return "the text after the last image, at most its last 64 tokens"
    if isinstance(window, float):
        return f"the last {percent(window)} of a batch's longest prompt"
    return f"the last {window} tokens"


def fig1(request: Request, tell: Tell) -> Finding:
    """Return the densities of self and cross weights, of all data sets and of each."""
    weights, notes = _collected(request, tell)
    shown = {ALL: weights.total, **weights.counts} if len(weights.counts) > 1 else weights.counts
    rows, records = [], []
    for name, counts in shown.items():
        found = summary(counts)
        rows.append(
            [
                name,
                f"{found.pairs[SELF]:,}",
                f"{found.pairs[CROSS]:,}",
                f"{found.mean[SELF]:.2e}",
                f"{found.mean[CROSS]:.2e}",
                f"{found.cross_share:.1%}",
                f"{found.bits:.4f}",
            ]
        )
        records.append(
            {
                "dataset": name,
                "self_weights": found.pairs[SELF],
                "cross_weights": found.pairs[CROSS],
                "self_mean": found.mean[SELF],
                "cross_mean": found.mean[CROSS],
                "cross_share": found.cross_share,
                "jsd_bits": found.bits,
            }
        )
    title = "Density of self and cross attention weights"
    kernels = "Gaussian kernels on the decimal logarithm, all layers and heads."
    caption = f"{request.subjects[0].name}. {notes[0]} {kernels}"

    def draw(path: Path) -> None:
        panels = [Panel(name, "log10 of the weight", "density", _densities(c)) for name, c in shown.items()]
        draw_panels(panels, path, title, caption, markers=False)

    headers = ["data set", "self weights", "cross weights", "self mean", "cross mean", "cross share", "JSD"]
    return Finding(
        title, headers, rows, records, draw, [*notes, "cross share: of all attention; JSD in bits."]
    )


def _densities(counts: Tensor) -> list[Line]:
    both = counts.sum((0, 1)).numpy()
    return [Line(name, GRID, density(both[at], GRID)) for at, name in ((SELF, "self"), (CROSS, "cross"))]


def fig3(request: Request, tell: Tell) -> Finding:
    """Return the divergence of each layer."""
    weights, notes = _collected(request, tell)
    found = divergence(weights.total)
    layers = range(len(found.mean))
    columns = ("mean", "low", "high", "pooled")
    records = [
        {"layer": at, **{f"jsd_{name}": float(getattr(found, name)[at]) for name in columns}} for at in layers
    ]
    rows = [[str(r["layer"]), *(f"{r[f'jsd_{name}']:.4f}" for name in columns)] for r in records]
    title = "Divergence of self and cross attention by layer"
    line = Line(
        "mean over the heads, from the least to the greatest", layers, found.mean, found.low, found.high
    )
    pooled = Line("all heads' weights together", layers, found.pooled)
    caption = f"{request.subjects[0].name}. {notes[0]}"
    step = math.ceil(len(layers) / 16)

    def draw(path: Path) -> None:
        panel = Panel("", "layer", "JSD, bits", [line, pooled], ticks=layers[::step], from_zero=True)
        draw_panels([panel], path, title, caption)

    headers = ["layer", "JSD", "least head", "greatest head", "heads together"]
    return Finding(title, headers, rows, records, draw, [*notes, ABOUT_JSD])


def fig4(request: Request, tell: Tell) -> Finding:
    """Return the divergence of each layer on each data set."""
    weights, notes = _collected(request, tell)
    names: Sequence[str] = list(weights.counts)
    values = np.stack([divergence(counts).mean for counts in weights.counts.values()], axis=1)
    records = [
        {"layer": layer, "dataset": name, "jsd": float(values[layer, at])}
        for layer in range(len(values))
        for at, name in enumerate(names)
    ]
    rows = [[str(layer), *(f"{value:.4f}" for value in of_layer)] for layer, of_layer in enumerate(values)]
    title = "Divergence of self and cross attention by layer and data set"
    caption = f"{request.subjects[0].name}, mean over the heads. {notes[0]}"

    def draw(path: Path) -> None:
        labels = ("layer", "data set", "JSD, bits")
        draw_heat(values, [str(layer) for layer in range(len(values))], names, path, title, labels, caption)

    return Finding(
        title, ["layer", *names], rows, records, draw, [*notes, ABOUT_JSD, "The mean over the heads."]
    )
