"""The results in files and on the terminal."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from csp_ext.demo.console import UserError, replacing, stdout
from csp_ext.evaluation import sheets
from csp_ext.speed import picture, report
from csp_ext.speed.measure import Measured
from csp_ext.speed.targets import HEAD, Verdict

NAMES = ("bench.md", "bench.csv", "bench.json", "bench.png")


@dataclass(frozen=True)
class Outcome:
    """A finished measurement and what must be known of it.

    Attributes
    ----------
    measured : Measured
        The numbers.
    verdicts : list of Verdict
        The targets.
    title : str
        Of picture and page.
    facts : list of str
        Model, prompt, machine, versions and the command that repeats it, line by line.
    settings : dict
        The same in plain values.
    """

    measured: Measured
    verdicts: list[Verdict]
    title: str
    facts: list[str]
    settings: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """Return everything in plain values."""
        measured = self.measured
        rows = [report.record(measured, row) | {"rounds": report.rounds(row)} for row in measured.rows]
        return {
            "command": "bench",
            **self.settings,
            "bandwidth_bytes_per_s": measured.bandwidth,
            "weight_bytes_per_step": measured.weights,
            "slot_bytes": measured.slot,
            "rows": rows,
            "targets": [asdict(verdict) | {"met": verdict.met} for verdict in self.verdicts],
        }

    def tables(self) -> list[tuple[str, list[list[str]]]]:
        """Return a title and the lines of a table per batch."""
        return [
            (f"batch {batch}", [report.cells(self.measured, row) for row in self.measured.of_batch(batch)])
            for batch in self.measured.batches
        ]


def write(outcome: Outcome, folder: Path) -> list[Path]:
    """Write ``bench.md``, ``bench.csv``, ``bench.json`` and ``bench.png``; return them.

    Raises
    ------
    UserError
        If the folder cannot be written.
    """
    markdown, numbers, plain, image = files = [folder / name for name in NAMES]
    try:
        with replacing(markdown) as path:
            path.write_text(_markdown(outcome, image.name), encoding="utf-8")
        records = [report.record(outcome.measured, row) for row in outcome.measured.rows]
        sheets.write_csv(numbers, records)
        with replacing(plain) as path:
            path.write_text(json.dumps(outcome.plain(), indent=2) + "\n", encoding="utf-8")
        picture.draw(outcome.measured, image, outcome.title, outcome.facts[0])
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    return files


def _markdown(outcome: Outcome, image: str) -> str:
    parts = [f"# {outcome.title}", "", *(f"- {fact}" for fact in outcome.facts), ""]
    for title, lines in outcome.tables():
        parts += [f"## {title}", "", *sheets.markdown(report.HEAD, lines), ""]
    if outcome.verdicts:
        lines = [verdict.cells() for verdict in outcome.verdicts]
        parts += ["## targets", "", *sheets.markdown(HEAD, lines), ""]
    parts += ["## what the columns mean", "", *(f"- {note}" for note in report.NOTES), ""]
    return "\n".join([*parts, f"![{outcome.title}]({image})", ""])


def show(outcome: Outcome, files: Sequence[Path]) -> None:
    """Print the tables on stdout."""
    tables = [sheets.terminal(report.HEAD, lines, title) for title, lines in outcome.tables()]
    if outcome.verdicts:
        tables.append(sheets.terminal(HEAD, [verdict.cells() for verdict in outcome.verdicts], "targets"))
    console = stdout()
    if not console.is_terminal:
        wide = Console(width=1000)
        console = Console(width=max(console.width, *(wide.measure(table).maximum for table in tables)))
    for table in tables:
        console.print(table)
    for fact in outcome.facts:
        console.print(Text(fact))
    console.print(Text(f"Written: {', '.join(str(file) for file in files)}"))


def machine(device: torch.device) -> dict[str, Any]:
    """Return what computes."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return {"device": _processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
