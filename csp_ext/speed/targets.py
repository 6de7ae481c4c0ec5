"""What was aimed at, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from csp_ext.speed.bounds import amdahl_s, roofline_s
from csp_ext.speed.measure import Measured, Row

MANY, SOME = 24, 8  # rows of the targets


@dataclass(frozen=True)
class Setting:
    """Where a measurement ran: name of the model, its layers, GPU or CPU, compiled or eager."""

    model: str
    layers: int
    on_gpu: bool
    compiled: bool


@dataclass(frozen=True)
class Verdict:
    """One target.

    Attributes
    ----------
    where, what : str
        Setting and target, in words.
    value : float or None
        What was measured, the worst case; None: not run.
    limit : float
        What it is to be.
    least : bool
        Whether it is to be at least that, rather than at most.
    bound : str
        What bounds it.
    """

    where: str
    what: str
    value: float | None
    limit: float
    least: bool = False
    bound: str = "-"

    @property
    def met(self) -> bool | None:
        """Whether it is reached; None: not run."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.least else self.value <= self.limit

    def cells(self) -> list[str]:
        """Return where, target, value, outcome and bound as text."""
        value = "-" if self.value is None else f"{self.value:.3g}"
        outcome = {None: "not run", True: "met", False: "not met"}[self.met]
        return [
            self.where,
            f"{self.what} {'>=' if self.least else '<='} {self.limit:g}",
            value,
            outcome,
            self.bound,
        ]


HEAD = ("where", "target", "measured", "outcome", "bounded by")


def verdicts(measured: Measured, setting: Setting) -> list[Verdict]:
    """Return every target with its value, where this run has one; none for a model that is all overhead."""
    if setting.model == "quick":
        return []
    return [
        *_gpu(measured, setting),
        *_memory(measured, setting),
        *_cpu(measured, setting),
        *_prefill(measured, setting),
    ]


def _pruned(measured: Measured, batch: int | None = None, full: bool = False) -> list[Row]:
    """Return the rows of csp at the budgets that were asked for; `full`: 100 % among them."""
    return [
        row
        for row in measured.rows
        if row.turns and row.arm.kind == "csp" and row.arm.budget is not None
        if (full or row.arm.budget < 1) and batch in (None, row.batch)
    ]


def _worst(
    rows: list[Row], value: Callable[[Row], float | None], pick: Callable[[list[float]], float]
) -> float | None:
    known = [each for each in map(value, rows) if each is not None]
    return pick(known) if known else None


def _gpu(measured: Measured, setting: Setting) -> list[Verdict]:
    where = "GPU, LLaVA-7B, compiled"
    applies = setting.on_gpu and setting.compiled and setting.model == "llava-7b"
    alone = _pruned(measured, 1, full=True) if applies else []
    over = _worst(alone, lambda row: row.step_s / roofline_s(measured, row), max)
    found = [Verdict(where, "batch 1: step / roofline", over, 1.15)]
    for budget, limit in ((0.1, 3.0), (0.2, 2.4)):
        row = measured.find(MANY, "csp", budget) if applies else None
        full = measured.find(MANY, "static") if applies else None
        what = f"batch {MANY}, {100 * budget:g} %: tokens/s over static"
        if row is None or full is None:
            found.append(Verdict(where, what, None, limit, least=True))
            continue
        most = amdahl_s(measured, row)
        bound = "-" if most is None else f"Amdahl: {full.step_s / most:.3g}"
        found.append(Verdict(where, what, 1 / row.relative_to(full), limit, True, bound))
    return found


def _memory(measured: Measured, setting: Setting) -> list[Verdict]:
    def over_budget(row: Row) -> float | None:
        full = measured.find(row.batch, "static")
        if full is None or row.arm.budget is None:
            return None
        return row.turns[0].prompt_bytes / (row.arm.budget * full.turns[0].prompt_bytes)

    batch = max(measured.batches)
    full = measured.find(batch, "static")

    def peak_saved(row: Row) -> float | None:
        if full is None or full.peak is None or row.peak is None:
            return None
        return (full.peak - row.peak) / (full.turns[0].stored - row.turns[0].stored)

    bound = f"one layer of {setting.layers} whole while it attends"
    return [
        Verdict("memory", "cache / (budget x full)", _worst(_pruned(measured), over_budget, max), 1.02),
        Verdict(
            "memory",
            f"batch {batch}: peak saved / bytes pruned",
            _worst(_pruned(measured, batch), peak_saved, min),
            0.9,
            least=True,
            bound=bound,
        ),
    ]


def _cpu(measured: Measured, setting: Setting) -> list[Verdict]:
    where = "CPU, scaled model"
    applies = not setting.on_gpu and setting.model == "scaled"
    rows = _pruned(measured, SOME) if applies else []
    whole, full = measured.find(SOME, "csp"), measured.find(SOME, "static")

    def attention(row: Row) -> float | None:
        if whole is None:
            return None
        mine, all_ = row.turns[-1], whole.turns[-1]
        if mine.attention_s is None or all_.attention_s is None:
            return None
        return mine.attention_s / all_.attention_s / (mine.attention_tokens / all_.attention_tokens)

    empty, bound = measured.find(SOME, "csp", None) if applies else None, "-"
    if empty is not None and empty.turns[-1].attention_s is not None:
        bound = f"calls over {empty.arm.kept} tokens: {1e3 * empty.turns[-1].attention_s:.2g} ms"
    alone, untouched = measured.find(1, "csp"), measured.find(1, "static")
    eager = None
    if not setting.compiled and alone is not None and untouched is not None:
        eager = alone.relative_to(untouched)
    slowest = _worst(
        _pruned(measured, SOME, full=True) if applies and full else [],
        lambda row: row.relative_to(full) if full else None,
        max,
    )
    return [
        Verdict(
            where,
            f"batch {SOME}: attention / its share of tokens",
            _worst(rows, attention, max),
            1.2,
            bound=bound,
        ),
        Verdict(where, f"batch {SOME}: step / static, any budget", slowest, 1.0),
        Verdict("eager", "batch 1, 100 %: step / static", eager, 1.05),
    ]


def _prefill(measured: Measured, setting: Setting) -> list[Verdict]:
    share = _worst(_pruned(measured), lambda row: row.prune, max)
    what = "scoring, selecting, compacting / prefill"
    return [
        Verdict("GPU", what, share if setting.on_gpu else None, 0.02),
        Verdict("CPU", what, None if setting.on_gpu else share, 0.1),
    ]
