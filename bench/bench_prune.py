"""prune against the same chain in eager torch and kvpress's SnapKV step, if installed; prune_ against prune.

Eager torch is matmul, masked n-softmax, two sums, ranks, gather and cat. SnapKV ranks by one score per key.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from clock import Side
from harness import Bench, Target, arguments, at_most, faster_than
from peers import snapkv
from problems import Problem, cpu_problems, gpu_problems
from torch import Tensor

import csp_ext


def eager_scores(query: Tensor, key: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 1 and 7 with the attention matrix of the window in memory, [B, Hkv, L] each."""
    batch, _, window, head_dim = query.shape
    num_kv_heads, length = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, num_kv_heads, -1, head_dim)  # [B, Hkv, G * O, D]
    logits = torch.matmul(grouped * head_dim**-0.5, key.transpose(2, 3)).float()
    logits = logits.view(batch, num_kv_heads, -1, window, length)
    position = torch.arange(length, device=key.device)
    hidden = (modality < 0)[:, None] | (position > position[length - window :, None])  # [B, O, L]
    logits.masked_fill_(hidden[:, None, None], -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    weights = (logits - lse).exp_() * lse.sigmoid_()
    same = (modality[:, length - window :, None] == modality[:, None]).float()[:, None, None]
    own = (weights * same).sum(-2).mean(2)
    other = (weights * (1 - same)).sum(-2).mean(2)
    return own, other


def eager_prune(
    query: Tensor, key: Tensor, value: Tensor, modality: Tensor, budget: int
) -> tuple[Tensor, Tensor]:
    """The exact-budget intersection at rho = 0.5, then gather and cat, as a careful user would write it."""
    recent = query.shape[2]
    old = key.shape[2] - recent
    own, other = eager_scores(query, key, modality)
    ranks = [s[..., :old].argsort(-1, descending=True).argsort(-1) for s in (own, other)]
    chosen = torch.maximum(*ranks).topk(budget - recent, largest=False).indices.sort(-1).values
    rows = chosen[..., None].expand(-1, -1, -1, key.shape[3])
    return (
        torch.cat([key.gather(2, rows), key[:, :, old:]], dim=2),
        torch.cat([value.gather(2, rows), value[:, :, old:]], dim=2),
    )


def targets(problem: Problem) -> list[Target]:
    """Return what the GPU is to reach."""
    if problem.model != "LLaVA-1.5-7B" or problem.batch != 1 or problem.window > 32:
        return []
    return [at_most(30), faster_than("eager", 15), faster_than("kvpress SnapKV", 10)]


def measure(bench: Bench, problem: Problem) -> None:
    """Measure one problem."""
    budget, window = problem.budget, problem.window
    query, key = problem.query(bench.device), problem.cache(bench.device)
    value, modality = problem.cache(bench.device), problem.modality(bench.device)
    scores = csp_ext.score(query, key, modality)
    indices, _ = csp_ext.select(*scores, modality, modality[:, -window:], budget=budget)
    peers: dict[str, Side] = {"eager": lambda: eager_prune(query, key, value, modality, budget)}
    press = snapkv(query, key, value, budget) if bench.for_gpu else None
    if press:
        peers["kvpress SnapKV"] = press
    bench.row(
        f"{problem.case} O={window}",
        lambda: csp_ext.prune(query, key, value, modality, budget=budget),
        peers,
        bench.plan("prune", **problem.shape(), budget=budget),
        variants={
            "score": lambda: csp_ext.score(query, key, modality),
            "select": lambda: csp_ext.select(*scores, modality, modality[:, -window:], budget=budget),
            "compact": lambda: csp_ext.compact(key, value, indices),
        },
        targets=targets(problem),
    )
    # every round prunes what the last one left behind: as many keys to as many slots
    bench.row(
        f"{problem.case} O={window}, in place",
        lambda: csp_ext.prune_(query, key, value, modality, budget=budget),
        {"prune": lambda: csp_ext.prune(query, key, value, modality, budget=budget)},
        bench.plan("prune_", **problem.shape(), budget=budget),
        memory=True,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    bench = Bench("prune, T=20 %", arguments(__doc__, argv))
    for problem in bench.few(gpu_problems((32, 410)) if bench.for_gpu else cpu_problems()):
        measure(bench, problem)
    bench.report()


if __name__ == "__main__":
    main()
