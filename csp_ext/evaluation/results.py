"""From records to numbers: means, their errors, and differences between arms on the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from csp_ext.demo.console import require
from csp_ext.evaluation.arms import FULL
from csp_ext.evaluation.items import GROUPS, LEVELS

Record = dict[str, Any]
BOOTSTRAP_DRAWS = 4000
MOST_INDICES = 1 << 21
# What a difference was tested with.
MCNEMAR, BOOTSTRAP = "McNemar, exact", "paired bootstrap"


@dataclass(frozen=True)
class Mean:
    """A mean score, 0 to 1.

    Attributes
    ----------
    value : float
        Over several data sets: the unweighted mean of theirs.
    error : float
        Standard error, over the samples of all seeds; NaN where a data set has a single one.
    count : int
        Samples.
    """

    value: float
    error: float
    count: int


@dataclass(frozen=True)
class Difference:
    """One arm minus another, on the samples that both have.

    Attributes
    ----------
    value, error, count
        As in :class:`Mean`, of the differences sample by sample.
    better, worse : int
        Samples on which the arm scores higher, and lower.
    p : float
        Two-sided, for no difference.
    test : str
        ``MCNEMAR`` where all scores are 0 or 1, over the samples of all data sets; else ``BOOTSTRAP``.
    """

    value: float
    error: float
    count: int
    better: int
    worse: int
    p: float
    test: str


def labels(records: Sequence[Record]) -> list[str]:
    """Return the arms, in the order that they appear in."""
    return list(dict.fromkeys(record["arm"] for record in records))


def groups(records: Sequence[Record]) -> list[str]:
    """Return the groups of data sets: MileBench's own first, the others in the order that they appear in."""
    found = dict.fromkeys(record["group"] for record in records)
    return [group for group in GROUPS if group in found] + [group for group in found if group not in GROUPS]


def chosen(
    records: Sequence[Record],
    *,
    arm: str | None = None,
    dataset: str | None = None,
    group: str | None = None,
    level: str | None = None,
) -> list[Record]:
    """Return the records of an arm, a data set, a group, a level of how many images there are."""
    wanted = {"arm": arm, "dataset": dataset, "group": group, "level": level}
    given = {key: value for key, value in wanted.items() if value is not None}
    return [record for record in records if all(record[key] == value for key, value in given.items())]


def levels(records: Sequence[Record]) -> list[str]:
    """Return MileBench's levels of how many images a sample has, from few to many."""
    found = {record["level"] for record in records}
    return [level for level in LEVELS if level in found]


def one_protocol(records: Sequence[Record]) -> str:
    """Return the protocol of all records.

    Raises
    ------
    ValueError
        If there is no record, or they are of several protocols, which nothing compares.
    """
    protocols = sorted({record["protocol"] for record in records})
    if len(protocols) != 1:
        raise ValueError(f"records must be of one protocol, got {', '.join(protocols) or 'none'}")
    return protocols[0]


def mean(records: Sequence[Record], arm: str, **where: str) -> Mean:
    """Return the mean score of an arm on a data set, a group, a level, or the whole suite.

    `where` chooses as in :func:`chosen`, such as ``dataset="WebQA"``.

    Raises
    ------
    ValueError
        If there is no such record, or the records are of several protocols.
    """
    one_protocol(records)
    scores = [np.array(values) for values in _by_dataset(chosen(records, arm=arm, **where)).values()]
    if not scores:
        place = ", ".join(where.values()) or "some data set"
        raise ValueError(f"records must hold {arm!r} on {place}, got none")
    return Mean(*_mean_of_means(scores))


def retention(records: Sequence[Record], arm: str, **where: str) -> float:
    """Return an arm's mean score as a share of the full cache's; NaN where that is 0 or was not run.

    `where` chooses as in :func:`mean`.
    """
    if not chosen(records, arm=FULL, **where):
        return math.nan
    full = mean(records, FULL, **where).value
    return mean(records, arm, **where).value / full if full else math.nan


def compare(records: Sequence[Record], arm: str, other: str, **where: str) -> Difference:
    """Compare two arms on the samples that both have; `where` chooses as in :func:`mean`.

    Raises
    ------
    ValueError
        If there are no such samples, or the records are of several protocols.
    """
    one_protocol(records)
    pairs = _pairs(
        chosen(records, arm=arm, **where),
        chosen(records, arm=other, **where),
    )
    if not pairs:
        raise ValueError(f"{arm!r} and {other!r} must share samples, got none")
    gaps = [np.subtract(*np.array(of_dataset).T) for of_dataset in pairs.values()]
    value, error, count = _mean_of_means(gaps)
    every = np.concatenate(gaps)
    better, worse = int((every > 0).sum()), int((every < 0).sum())
    binary = all(score in (0, 1) for of_dataset in pairs.values() for pair in of_dataset for score in pair)
    p = mcnemar(better, worse) if binary else _bootstrap(gaps)
    return Difference(value, error, count, better, worse, p, MCNEMAR if binary else BOOTSTRAP)


def mcnemar(better: int, worse: int) -> float:
    """Return the two-sided p value of the exact test: under no difference both counts are equally likely."""
    require("eval", "scipy")
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def _bootstrap(gaps: list[NDArray[np.float64]]) -> float:
    """Return the two-sided p value of a bootstrap within each data set, of differences centred on none."""
    rng = np.random.default_rng(0)
    observed = abs(float(np.mean([gap.mean() for gap in gaps])))
    drawn = np.zeros(BOOTSTRAP_DRAWS)
    for gap in gaps:
        centred = gap - gap.mean()
        # In parts, so that the indices of a large data set do not fill the memory.
        for part in np.array_split(drawn, 1 + BOOTSTRAP_DRAWS * len(gap) // MOST_INDICES):
            part += centred[rng.integers(0, len(gap), (len(part), len(gap)))].mean(1)
    # Sums that are equal on paper may differ in their last bits.
    hits = int((np.abs(drawn / len(gaps)) >= observed - 1e-12).sum())
    # Of few samples that agree a bootstrap sees no chance at all: their signs cannot say more than this.
    signs = sum(int((gap != 0).sum()) for gap in gaps)
    return min(1.0, max((1 + hits) / (1 + BOOTSTRAP_DRAWS), 2 * 0.5**signs))


def _by_dataset(records: Sequence[Record]) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {}
    for record in records:
        scores.setdefault(record["dataset"], []).append(record["score"])
    return scores


def _pairs(ones: Sequence[Record], others: Sequence[Record]) -> dict[str, list[tuple[float, float]]]:
    """Return per data set the scores of the samples that both arms have."""
    sample = ("seed", "dataset", "sample_id")
    known = {tuple(record[key] for key in sample): record["score"] for record in others}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for record in ones:
        key = tuple(record[key] for key in sample)
        if key in known:
            pairs.setdefault(record["dataset"], []).append((record["score"], known[key]))
    return pairs


def _mean_of_means(scores: list[NDArray[np.float64]]) -> tuple[float, float, int]:
    """Return the mean over data sets, its standard error and the number of samples."""
    value = float(np.mean([values.mean() for values in scores]))
    count = sum(map(len, scores))
    if min(map(len, scores)) < 2:
        return value, math.nan, count
    variances = [values.var(ddof=1) / len(values) for values in scores]
    return value, math.sqrt(sum(variances)) / len(scores), count
