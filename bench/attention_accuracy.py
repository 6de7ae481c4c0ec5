"""How far every way to attend to a pruned cache is from float64: the largest error of each combination.

python bench/attention_accuracy.py [--seeds 8] [--folder bench/results]
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from pages import Facts, keep
from rich.progress import track

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "python_tests"))

from attention_combinations import (  # noqa: E402
    ATTENTIONS,
    BATCHES,
    DECODE_N,
    HEADS,
    QUERIES,
    Combination,
    combinations,
    run,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
STORES = {False: "dynamic", True: "static"}
Worst = dict[tuple[Combination, int], float]  # by combination and new queries


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Models and tokens drawn for each combination.")] = 8,
    folder: Annotated[Path, typer.Option(help="The results folder.")] = HERE / "results",
) -> None:
    torch.set_num_threads(1)
    facts = Facts()
    worst = measure(seeds)
    about = facts.lines(
        __file__,
        model="one layer of a LLaVA with random weights, 4 query heads of 16, 4 or 2 KV heads",
        cases=f"{len(worst)}: every combination and number of new tokens; {seeds} seeds each",
    )
    keep(report(about, worst), __file__, folder)


def measure(seeds: int) -> Worst:
    """Return the largest error of every combination over the seeds."""
    worst: Worst = defaultdict(float)
    for case in track(list(combinations(DTYPES)), "cases", transient=True):
        for seed in range(seeds):
            for step in run(replace(case, seed=seed)):
                worst[case, step.queries] = max(worst[case, step.queries], step.error)
    return worst


PREFACE = """\
A prompt is pruned and new tokens follow, 1, 3 and 9 at a time. What the layer's attention returns is compared
with an n-softmax in float64 over the full cache, from the same queries, keys and values, in which what the
layer dropped is masked. A cell is the largest difference of any element, divided by the largest value that is
attended to; n is the constant of the n-softmax. `csp` and `flash_attention_2` decode with `csp::decode`, more
than 8 tokens at a time with sdpa, and a prompt within its budget in a growing cache as the model did before;
flash-attn itself is a stand-in in plain torch."""


def report(head: str, worst: Worst) -> str:
    """Return the page: what was measured, and per dtype the tables."""
    parts = ["# How far every attention over a pruned cache is from float64", head, PREFACE]
    ways = [f"{attention}, n = {n:g}" for attention in ATTENTIONS for n in DECODE_N]
    caches = [f"{batch}, {store}" for batch in BATCHES for store in STORES.values()]
    shapes = [f"{count} at a time, {heads} KV heads" for count in QUERIES for heads in (HEADS, HEADS // 2)]
    for dtype in DTYPES:
        chosen = {key: error for key, error in worst.items() if key[0].dtype == dtype}
        parts += [
            f"## {str(dtype).removeprefix('torch.')}",
            f"One rounding is {torch.finfo(dtype).eps / 2:.1e}. The largest of all steps and KV heads:",
            table(chosen, ways, caches, way_and_cache),
            "The largest of all caches and n:",
            table(chosen, ATTENTIONS, shapes, attention_and_shape),
        ]
    return "\n\n".join(parts) + "\n"


def way_and_cache(case: Combination, _count: int) -> tuple[str, str]:
    """Return the row and the column of a case in the first table."""
    return f"{case.attention}, n = {case.decode_n:g}", f"{case.batch}, {STORES[case.static]}"


def attention_and_shape(case: Combination, count: int) -> tuple[str, str]:
    """Return the row and the column of a case in the second table."""
    return case.attention, f"{count} at a time, {case.kv_heads} KV heads"


def table(
    worst: Worst,
    rows: Sequence[str],
    columns: Sequence[str],
    place: Callable[[Combination, int], tuple[str, str]],
) -> str:
    """Return a Markdown table of the largest error in each cell; `place` says which row and column."""
    cells: dict[tuple[str, str], float] = defaultdict(float)
    for (case, count), error in worst.items():
        cells[place(case, count)] = max(cells[place(case, count)], error)
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {row} | " + " | ".join(f"{cells[row, name]:.1e}" for name in columns) + " |" for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
