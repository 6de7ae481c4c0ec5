"""Paired differences, the tables, the CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from variants.catalogue import DEFAULT, FULL, IDEAS, NOTES, Variant
from variants.trial import Floats

Key = tuple[str, float]  # variant, budget


@dataclass
class Outcome:
    """What was measured: [samples, 2] per variant, budget and task; exact match and digit accuracy."""

    scores: dict[Key, dict[str, list[Floats]]] = field(default_factory=dict)

    def add(self, name: str, budget: float, task: str, exact: Floats, digits: Floats) -> None:
        """Note a batch; the samples of a task come in the same order for every variant."""
        tasks = self.scores.setdefault((name, budget), {})
        tasks.setdefault(task, []).append(np.stack((exact, digits), 1))

    def of(self, name: str, budgets: Sequence[float]) -> dict[str, Floats]:
        """Return [samples, 2] per task, the mean over the budgets."""
        parts = [self.scores[name, budget] for budget in budgets]
        return {task: np.mean([np.concatenate(part[task]) for part in parts], axis=0) for task in parts[0]}


def suite_mean(tasks: dict[str, Floats]) -> Floats:
    """Return [2], the mean of the tasks' means."""
    return np.mean([score.mean(0) for score in tasks.values()], axis=0)


def difference(ours: dict[str, Floats], other: dict[str, Floats]) -> tuple[Floats, Floats]:
    """Return the difference of two suite means, and its standard error over the samples, paired; [2] each."""
    gaps = {task: score - other[task] for task, score in ours.items()}
    variance = sum(gap.var(0, ddof=1) / len(gap) for gap in gaps.values())
    return suite_mean(gaps), np.sqrt(variance) / len(gaps)


def cell(mean: float, gap: float | None = None, error: float = 0.0) -> str:
    """Return "51.2 (+2.1 ± 0.9 ▲)" in per cent; the mark where the gap exceeds two standard errors."""
    text = f"{100 * mean:.1f}"
    if gap is None:
        return text
    mark = " " + ("▲" if gap > 0 else "▼") if abs(gap) > 2 * error and not math.isclose(gap, 0) else ""
    return f"{text} ({100 * gap:+.1f} ± {100 * error:.1f}{mark})"


def row(outcome: Outcome, variant: Variant, budgets: Sequence[float], metric: int) -> str:
    """Return a variant's line: each budget, and their mean."""
    cells = [variant.name]
    for part in (*([budget] for budget in budgets), budgets):
        ours = outcome.of(variant.name, part)
        mean = suite_mean(ours)[metric]
        if variant.name == variant.reference:
            cells.append(cell(mean))
            continue
        gap, error = difference(ours, outcome.of(variant.reference, part))
        cells.append(cell(mean, gap[metric], error[metric]))
    return "| " + " | ".join(cells) + " |"


def tables(outcome: Outcome, ran: Sequence[Variant], budgets: Sequence[float], letters: str) -> str:
    """Return the Markdown of all letters: exact match, then digits."""
    head = " | ".join((*(f"{budget:.0%}" for budget in budgets), "mean"))
    ruler = "|---|" + "---|" * (len(budgets) + 1)
    lines = []
    for letter in letters:
        lines += [f"## ({letter}) {IDEAS[letter]}", ""]
        if letter in NOTES:
            lines += [NOTES[letter], ""]
        shown = [variant for variant in ran if variant.name == DEFAULT or letter in variant.letters]
        for metric, title in enumerate(("exact match", "digits")):
            lines += [f"| {title} | {head} |", ruler]
            lines += [row(outcome, variant, budgets, metric) for variant in shown]
            lines.append("")
    return "\n".join(lines)


def explanation(outcome: Outcome, notes: str) -> str:
    """Return what stands above the tables, `notes` among it."""
    full = suite_mean(outcome.of(FULL.name, [1.0]))
    return f"""# Variants of the default on the evaluation model

{notes}

Per cent, the mean over the tasks, mode S: exact match of the whole answer, and the share of its digits that
are right. The full cache has {100 * full[0]:.1f} and {100 * full[1]:.1f}. A row changes only what it names.
In brackets the paired difference to the default and its standard error over the samples; ▲ and ▼ where it
exceeds two of them, which one cell in twenty does by chance.
"""


def write_csv(path: Path, outcome: Outcome, letters_of: dict[str, str]) -> None:
    """Write a line per variant, budget and task."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("letters", "variant", "budget", "task", "samples", "exact_match", "digit_accuracy"))
        writer.writerows(_lines(outcome, letters_of))


def _lines(outcome: Outcome, letters_of: dict[str, str]) -> Iterable[tuple[object, ...]]:
    for (name, budget), tasks in outcome.scores.items():
        for task, parts in tasks.items():
            score = np.concatenate(parts)
            exact, digits = score.mean(0)
            yield letters_of[name], name, budget, task, len(score), f"{exact:.4f}", f"{digits:.4f}"
