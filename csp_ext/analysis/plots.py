"""Plots in one small style: panels of lines, rows of dots, heat maps."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from csp_ext.demo.console import replacing

# Okabe and Ito's colours, told apart by the colour-blind; black for references. What comes after the last of
# them begins anew, hollow and dashed.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F")
DASHES = ("--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "savefig.dpi": 150,
}


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes
    ----------
    name : str
        In the legend; the same name has the same colour in every panel.
    x, y : array_like
        [N].
    low, high : array_like, optional
        [N], the edges of a band around it.
    reference : bool
        Drawn in black, dashed or dotted and without markers.
    """

    name: str
    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    reference: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes; `ticks` are the places on x that get a label."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    ticks: Sequence[float] | None = None
    from_zero: bool = False


def draw_panels(
    panels: Sequence[Panel],
    path: Path,
    title: str,
    note: str,
    *,
    markers: bool = True,
    columns: int | None = None,
) -> None:
    """Draw panels of lines with one legend.

    Parameters
    ----------
    panels : sequence of Panel
        All of the same kind.
    path : Path
        A PNG file, replaced only when the picture is complete.
    title, note : str
        Above and below.
    markers : bool
        Whether a point is marked.
    columns : int, optional
        How many stand side by side; default: at most four.
    """
    columns = columns or min(len(panels), 3 if len(panels) in (5, 6, 9) else 4)
    rows = math.ceil(len(panels) / columns)
    lines = [line for panel in panels for line in panel.lines]
    names = list(dict.fromkeys(line.name for line in lines))
    references = list(dict.fromkeys(line.name for line in lines if line.reference))
    coloured = [name for name in names if name not in references]
    with _sheet(max(6.4, 3.1 * columns), 2.6 * rows, path, title, note, names) as (figure, legend):
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        handles: dict[str, Any] = {}
        for order, (place, panel) in enumerate(zip(axes, panels, strict=False)):
            for line in panel.lines:
                at = (references if line.reference else coloured).index(line.name)
                handles.setdefault(line.name, _draw_line(place, line, at, markers))
            place.set_title(panel.title)
            place.set_xlabel(panel.x)
            if order % columns == 0 or panel.y != panels[order - order % columns].y:
                place.set_ylabel(panel.y)
            if panel.ticks is not None:
                place.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
            if panel.from_zero:
                # Markers at zero stay whole.
                place.set_ylim(bottom=-0.03 * place.get_ylim()[1])
        for place in axes[len(panels) :]:
            place.set_visible(False)
        legend([handles[name] for name in names])


def _draw_line(place: Any, line: Line, at: int, markers: bool) -> Any:
    if line.reference:
        dashes = DASHES[at % len(DASHES)]
        (handle,) = place.plot(line.x, line.y, color="black", linestyle=dashes, linewidth=1.2)
        return handle
    look = _look(at) if markers else {"color": COLOURS[at % len(COLOURS)]}
    solid = "-" if at < len(COLOURS) else (0, (4, 1.5))
    (handle,) = place.plot(line.x, line.y, linewidth=1.5, linestyle=solid, **look)
    if line.low is not None and line.high is not None:
        place.fill_between(line.x, line.low, line.high, color=look["color"], alpha=0.15, linewidth=0)
    return handle


def _look(at: int) -> dict[str, Any]:
    """Return colour and marker of the series with this number."""
    colour, marker = COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)]
    face = colour if at < len(COLOURS) else "white"
    return {"color": colour, "marker": marker, "markersize": 4.5, "markerfacecolor": face}


@dataclass(frozen=True)
class Dots:
    """One series of :func:`draw_dots`: a value and its standard error per row, NaN where there is none."""

    name: str
    values: ArrayLike
    errors: ArrayLike
    reference: bool = False


