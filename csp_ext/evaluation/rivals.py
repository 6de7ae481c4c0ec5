"""One method against all the others, at equal budgets and on the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from csp_ext.evaluation import sheets
from csp_ext.evaluation.arms import FULL, ORACLE, shown
from csp_ext.evaluation.results import Difference, Record, chosen, compare

LEGEND = (
    "How much more {name} scores at the same budget, x 100, ± the standard error of the paired difference. "
    "first or tied: data sets on which no other method is ahead by more than two such errors."
)


@dataclass(frozen=True)
class Rivalry:
    """A method and its rivals.

    Attributes
    ----------
    name : str
        The method's arm.
    budgets : tuple
        At which it was run.
    differences : dict
        For each rival and budget that both have, the method minus the rival.
    first : dict
        For each budget, on how many data sets no rival is ahead by more than two standard errors of the
        paired difference, and how many data sets there are.
    """

    name: str
    budgets: tuple[float | int, ...]
    differences: dict[tuple[str, float | int], Difference]
    first: dict[float | int, tuple[int, int]]

    def lines(self) -> tuple[list[str], list[list[str]]]:
        """Return the head and the lines of a table; rivals with the smallest lead come first."""
        rivals = list(dict.fromkeys(rival for rival, _ in self.differences))
        rivals.sort(
            key=lambda rival: sum(d.value for (other, _), d in self.differences.items() if other == rival)
        )
        lines = [[rival, *(self._cell(rival, budget) for budget in self.budgets)] for rival in rivals]
        counts = [f"{first} of {count}" for first, count in self.first.values()]
        return [f"{self.name} minus", *map(shown, self.budgets)], [*lines, ["first or tied", *counts]]

    def _cell(self, rival: str, budget: float | int) -> str:
        found = self.differences.get((rival, budget))
        return "-" if found is None else f"{100 * found.value:+.1f} ± {100 * found.error:.1f}"

    def terminal(self) -> Table:
        """Return the table for a terminal."""
        return sheets.terminal(*self.lines(), caption=LEGEND.format(name=self.name))


def rivalry(records: Sequence[Record], name: str) -> Rivalry | None:
    """Compare one method's arms with all others.

    The full cache and the oracle are no rivals, nor are other settings of the method, such as ``csp-union``.

    Returns
    -------
    Rivalry or None
        None where the records have no such arm, or nothing to compare it with.
    """
    own = {record["budget"]: record["arm"] for record in records if record["name"] == name}
    others = {
        (record["name"], record["budget"]): record["arm"]
        for record in records
        if record["name"] not in (name, FULL, ORACLE) and not record["name"].startswith(f"{name}-")
    }
    differences, first = {}, {}
    for budget, arm in own.items():
        mine = chosen(records, arm=arm)
        rivals = {rival: label for (rival, at), label in others.items() if at == budget}
        theirs = {rival: chosen(records, arm=label) for rival, label in rivals.items()}
        for rival, label in rivals.items():
            differences[rival, budget] = compare(mine + theirs[rival], arm, label)
        datasets = dict.fromkeys(record["dataset"] for record in mine)
        leads = [
            not any(
                _ahead(compare(mine + theirs[rival], label, arm, dataset=dataset))
                for rival, label in rivals.items()
            )
            for dataset in datasets
        ]
        first[budget] = (sum(leads), len(leads))
    return Rivalry(name, tuple(own), differences, first) if differences else None


def _ahead(gap: Difference) -> bool:
    return gap.value > 2 * gap.error
