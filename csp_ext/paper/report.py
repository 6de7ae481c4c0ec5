"""A finding on the terminal and in files: Markdown, CSV and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from csp_ext.demo.console import UserError, replacing, stdout
from csp_ext.evaluation import sheets
from csp_ext.paper.request import Finding

SUFFIXES = (".md", ".csv", ".png")


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
        sheets.write_csv(numbers, finding.records)
        finding.draw(picture)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    return files


def _markdown(finding: Finding, picture: str, notes: Sequence[str]) -> str:
    table = sheets.markdown(finding.headers, finding.rows)
    listed = [f"- {note}" for note in notes]
    parts = [f"# {finding.title}", "", *table, "", *listed, "", f"![{finding.title}]({picture})", ""]
    return "\n".join(parts)


def show(finding: Finding, files: Sequence[Path], notes: Sequence[str]) -> None:
    """Print the table and what it shows on stdout."""
    table = sheets.terminal(finding.headers, finding.rows, finding.title)
    console = stdout()
    if not console.is_terminal:
        wide = Console(width=1000)
        console = Console(width=max(console.width, wide.measure(table).maximum))
    console.print(table)
    for note in notes:
        console.print(Text(note))
    console.print(Text(f"Written: {', '.join(str(file) for file in files)}"))
