"""Which tables and figures there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from csp_ext.paper import attention, costs, methods, sweeps
from csp_ext.paper.request import Finding, Request, Tell


@dataclass(frozen=True)
class Study:
    """One table or figure.

    Attributes
    ----------
    run : callable
        Measures it.
    budgets : tuple of float
        By default; empty where nothing is pruned, one where only one is possible.
    models : int
        How many are compared at least; one study compares several, the others take one.
    samples : tuple of int
        Per generated data set, and with `quick`.
    """

    run: Callable[[Request, Tell], Finding]
    budgets: tuple[float, ...] = ()
    models: int = 1
    samples: tuple[int, int] = (64, 8)

    @property
    def watches(self) -> bool:
        """Whether it is about an observation window's attention."""
        return not self.budgets


STUDIES = {
    "table1": Study(methods.table1, (0.2,), samples=(128, 8)),
    "table2": Study(costs.table2, (1.0, 0.6, 0.3, 0.2, 0.1), samples=(1, 1)),
    "table3": Study(methods.table3, (0.2,), models=2),
    "fig1": Study(attention.fig1),
    "fig3": Study(attention.fig3),
    "fig4": Study(attention.fig4),
    "fig5": Study(sweeps.fig5, (0.2,)),
    "fig6": Study(sweeps.fig6, (0.2,)),
    "fig7": Study(methods.fig7, (0.05, 0.1, 0.2, 0.4, 0.6, 0.8), samples=(24, 2)),
}
