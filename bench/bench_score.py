"""score against eager torch and the bare q.k product.

Our side multiplies q.k twice (for the normaliser, then for the sums), with `lse` given once; GFLOP and the
bound count it once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from harness import Bench, Target, arguments, at_most, copy_share, matrix_share, variant_share
from problems import Problem, cpu_problems, gpu_problems
from torch import Tensor

from csp_ext import score


def eager(query: Tensor, key: Tensor, modality: Tensor, n: float = 1.0) -> tuple[Tensor, Tensor]:
    """Score as one writes it in torch: logits, masked n-softmax, two masked sums. Holds O x L per head."""
    batch, num_heads, window, head_dim = query.shape
    num_kv_heads, length = key.shape[1:3]
    grouped = query.reshape(batch, num_kv_heads, -1, head_dim)
    logits = torch.matmul(grouped, key.transpose(-1, -2)).reshape(batch, num_heads, window, length)
    position = torch.arange(length, device=query.device)
    hidden = (position > position[-window:, None]) | (modality < 0)[:, None, None]
    logits = (logits.float() * head_dim**-0.5).masked_fill_(hidden, float("-inf"))
    top = logits.amax(-1, keepdim=True).clamp_(min=0)
    weights = logits.sub_(top).exp_()
    weights /= weights.sum(-1, keepdim=True) + n * torch.exp(-top)
    same = (modality[:, None, -window:, None] == modality[:, None, None]).float()
    own = (weights * same).sum(-2)
    other = (weights * (1 - same)).sum(-2)
    shape = (batch, num_kv_heads, -1, length)
    return own.reshape(shape).mean(2), other.reshape(shape).mean(2)


def targets(problem: Problem) -> list[Target]:
    """Return what the GPU is to reach."""
    if problem.window > 32:
        return [matrix_share(0.5, passes=2), variant_share("lse given", 0.5)]
    if problem.model != "LLaVA-1.5-7B":
        return []
    return [at_most(12) if problem.batch == 1 else copy_share(0.8)]


def compare(bench: Bench, problem: Problem) -> None:
    """Time one problem against both peers."""
    query, key = problem.query(bench.device), problem.cache(bench.device)
    modality = problem.modality(bench.device)
    lse = torch.full(query.shape[:3], 9.0, device=bench.device)
    grouped = query.reshape(problem.batch, problem.num_kv_heads, -1, problem.head_dim)
    product = query.new_empty((*grouped.shape[:3], problem.keys))
    if problem.batch == 1:
        limit = 1e-4 if problem.dtype == torch.float32 else 1e-2
        for got, want in zip(score(query, key, modality), eager(query, key, modality), strict=True):
            error = ((got - want).norm() / want.norm()).item()
            assert error < limit, f"score and eager torch differ by {error} of the norm"
    bench.row(
        f"{problem.case} O={problem.window}",
        lambda: score(query, key, modality),
        {
            "eager": lambda: eager(query, key, modality),
            "matmul": lambda: torch.matmul(grouped, key.transpose(-1, -2), out=product),
        },
        bench.plan("score", **problem.shape()),
        variants={"lse given": lambda: score(query, key, modality, lse=lse)},
        targets=targets(problem),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print one row per problem."""
    bench = Bench("score", arguments(__doc__, argv))
    floats = (torch.float32, torch.bfloat16, torch.float16)
    for problem in bench.few(gpu_problems((32, 410)) if bench.for_gpu else cpu_problems(floats, (64, 8))):
        compare(bench, problem)
    bench.report()


if __name__ == "__main__":
    main()
