"""Tables 1 and 3, figure 7: the methods side by side, on two architectures, and by budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csp_ext.analysis.plots import Dots, Line, Panel, draw_dots, draw_panels
from csp_ext.evaluation.arms import FULL, Arm, arms_of
from csp_ext.evaluation.items import GROUPS
from csp_ext.evaluation.results import Record, compare, retention
from csp_ext.evaluation.tables import percent as hundredfold
from csp_ext.evaluation.tables import probability, with_error
from csp_ext.methods import METHODS
from csp_ext.paper import published
from csp_ext.paper.answers import ALL, about, answered, parts, plain
from csp_ext.paper.request import Finding, Request, Tell, percent

OWN = "csp"
# The project's own first, so that they have the same colours whatever else there is.
ORDERED = sorted(METHODS, key=lambda name: (name != FULL, name != OWN, not name.startswith(OWN)))
# More than these no picture can show.
PICTURED = (
    *(FULL, OWN, "csp-paper", "csp-release", "snapkv", "snapkv-tuned", "pyramidkv", "h2o", "roco", "lookm"),
    *("streaming", "random"),
)
DEFAULTS = (
    "Every method with its own defaults; all are given the same number of tokens per head. csp, snapkv-tuned "
    "and pyramidkv-tuned observe with the same window. The picture shows some of the methods."
)
GENERATED = (
    "The paper's numbers are not beside these: they are of LLaVA-1.5-7B on MileBench, and this model and its "
    "data are others. With --model and --data they are."
)


def table1(request: Request, tell: Tell) -> Finding:
    """Return the score of every method per group, at one budget."""
    (subject,), (budget,) = request.subjects, request.budgets
    arms = arms_of(ORDERED, [budget])
    records = answered(request, subject, arms, tell)
    own = next(arm.label for arm in arms if arm.name == OWN)
    scores = parts(records)
    rows = []
    for arm in arms:
        gap = "-", "-"
        if arm.label != own:
            found = compare(records, arm.label, own)
            gap = f"{100 * found.value:+.1f}", probability(found.p)
        rows.append([arm.name, *(with_error(score(arm.label)) for score in scores.values()), *gap])
    notes = [
        *about(request, records),
        DEFAULTS,
        f"- {OWN}, p: difference to {OWN} on all samples, two-sided.",
    ]
    if request.real:
        beside, sources = _beside(records, list(scores))
        rows += beside
        notes += sources
    else:
        notes.append(GENERATED)
    title = f"Methods at a budget of {percent(budget)}"

    def draw(path: Path) -> None:
        caption = f"{subject.name}; score with its standard error. {notes[0]}"
        draw_dots(list(scores), _dots(arms, scores), path, title, "score x 100", caption)

    head = ["method", *scores, f"- {OWN}", "p"]
    return Finding(title, head, rows, plain(records), draw, notes)


def _dots(arms: Sequence[Arm], scores: dict[str, Any]) -> list[Dots]:
    result = []
    for arm in arms:
        if arm.name not in PICTURED:
            continue
        found = [score(arm.label) for score in scores.values()]
        values, errors = [100 * x.value for x in found], [100 * x.error for x in found]
        result.append(Dots(arm.name, values, errors, reference=arm.method == FULL))
    return result


def _beside(records: Sequence[Record], columns: list[str]) -> tuple[list[list[str]], list[str]]:
    """Return rows of published scores under the same groups, and what they are."""
    present: dict[str, list[str]] = {}
    for record in records:
        present.setdefault(record["group"], [])
        if record["dataset"] not in present[record["group"]]:
            present[record["group"]].append(record["dataset"])
    rows = []
    for method in published.RELEASED_METHODS:
        cells = [published.released_mean(method, present.get(group, [])) for group in columns]
        if any(cell is not None for cell in cells):
            shown = ["-" if cell is None else hundredfold(cell) for cell in cells]
            rows.append([f"{method}, released", *shown, "-", "-"])
    whole = {group for group in GROUPS if set(present.get(group, ())) == set(GROUPS[group])}
    if whole:
        shown = [str(published.TABLE_1_CSP[group]) if group in whole else "-" for group in columns]
        rows.append(["csp, paper's table 1", *shown, "-", "-"])
    if not rows:
        return [], ["No data set here is one that the paper or its release has a score of."]
    return rows, [
        "released: the result files that come with the paper, of LLaVA-1.5-7B at 20 %, the mean of the data "
        "sets measured here. paper's table 1: of the same model, whole groups only.",
    ]


def table3(request: Request, tell: Tell) -> Finding:
    """Return the score of every method on several models, at one budget."""
    (budget,) = request.budgets
    arms = arms_of(ORDERED, [budget])
    found: list[list[Record]] = []
    for at, subject in enumerate(request.subjects):

        def counted(done: int, total: int, at: int = at) -> None:
            tell(at * total + done, len(request.subjects) * total)

        found.append(answered(request, subject, arms, counted))
    names = [subject.name for subject in request.subjects]
    rows = []
    for arm in arms:
        row = [arm.name]
        for records in found:
            row += [with_error(parts(records)[ALL](arm.label)), f"{retention(records, arm.label):.1%}"]
        rows.append(row)
    numbers = [
        entry for name, records in zip(names, found, strict=True) for entry in plain(records, model=name)
    ]
    title = f"Methods at a budget of {percent(budget)} on {len(names)} models"

    def draw(path: Path) -> None:
        dots = []
        for name, records in zip(names, found, strict=True):
            scores = [parts(records)[ALL](arm.label) for arm in arms]
            dots.append(Dots(name, [100 * x.value for x in scores], [100 * x.error for x in scores]))
        caption = "Mean over the data sets with its standard error."
        draw_dots([arm.name for arm in arms], dots, path, title, "score x 100", caption)

    head = ["method", *(cell for name in names for cell in (name, "of full"))]
    notes = [*about(request, found[0]), DEFAULTS, "of full: share of the full cache's score."]
    if not request.real:
        notes.append(GENERATED)
    return Finding(title, head, rows, numbers, draw, notes)


def fig7(request: Request, tell: Tell) -> Finding:
    """Return the score of every method at every budget."""
    (subject,) = request.subjects
    arms = arms_of(ORDERED, request.budgets)
    records = answered(request, subject, arms, tell)
    scores = parts(records)
    label = {(arm.name, arm.budget): arm.label for arm in arms}
    names = [name for name in dict.fromkeys(arm.name for arm in arms) if name != FULL]
    rows = [
        [name, *(with_error(scores[ALL](label[name, budget])) for budget in request.budgets)]
        for name in names
    ]
    rows.insert(0, [FULL, *[with_error(scores[ALL](FULL))] * len(request.budgets)])
    title = "Score by budget"
    shares = [100 * budget for budget in request.budgets]

    def line(name: str, score: Any) -> Line:
        found = [score(label[name, budget]) for budget in request.budgets]
        values = [100 * x.value for x in found]
        low, high = ([100 * (x.value + sign * x.error) for x in found] for sign in (-1, 1))
        return Line(name, shares, values, low, high)

    def draw(path: Path) -> None:
        panels = []
        for part, score in scores.items():
            full = 100 * score(FULL).value
            lines = [Line("full cache", [shares[0], shares[-1]], [full, full], reference=True)]
            lines += [line(name, score) for name in names if name in PICTURED]
            panels.append(Panel(part, "budget, %", "score x 100", lines, ticks=shares, from_zero=True))
        caption = f"{subject.name}; bands: standard errors. {notes[0]}"
        draw_panels(panels, path, title, caption)

    notes = [
        *about(request, records),
        "Of all data sets; the groups are in the CSV file and the picture.",
        DEFAULTS,
    ]
    if not request.real:
        notes.append(GENERATED)
    head = ["method", *(percent(budget) for budget in request.budgets)]
    return Finding(title, head, rows, plain(records), draw, notes)
