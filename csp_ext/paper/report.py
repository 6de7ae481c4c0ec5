"""A finding on the terminal and in files: Markdown, CSV and a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from csp_ext.demo.console import UserError, replacing, stdout
from csp_ext.paper.request import Finding

SUFFIXES = (".md", ".csv", ".png")


def check_folder(folder: Path) -> None:
    """Check, before any long work, that results can be written to a folder; create it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created: {error.strerror}") from error


def write(finding: Finding, folder: Path, name: str, notes: Sequence[str]) -> list[Path]:
    """Write ``name.md``, ``name.csv`` and ``name.png``; return them.

    Raises
    ------
    UserError
        If the folder cannot be written.
    """
    markdown, numbers, picture = files = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    try:
        with replacing(markdown) as path:
            path.write_text(_markdown(finding, picture.name, notes), encoding="utf-8")
        with replacing(numbers) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(finding.records[0]))
            writer.writeheader()
            writer.writerows({key: _cell(value) for key, value in row.items()} for row in finding.records)
        finding.draw(picture)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    return files


def _cell(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown(finding: Finding, picture: str, notes: Sequence[str]) -> str:
    rule = ["---", *["---:"] * (len(finding.headers) - 1)]
    table = [f"| {' | '.join(row)} |" for row in (finding.headers, rule, *finding.rows)]
    listed = [f"- {note}" for note in notes]
    parts = [f"# {finding.title}", "", *table, "", *listed, "", f"![{finding.title}]({picture})", ""]
    return "\n".join(parts)


def show(finding: Finding, files: Sequence[Path], notes: Sequence[str]) -> None:
    """Print the table and what it shows on stdout."""
    table = Table(
        title=finding.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1)
    )
    for at, name in enumerate(finding.headers):
        table.add_column(name, justify="left" if at == 0 else "right")
    for row in finding.rows:
        table.add_row(*row)
    console = stdout()
    if not console.is_terminal:
        wide = Console(width=1000)
        console = Console(width=max(console.width, wide.measure(table).maximum))
    console.print(table)
    for note in notes:
        console.print(Text(note))
    console.print(Text(f"Written: {', '.join(str(file) for file in files)}"))
