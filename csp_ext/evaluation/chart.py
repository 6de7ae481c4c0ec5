"""Draws the score of every method against what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from csp_ext.demo.console import replacing
from csp_ext.evaluation.arms import FULL, ORACLE
from csp_ext.evaluation.tables import SUITE, Row

# Paul Tol's muted palette: it stays apart for colour-blind eyes.
COLOURS = ("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499")
MARKERS = "osD^vP*Xh<>"
OWN, OWN_COLOUR, MARKED_COLOUR = "csp", "#d62728", "0.35"


def draw(path: Path, results: Sequence[Row], title: str) -> None:
    """Write the picture, PNG.

    The full cache is a horizontal line; the random choice and the oracle, which bound the others, are grey.

    Parameters
    ----------
    path : Path
        Replaced only when the picture is complete.
    results : sequence of Row
        Those of the whole suite are drawn.
    title : str
        Above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    suite = [row for row in results if row.scope == SUITE]
    lines: dict[str, list[Row]] = {}
    for row in suite:
        lines.setdefault(row.name, []).append(row)
    figure = Figure(figsize=(8.6, 5.2), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    others = 0
    # The legend has the best on top, like the lines.
    for name, points in sorted(lines.items(), key=lambda line: -np.mean([row.mean.value for row in line[1]])):
        points = sorted(points, key=lambda row: row.kept)
        score = [100 * row.mean.value for row in points]
        if points[0].method == FULL:
            axes.axhline(score[0], color="black", linewidth=1.2, linestyle="--", label="full cache")
            continue
        style: dict[str, Any] = {"linewidth": 1.4, "markersize": 5.5}
        if name == OWN:
            style |= {"color": OWN_COLOUR, "marker": "o", "linewidth": 2.6, "zorder": 5}
        elif points[0].method in ("random", ORACLE):
            style |= {"color": MARKED_COLOUR, "linestyle": ":", "marker": "x" if name == "random" else "+"}
        else:
            style |= {"color": COLOURS[others % len(COLOURS)], "marker": MARKERS[others % len(MARKERS)]}
            others += 1
        kept = [100 * row.kept for row in points]
        errors = np.nan_to_num([100 * row.mean.error for row in points])
        axes.errorbar(kept, score, yerr=errors, capsize=2, elinewidth=0.8, label=name, **style)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=-2)
    axes.set_xlabel("tokens kept, % of what may be pruned (mean over layers and heads)")
    axes.set_ylabel("score x 100, mean over data sets (bars: standard error)")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
