"""dual_top_k against eager torch: two stable sorts (its tie rule), and two topk that leave ties to chance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from harness import Bench, arguments
from problems import Problem, cpu_problems, gpu_problems
from torch import Tensor

import csp_ext


def by_sort(scores: Tensor, k: int) -> Tensor:
    """The top k of [..., N] as a mask; of equal scores the later position."""
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.shape[-1] - 1 - order, True)


def by_topk(scores: Tensor, k: int) -> Tensor:
    """The top k of [..., N] as a mask; ties as torch.topk leaves them."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(k, sorted=False).indices, True)


def measure(bench: Bench, problem: Problem) -> None:
    """Measure one problem: candidates are all keys but the window; each list picks half of the budget."""
    rows, keys = problem.batch * problem.num_kv_heads, problem.keys - problem.window
    k = (problem.budget - problem.window) // 2
    # log-normal, like column sums of softmax rows, without ties at the cut
    own, other = torch.randn(2, rows, keys, device=bench.device).mul(1.5).exp()
    if not torch.equal(csp_ext.dual_top_k(own, other, k, k), by_sort(own, k) & by_sort(other, k)):
        raise SystemExit("dual_top_k and its eager peer disagree")
    bench.row(
        f"{problem.model} B={problem.batch} [{rows}, {keys}] k={k}",
        lambda: csp_ext.dual_top_k(own, other, k, k),
        {
            "eager sort": lambda: by_sort(own, k) & by_sort(other, k),
            "eager topk": lambda: by_topk(own, k) & by_topk(other, k),
        },
        bench.plan("dual_top_k", rows=rows, keys=keys, k_self=k, k_cross=k),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    bench = Bench("dual_top_k", arguments(__doc__, argv))
    problems = gpu_problems()[:-1] if bench.for_gpu else cpu_problems([torch.float32])
    for problem in bench.few(problems):
        measure(bench, problem)
    bench.report()


if __name__ == "__main__":
    main()
