"""What bounds a step: the bytes it must read, and the work that pruning cannot touch."""

from __future__ import annotations

import statistics

from csp_ext.speed.measure import Measured, Row


def read_tokens(row: Row) -> float:
    """Return how many tokens of the cache a step reads per row, the mean over the measured steps."""
    return statistics.fmean(turn.read_tokens for turn in row.turns)


def roofline_s(measured: Measured, row: Row) -> float:
    """Return the seconds of a step that does nothing but read weights and cache at the measured rate."""
    cache = row.batch * read_tokens(row) * measured.slot
    return (measured.weights + cache) / measured.bandwidth


def amdahl_s(measured: Measured, row: Row) -> float | None:
    """Return the seconds of a step whose time over the cache falls with the tokens that it reads.

    On the line between the step over next to no cache and the one over the untouched static cache; None
    where one of them was not measured.
    """
    full, rest = measured.find(row.batch, "static"), measured.find(row.batch, "csp", None)
    if full is None or rest is None:
        return None
    least, most = read_tokens(rest), read_tokens(full)
    share = (read_tokens(row) - least) / (most - least)
    return rest.step_s + share * (full.step_s - rest.step_s)
