"""Figures 5 and 6: CSP's share of the cross list, and the constants of its two softmaxes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csp_ext.analysis.plots import Dots, Line, Panel, draw_dots, draw_panels
from csp_ext.evaluation.arms import FULL, Arm
from csp_ext.evaluation.results import compare
from csp_ext.evaluation.tables import probability, with_error
from csp_ext.paper.answers import ALL, about, answered, parts, plain
from csp_ext.paper.request import Finding, Request, Tell, percent

RATIOS = tuple(step / 10 for step in range(11))
QUICK_RATIOS = (0.0, 0.25, 0.5, 0.75, 1.0)
OWN = "csp"
RULES = ("calibrated", "union")
CONSTANTS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0))


def fig5(request: Request, tell: Tell) -> Finding:
    """Return the score for every share of the cross list, under both rules that keep a budget exactly."""
    (subject,), (budget,) = request.subjects, request.budgets
    ratios = QUICK_RATIOS if request.quick else RATIOS
    own = Arm(OWN, OWN, budget)
    arms = [Arm(FULL, FULL, 1.0), own]
    label = {}
    for rule in RULES:
        for ratio in ratios:
            arm = Arm(f"{rule}, rho {ratio:g}", OWN, budget, {"combine": rule, "cross_ratio": ratio})
            label[rule, ratio] = arm.label
            arms.append(arm)
    records = answered(request, subject, arms, tell)
    scores = parts(records)
    rows = [
        [rule, f"{ratio:g}", *(with_error(score(label[rule, ratio])) for score in scores.values())]
        for rule in RULES
        for ratio in ratios
    ]
    for arm in reversed(arms[:2]):
        rows.insert(0, [arm.name, "-", *(with_error(score(arm.label)) for score in scores.values())])
    numbers = _with_fields(plain(records), arms, ("combine", "cross_ratio"))
    title = f"Score by the share of the cross list, budget {percent(budget)}"
    notes = [
        *about(request, records),
        "rho: share of the cross list. union: each list fills its share of the budget by rank; calibrated: "
        "both scores are divided by their sums and added, weighted by 1 - rho and rho. csp: the default, "
        "where both lists count as the attention itself weighs them.",
    ]

    def draw(path: Path) -> None:
        panels = []
        for part, score in scores.items():
            full = 100 * score(FULL).value
            default = 100 * score(own.label).value
            lines = [
                Line("full cache", [0, 1], [full, full], reference=True),
                Line("csp, its default", [0, 1], [default, default]),
            ]
            for rule in RULES:
                found = [score(label[rule, ratio]) for ratio in ratios]
                low, high = ([100 * (x.value + sign * x.error) for x in found] for sign in (-1, 1))
                lines.append(Line(rule, ratios, [100 * x.value for x in found], low, high))
            ticks = (0, 0.25, 0.5, 0.75, 1)
            panels.append(Panel(part, "cross ratio rho", "score x 100", lines, ticks=ticks, from_zero=True))
        draw_panels(panels, path, title, f"{subject.name}; bands: standard errors. {notes[0]}")

    return Finding(title, ["rule", "rho", *scores], rows, numbers, draw, notes)


def fig6(request: Request, tell: Tell) -> Finding:
    """Return the score with the n-softmax in the scores, in the decode, in both and in neither."""
    (subject,), (budget,) = request.subjects, request.budgets
    arms = [Arm(FULL, FULL, 1.0)]
    for n, decode_n in CONSTANTS:
        name = f"scores n={n:g}, decode n={decode_n:g}"
        arms.append(Arm(name, OWN, budget, {"n": n, "decode_n": decode_n}))
    records = answered(request, subject, arms, tell)
    scores = parts(records)
    plain_softmax = arms[1].label
    rows = []
    for arm in arms:
        constants = [f"{arm.fields[name]:g}" if arm.fields else "-" for name in ("n", "decode_n")]
        gap = "-", "-"
        if arm.fields and arm.label != plain_softmax:
            found = compare(records, arm.label, plain_softmax)
            gap = f"{100 * found.value:+.1f}", probability(found.p)
        cells = [with_error(score(arm.label)) for score in scores.values()]
        rows.append([FULL if arm.method == FULL else "csp", *constants, *cells, *gap])
    numbers = _with_fields(plain(records), arms, ("n", "decode_n"))
    title = f"The constants of the n-softmax, budget {percent(budget)}"
    notes = [
        *about(request, records),
        "n-softmax: exp(z) / (n + sum exp(z)); 0 is the ordinary one. - n=0, p: difference to n = 0 in both, "
        f"on the same samples of {ALL} data sets, two-sided.",
    ]

    def draw(path: Path) -> None:
        series = []
        for arm in arms:
            found = [score(arm.label) for score in scores.values()]
            values, errors = [100 * x.value for x in found], [100 * x.error for x in found]
            series.append(Dots(arm.name, values, errors, reference=arm.method == FULL))
        caption = f"{subject.name}; CSP, score with its standard error. {notes[0]}"
        draw_dots(list(scores), series, path, title, "score x 100", caption)

    head = ["cache", "scores n", "decode n", *scores, "- n=0", "p"]
    return Finding(title, head, rows, numbers, draw, notes)


def _with_fields(
    entries: Sequence[dict[str, Any]], arms: Sequence[Arm], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Add the fields of their arms to entries of a CSV file; the full cache has none."""
    fields = {arm.label: arm.fields for arm in arms}
    return [entry | {name: fields[entry["arm"]].get(name) for name in names} for entry in entries]
