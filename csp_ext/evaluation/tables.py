"""The results as tables: for the terminal, in Markdown, and as CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from csp_ext.demo.console import replacing
from csp_ext.evaluation import sheets
from csp_ext.evaluation.arms import FULL, shown
from csp_ext.evaluation.results import (
    Difference,
    Mean,
    Record,
    chosen,
    compare,
    groups,
    labels,
    levels,
    mean,
    one_protocol,
    retention,
)
from csp_ext.evaluation.rivals import LEGEND as RIVALS
from csp_ext.evaluation.rivals import Rivalry

SUITE, GROUP, LEVEL, DATASET = "suite", "group", "level", "dataset"
PROTOCOL = {
    "aware": "The whole prompt was pruned, the question in sight",
    "agnostic": "What stands before the question was pruned, the question out of sight",
}
LEGEND = (
    "score: mean over data sets x 100, ± its standard error. of full: share of the full cache's score. "
    "p: two-sided, for no difference from the full cache on the same samples."
)


@dataclass(frozen=True)
class Row:
    """One arm on one part of the data.

    Attributes
    ----------
    arm, name, method : str
    budget : float or int
    scope : {"suite", "group", "level", "dataset"}
    of : str
        Name of the group, the level of how many images there are, or the data set; "all".
    kept : float
        Share of the prunable tokens that were kept.
    mean : Mean
    retention : float
        NaN without the full cache.
    difference : Difference or None
        To the full cache; None for itself and without it.
    """

    arm: str
    name: str
    method: str
    budget: float | int
    scope: str
    of: str
    kept: float
    mean: Mean
    retention: float
    difference: Difference | None

    def plain(self) -> dict[str, Any]:
        """Return plain values, ready for JSON and CSV; None where there is nothing to say."""
        difference = self.difference
        return {
            "arm": self.arm,
            "name": self.name,
            "method": self.method,
            "budget": self.budget,
            "scope": self.scope,
            "of": self.of,
            "kept": round(self.kept, 6),
            "score": self.mean.value,
            "error": sheets.finite(self.mean.error),
            "count": self.mean.count,
            "retention": sheets.finite(self.retention),
            "difference": difference.value if difference else None,
            "difference_error": sheets.finite(difference.error) if difference else None,
            "better": difference.better if difference else None,
            "worse": difference.worse if difference else None,
            "p": difference.p if difference else None,
            "test": difference.test if difference else None,
        }


def rows(records: Sequence[Record]) -> list[Row]:
    """Return every arm on the suite, on every group, level of images (where they differ) and data set.

    Raises
    ------
    ValueError
        If there are no records, or they are of several protocols.
    """
    one_protocol(records)
    scopes = [(SUITE, "all")]
    scopes += [(GROUP, group) for group in groups(records)]
    if len(found := levels(records)) > 1:
        scopes += [(LEVEL, level) for level in found]
    scopes += [(DATASET, dataset) for dataset in dict.fromkeys(record["dataset"] for record in records)]
    full = chosen(records, arm=FULL)
    result = []
    for label in labels(records):
        own = chosen(records, arm=label)
        both = own if label == FULL else own + full
        for scope, of in scopes:
            where = {} if scope == SUITE else {scope: of}
            part = chosen(own, **where)
            if not part:
                continue
            first = part[0]
            against = bool(full) and label != FULL and bool(chosen(full, **where))
            result.append(
                Row(
                    arm=label,
                    name=first["name"],
                    method=first["method"],
                    budget=first["budget"],
                    scope=scope,
                    of=of,
                    kept=sum(record["kept"] / record["context_tokens"] for record in part) / len(part),
                    mean=mean(own, label, **where),
                    retention=retention(both, label, **where),
                    difference=compare(both, label, FULL, **where) if against else None,
                )
            )
    return result


HEAD = ("method", "budget", "kept", "score", "of full", "p")


def _wide(results: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return a line per arm: the suite, then the groups."""
    names = list(dict.fromkeys(row.of for row in results if row.scope == GROUP))
    cell = {(row.arm, row.of): percent(row.mean.value) for row in results if row.scope == GROUP}
    lines = []
    for row in results:
        if row.scope == SUITE:
            line = [
                row.name,
                "-" if row.method == FULL else shown(row.budget),
                f"{row.kept:.1%}",
                with_error(row.mean),
                "-" if math.isnan(row.retention) else f"{row.retention:.1%}",
                "-" if row.difference is None else probability(row.difference.p),
            ]
            lines.append(line + [cell.get((row.arm, name), "-") for name in names])
    return [*HEAD, *names], lines


def percent(value: float) -> str:
    """Return a score times 100."""
    return f"{100 * value:.1f}"


def with_error(value: Mean) -> str:
    """Return a score times 100 and its standard error."""
    return percent(value.value) + (f" ± {percent(value.error)}" if math.isfinite(value.error) else "")


def probability(p: float) -> str:
    """Return a p value; small ones say how small only roughly."""
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def terminal(results: Sequence[Row], title: str, protocol: str) -> Table:
    """Return the table for a terminal."""
    return sheets.terminal(*_wide(results), title, f"{PROTOCOL[protocol]}. {LEGEND}")


def write_markdown(
    path: Path, results: Sequence[Row], title: str, protocol: str, rivals: Rivalry | None
) -> None:
    """Write the table, below it the one of the rivals, and those of the levels and the data sets."""
    text = [f"# {title}", "", f"{PROTOCOL[protocol]}. {LEGEND}", "", *sheets.markdown(*_wide(results)), ""]
    if rivals is not None:
        text += [f"## {rivals.name} against the others", "", RIVALS.format(name=rivals.name), ""]
        text += [*sheets.markdown(*rivals.lines()), ""]
    for scope, heading in ((LEVEL, "Few, medium and many images"), (DATASET, "Data sets")):
        names = list(dict.fromkeys(row.of for row in results if row.scope == scope))
        if names:
            lines = _detail(results, scope, names)
            text += [f"## {heading}", "", *sheets.markdown(["arm", *names], lines), ""]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(text), encoding="utf-8")


def _detail(results: Sequence[Row], scope: str, names: Sequence[str]) -> list[list[str]]:
    """Return a line per arm with its score on each part of a scope."""
    cell = {(row.arm, row.of): with_error(row.mean) for row in results if row.scope == scope}
    arms = list(dict.fromkeys(row.arm for row in results))
    return [[arm, *(cell.get((arm, name), "-") for name in names)] for arm in arms]


def write_csv(path: Path, results: Sequence[Row]) -> None:
    """Write one line per arm and part of the data, with all numbers."""
    sheets.write_csv(path, [row.plain() for row in results])
