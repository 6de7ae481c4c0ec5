"""segmented_column_sum against two masked sums in eager torch, and against reading the matrix once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from harness import Bench, arguments, name_of
from problems import Problem, cpu_problems, gpu_problems
from torch import Tensor

import csp_ext


def eager(attn: Tensor, query_modality: Tensor, key_modality: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the weights of the same and of the other modality."""
    same = (query_modality[:, :, None] == key_modality[:, None])[:, None]
    return (
        torch.where(same, attn, 0).sum(2, dtype=torch.float32),
        torch.where(same, 0, attn).sum(2, dtype=torch.float32),
    )


def measure(bench: Bench, problem: Problem) -> None:
    """Measure one problem."""
    shape = (problem.batch, problem.num_heads, problem.window, problem.keys)
    attn = torch.rand(shape, device=bench.device).to(problem.dtype)
    keys = problem.modality(bench.device)
    queries = keys[:, -problem.window :].contiguous()
    bench.row(
        f"{problem.case} O={problem.window}",
        lambda: csp_ext.segmented_column_sum(attn, queries, keys),
        {
            "eager": lambda: eager(attn, queries, keys),
            "one plain sum": lambda: attn.sum(2, dtype=torch.float32),
        },
        bench.plan(
            "segmented_column_sum",
            batch=problem.batch,
            num_heads=problem.num_heads,
            window=problem.window,
            keys=problem.keys,
            dtype=name_of(problem.dtype),
        ),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    bench = Bench("segmented_column_sum", arguments(__doc__, argv))
    whole = [  # what H2O sums: every query of the prompt
        Problem("H2O, every query", 1, 4, 4, 2048, 2048, 128, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for problem in bench.few(gpu_problems((32, 410)) if bench.for_gpu else [*cpu_problems()[:2], *whole]):
        measure(bench, problem)
    bench.report()


if __name__ == "__main__":
    main()
