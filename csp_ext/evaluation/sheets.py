"""Tables of text, for the terminal, in Markdown and as CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from csp_ext.demo.console import replacing

Lines = Sequence[Sequence[str]]


def terminal(
    head: Sequence[str], lines: Lines, title: str | None = None, caption: str | None = None
) -> Table:
    """Return a table for a terminal; all columns but the first are numbers."""
    table = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )
    for at, name in enumerate(head):
        table.add_column(name, justify="left" if at == 0 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def markdown(head: Sequence[str], lines: Lines) -> list[str]:
    """Return the lines of a table in Markdown; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(line)} |" for line in (head, rule, *lines)]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys; an empty cell where there is no finite number."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({key: finite(value) for key, value in row.items()} for row in rows)


def finite(value: Any) -> Any:
    """Return `value`, None for a float that is not a finite number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
