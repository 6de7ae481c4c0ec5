"""Time, throughput and memory by budget, a column per batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from csp_ext.analysis.plots import Line, Panel, draw_panels
from csp_ext.speed.measure import Measured
from csp_ext.speed.report import record

Record = dict[str, Any]
BUDGET = "budget, %"


def draw(measured: Measured, path: Path, title: str, note: str) -> None:
    """Write the picture."""
    by_batch = {
        batch: [
            numbers for row in measured.of_batch(batch) if (numbers := record(measured, row))["ms_per_token"]
        ]
        for batch in measured.batches
    }
    largest = max((each["peak_bytes"] or 0 for found in by_batch.values() for each in found), default=0)
    unit, size = ("GiB", 2**30) if largest >= 2**31 else ("MiB", 2**20)
    panels = [
        *(_times(batch, found) for batch, found in by_batch.items()),
        *(_rates(batch, found) for batch, found in by_batch.items()),
        *(_memory(batch, found, unit, size) for batch, found in by_batch.items()),
    ]
    columns = len(by_batch) if len(by_batch) > 1 else 3
    draw_panels(panels, path, title, note, columns=columns)


def _pruned(found: list[Record], kind: str) -> list[Record]:
    return sorted(
        (each for each in found if each["kind"] == kind and each["budget"] is not None),
        key=lambda each: each["budget"],
    )


def _x(records: list[Record]) -> list[float]:
    return [100 * each["budget"] for each in records]


def _lines(found: list[Record], value: Callable[[Record], Any]) -> list[Line]:
    """Return a line per arm; the untouched ones are level."""
    lines = []
    ticks = _ticks(found)
    for kind, name, reference in (
        ("csp", "csp", False),
        ("gather", "naive gather", False),
        ("dynamic", "full, DynamicCache", False),
        ("static", "full, StaticCache", True),
    ):
        records = [each for each in _pruned(found, kind) if value(each) is not None]
        if not records:
            continue
        if kind in ("dynamic", "static"):
            level = value(records[0])
            lines.append(Line(name, ticks, [level] * len(ticks), reference=reference))
        else:
            lines.append(Line(name, _x(records), [value(each) for each in records]))
    return lines


def _ticks(found: list[Record]) -> list[float]:
    return sorted({100 * each["budget"] for each in found if each["budget"] is not None})


def _with_bound(found: list[Record], lines: list[Line], value: Callable[[Record], float]) -> list[Line]:
    bounded = [each for each in _pruned(found, "csp") if each["amdahl_ms"] is not None]
    if bounded:
        lines.append(Line("Amdahl's bound", _x(bounded), [value(each) for each in bounded], reference=True))
    return lines


def _times(batch: int, found: list[Record]) -> Panel:
    lines = _lines(found, lambda each: each["ms_per_token"])
    _with_bound(found, lines, lambda each: each["amdahl_ms"])
    return Panel(f"batch {batch}: a step", BUDGET, "ms per token", lines, _ticks(found), True)


def _rates(batch: int, found: list[Record]) -> Panel:
    lines = _lines(found, lambda each: each["tokens_per_s"])
    _with_bound(found, lines, lambda each: 1e3 * batch / each["amdahl_ms"])
    return Panel(f"batch {batch}: throughput", BUDGET, "tokens per second", lines, _ticks(found), True)


def _memory(batch: int, found: list[Record], unit: str, size: int) -> Panel:
    lines = _lines(found, lambda each: None if each["peak_bytes"] is None else each["peak_bytes"] / size)
    kept = _pruned(found, "csp")
    stored = [each["stored_bytes"] / size for each in kept]
    lines.append(Line("csp, cache alone", _x(kept), stored, reference=True))
    title = f"batch {batch}: peak beside the model"
    return Panel(title, BUDGET, unit, lines, _ticks(found), True)