def draw_dots(rows: Sequence[str], series: Sequence[Dots], path: Path, title: str, x: str, note: str) -> None:
    """Draw a dot with its standard error per row and series, the rows from top to bottom."""
    step = 0.72 / max(3, len(series) - 1)
    height = 0.8 + len(rows) * max(0.34, 0.15 * len(series))
    with _sheet(7.2, height, path, title, note, [dots.name for dots in series]) as (figure, legend):
        place = figure.subplots()
        place.grid(visible=False, axis="y")
        coloured = [dots.name for dots in series if not dots.reference]
        handles = []
        for order, dots in enumerate(series):
            reference = {"color": "black", "marker": "|", "markersize": 9}
            handle, *_ = place.errorbar(
                np.asarray(dots.values, dtype=float),
                np.arange(len(rows)) + step * (order - (len(series) - 1) / 2),
                xerr=np.asarray(dots.errors, dtype=float),
                linestyle="none",
                elinewidth=1,
                **(reference if dots.reference else _look(coloured.index(dots.name))),
            )
            handles.append(handle)
        for row in range(1, len(rows)):
            place.axhline(row - 0.5, color="0.85", linewidth=0.8)
        place.set_yticks(range(len(rows)), rows)
        place.set_ylim(len(rows) - 0.5, -0.5)
        place.set_xlabel(x)
        legend(handles)


def draw_heat(
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    path: Path,
    title: str,
    labels: tuple[str, str, str],
    note: str,
) -> None:
    """Draw numbers as colours, and as figures where they fit.

    Parameters
    ----------
    values : array_like
        [rows, columns]; NaN stays white.
    rows, columns : sequence of str
        Names of the ticks.
    path, title, note
        As in :func:`draw_panels`.
    labels : tuple of str
        Of the rows, the columns and the colours.
    """
    shown = np.asarray(values, dtype=float)
    width, height = max(6.0, 2.4 + 0.72 * len(columns)), max(2.6, 1.3 + 0.3 * len(rows))
    with _sheet(width, height, path, title, note, []) as (figure, _):
        place = figure.subplots()
        place.grid(visible=False)
        image = place.imshow(shown, cmap="cividis", aspect="auto")
        place.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
        place.set_yticks(range(len(rows)), rows)
        place.set_ylabel(labels[0])
        place.set_xlabel(labels[1])
        figure.colorbar(image, label=labels[2])
        low, high = np.nanmin(shown), np.nanmax(shown)
        digits = 2 if high >= 0.1 else 3
        for row, column in np.argwhere(~np.isnan(shown)):
            bright = shown[row, column] > (low + high) / 2
            place.text(
                column,
                row,
                f"{shown[row, column]:.{digits}f}",
                ha="center",
                va="center",
                fontsize=7.5,
                color="black" if bright else "white",
            )


@contextmanager
def _sheet(
    width: float, height: float, path: Path, title: str, note: str, names: Sequence[str]
) -> Iterator[tuple[Any, Callable[[Sequence[Any]], None]]]:
    """Give a figure, and what puts the handles of `names` into its legend; write it when the block succeeds.

    Size in inches, without title, legend and note.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heading, said = textwrap.wrap(title, int(11.5 * width)), textwrap.wrap(note, int(15.5 * width))
    columns = max(1, min(len(names), int(width / (0.75 + 0.075 * max(map(len, names), default=0)))))
    above, below = 0.2 + 0.19 * len(heading), 0.15 + 0.15 * len(said)
    beside = 0.1 + 0.2 * math.ceil(len(names) / columns) if names else 0.0
    total = above + height + beside + below
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, total), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        engine: Any = figure.get_layout_engine()
        engine.set(rect=(0, (beside + below) / total, 1, height / total))
        figure.text(
            0.5, 1 - 0.08 / total, "\n".join(heading), ha="center", va="top", fontsize=11, weight="bold"
        )
        figure.text(0.5, 0.06 / total, "\n".join(said), ha="center", va="bottom", fontsize=8, color="0.35")

        def legend(handles: Sequence[Any]) -> None:
            place = (0.5, (below + beside / 2) / total)
            figure.legend(handles, names, loc="center", bbox_to_anchor=place, ncols=columns)

        yield figure, legend
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")
