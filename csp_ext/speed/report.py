"""Measurements as tables: for people, and in numbers."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from typing import Any

from csp_ext.demo.report import size
from csp_ext.speed.bounds import amdahl_s, read_tokens, roofline_s
from csp_ext.speed.measure import Measured, Row

HEAD = (
    "",
    "ms/token",
    "quartiles",
    "of static",
    "tokens/s",
    "roofline",
    "Amdahl",
    "attention",
    "first token",
    "pruning",
    "cache",
    "of full",
    "stored",
    "peak",
)
NOTES = (
    "ms/token: a decode step (the forward of one token per row and the choice of the next), the median and "
    "the quartiles over all rounds; of static: of the untouched model's over transformers' StaticCache, "
    "round by round. tokens/s: of all rows.",
    "roofline: ms to read the step's weights and the cached tokens it attends to, at the bandwidth measured "
    "in this run; what fits into the processor's own cache can be faster. Amdahl: ms if the time over the "
    "cache fell with the tokens read: between the step over a few tokens and the one over the static cache; "
    "less is possible where csp::decode attends faster than scaled_dot_product_attention does.",
    "attention: ms of csp::decode or scaled_dot_product_attention in an eager step, from torch's profiler, "
    "at the end of the generation.",
    "first token: seconds from ids and pixels to the first new token, pruning included. pruning: the part of "
    "the prefill that scores, selects and compacts (at 100 % only copies into the fixed cache), from torch's "
    "profiler.",
    "cache: keys and values of the prompt as stored, and their share of the full prompt's; stored: all keys "
    "and values at the end, room for new tokens included. peak: most memory that prefill and decode held "
    "beside model and inputs: the allocator's on a GPU; on a CPU the resident set's, in a round of its own "
    "with few steps.",
    "static, dynamic: the untouched model over a StaticCache and a DynamicCache. gather: after an untouched "
    "prefill as many evenly spaced tokens are gathered and grow by cat; quick, because it ignores padding, "
    "sets per head, scores and the positions of what stays. All arms take turns within a round.",
)


# Of a row, in the order that :func:`record` computes them.
_NUMBERS = (
    "ms_per_token",
    "ms_quartile_1",
    "ms_quartile_3",
    "of_static",
    "tokens_per_s",
    "read_tokens",
    "roofline_ms",
    "amdahl_ms",
    "attention_ms",
    "first_token_ms",
    "prune_share_of_prefill",
    "prompt_cache_bytes",
    "of_full_prompt_cache",
    "stored_bytes",
    "peak_bytes",
)


def record(measured: Measured, row: Row) -> dict[str, Any]:
    """Return a row in plain numbers; None where there is none."""
    arm = row.arm
    about: dict[str, Any] = {
        "batch": row.batch,
        "arm": arm.name,
        "kind": arm.kind,
        "budget": arm.budget,
        "kept_tokens": arm.kept,
    }
    if not row.turns:
        return about | dict.fromkeys(_NUMBERS) | {"failure": row.failure}
    static, low_high, last = measured.find(row.batch, "static"), row.quartiles_s, row.turns[-1]
    amdahl, full = amdahl_s(measured, row), row.batch * measured.tokens * measured.slot
    numbers = (
        1e3 * row.step_s,
        1e3 * low_high[0],
        1e3 * low_high[1],
        None if static is None else row.relative_to(static),
        row.batch / row.step_s,
        read_tokens(row),
        1e3 * roofline_s(measured, row),
        None if amdahl is None else 1e3 * amdahl,
        None if last.attention_s is None else 1e3 * last.attention_s,
        1e3 * row.first_s,
        row.prune,
        last.prompt_bytes,
        last.prompt_bytes / full,
        last.stored,
        row.peak,
    )
    return about | dict(zip(_NUMBERS, numbers, strict=True)) | {"failure": ""}


def rounds(row: Row) -> list[dict[str, Any]]:
    """Return what each round of a row gave, its steps as their median."""
    result = []
    for turn in row.turns:
        steps = turn.step_s
        result.append(asdict(turn) | {"step_s": statistics.median(steps), "steps": len(steps)})
    return result


def cells(measured: Measured, row: Row) -> list[str]:
    """Return a row as text, in the order of :data:`HEAD`."""
    if not row.turns:
        return [row.arm.name, row.failure, *["-"] * (len(HEAD) - 2)]
    numbers = record(measured, row)

    def shown(name: str, text: str) -> str:
        return "-" if numbers[name] is None else text.format(numbers[name])

    return [
        row.arm.name,
        shown("ms_per_token", "{:.2f}"),
        f"{numbers['ms_quartile_1']:.2f} to {numbers['ms_quartile_3']:.2f}",
        shown("of_static", "{:.1%}"),
        shown("tokens_per_s", "{:.1f}"),
        shown("roofline_ms", "{:.2f}"),
        shown("amdahl_ms", "{:.2f}"),
        shown("attention_ms", "{:.2f}"),
        f"{numbers['first_token_ms'] / 1e3:.2f} s",
        shown("prune_share_of_prefill", "{:.1%}"),
        size(numbers["prompt_cache_bytes"]),
        shown("of_full_prompt_cache", "{:.1%}"),
        size(numbers["stored_bytes"]),
        "-" if row.peak is None else size(row.peak),
    ]
