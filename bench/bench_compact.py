"""compact against torch's gather and cat, and plain copies of as many bytes; compact_ against compact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from harness import Bench, arguments, copy_share, name_of
from problems import Problem, cpu_problems, gpu_problems
from torch import Tensor

import csp_ext


def gather_and_cat(key: Tensor, value: Tensor, candidates: Tensor, recent: int) -> tuple[Tensor, Tensor]:
    """Do what releases do: gather the chosen rows of each cache, then append the recent ones."""
    rows = candidates[..., None].expand(-1, -1, -1, key.shape[3])
    return (
        torch.cat([key.gather(2, rows), key[:, :, key.shape[2] - recent :]], dim=2),
        torch.cat([value.gather(2, rows), value[:, :, value.shape[2] - recent :]], dim=2),
    )


def kept(problem: Problem, device: str) -> Tensor:
    """Return random kept rows [B, Hkv, T]: scattered candidates and the recent ones."""
    recent, rows = problem.window, problem.batch * problem.num_kv_heads
    scattered = torch.rand(rows, problem.keys - recent, device=device).argsort(-1)
    chosen = scattered[:, : problem.budget - recent].sort(-1).values
    last = torch.arange(problem.keys - recent, problem.keys, device=device).expand(rows, -1)
    return torch.cat([chosen, last], dim=1).view(problem.batch, problem.num_kv_heads, -1)


def measure(bench: Bench, problem: Problem) -> None:
    """Measure one problem."""
    key, value = problem.cache(bench.device), problem.cache(bench.device)
    indices, recent = kept(problem, bench.device), problem.window
    candidates, narrow = indices[..., : problem.budget - recent].contiguous(), indices.int()
    # a plain copy of as many bytes, new memory included
    key_rows, value_rows = (cache[:, :, : problem.budget].contiguous() for cache in (key, value))
    plan = bench.plan(
        "compact",
        batch=problem.batch,
        num_kv_heads=problem.num_kv_heads,
        keys=problem.keys,
        budget=problem.budget,
        head_dim=problem.head_dim,
        dtype=name_of(problem.dtype),
    )
    bench.row(
        problem.case,
        lambda: csp_ext.compact(key, value, narrow),
        {
            "gather + cat": lambda: gather_and_cat(key, value, candidates, recent),
            "clone": lambda: (key_rows.clone(), value_rows.clone()),
        },
        plan,
        targets=[copy_share(0.85)] if problem.batch >= 8 else [],
    )
    # every round moves what the last one left behind: as many rows by as many slots
    bench.row(
        f"{problem.case}, in place",
        lambda: csp_ext.compact_(key, value, narrow),
        {"compact": lambda: csp_ext.compact(key, value, narrow)},
        plan,
        memory=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    bench = Bench("compact, T=20 %", arguments(__doc__, argv))
    for problem in bench.few(gpu_problems() if bench.for_gpu else cpu_problems()):
        measure(bench, problem)
    bench.report()


if __name__ == "__main__":
    main()
