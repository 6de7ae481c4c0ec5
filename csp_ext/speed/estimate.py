"""What pruning can gain at most where memory is the limit: the bytes of a step, without running one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from csp_ext.config import slots_of
from csp_ext.demo.report import size
from csp_ext.speed.loading import Source
from csp_ext.speed.shapes import skeleton, step_weight_bytes
from csp_ext.speed.workload import slot_bytes

HEAD = ("batch", "budget", "prompt's cache", "read per step", "of full", "at most")


def estimate(
    source: Source, batches: Sequence[int], budgets: Sequence[float], tokens: int, new_tokens: int
) -> list[dict[str, Any]]:
    """Return for every batch and budget what a step in the middle of the answer reads.

    Parameters
    ----------
    source : Source
        The model; nothing of it is loaded.
    batches : sequence of int
        Rows.
    budgets : sequence of float
        Shares of the prompt.
    tokens, new_tokens : int
        Of each row.
    """
    weights = step_weight_bytes(skeleton(source.config, source.dtype))
    slot = slot_bytes(source.config, source.dtype)
    found = []
    for batch in batches:
        full = weights + batch * slot * (tokens + new_tokens / 2)
        for budget in budgets:
            kept = slots_of(budget, tokens)
            read = weights + batch * slot * (kept + new_tokens / 2)
            found.append(
                {
                    "batch": batch,
                    "budget": budget,
                    "prompt_cache_bytes": batch * slot * kept,
                    "step_bytes": round(read),
                    "of_full": read / full,
                    "speedup_at_most": full / read,
                }
            )
    return found


def cells(numbers: dict[str, Any]) -> list[str]:
    """Return a row as text, in the order of :data:`HEAD`."""
    return [
        str(numbers["batch"]),
        f"{100 * numbers['budget']:.4g} %",
        size(numbers["prompt_cache_bytes"]),
        size(numbers["step_bytes"]),
        f"{numbers['of_full']:.1%}",
        f"{numbers['speedup_at_most']:.2f}x",
    ]
