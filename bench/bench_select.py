"""select against eager torch: the same rule with all ties, and a plain argsort that leaves ties to chance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from harness import Bench, Target, arguments, at_most
from problems import Problem, cpu_problems, gpu_problems
from torch import Tensor

import csp_ext

Scores = tuple[Tensor, Tensor]
RULES = [(combine, pool) for combine in ("intersection", "union", "calibrated") for pool in ("none", "max")]


def order_of(values: Tensor, tie: Tensor | None) -> Tensor:
    """Indices [H, N], best first; ties by `tie` and then the later position, or left to the sort."""
    if tie is None:
        return values.argsort(dim=-1, descending=True)
    order = tie.flip(-1).argsort(dim=-1, descending=True, stable=True)
    order = values.shape[-1] - 1 - order
    return order.gather(-1, values.gather(-1, order).argsort(dim=-1, descending=True, stable=True))


def ranks_of(values: Tensor, valid: Tensor, tie: Tensor | None) -> Tensor:
    """1-based ranks [H, N] among the valid entries."""
    order = order_of(values.masked_fill(~valid, -torch.inf), tie)
    places = torch.arange(1, values.shape[-1] + 1, device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def eager(
    scores: Scores, modality: Tensor, queries: Tensor, *, budget: int, combine: str, pool: str, ties: bool
) -> Tensor:
    """`select` [B, H, T] at rho = 0.5 by torch's ops; rows share their modalities, recent is the window."""
    window, keys = queries.shape[1], modality.shape[1]
    count, k = keys - window, budget - window
    own, other = (score.flatten(0, 1)[:, :count] for score in scores)
    kinds = modality[0, :count]
    same = queries[0][:, None] == kinds[None, :]
    valid_self, valid_cross = same.any(0), (~same).any(0)
    tie = own + other if ties else None
    if pool == "max":
        own, other = max_pool(own, kinds), max_pool(other, kinds)
    if combine == "calibrated":
        own, other = own * valid_self, other * valid_cross
        key = own / own.sum(-1, keepdim=True) + other / other.sum(-1, keepdim=True)
    else:
        missing = 2 * count + 1 if combine == "union" else 0
        key_self = ranks_of(own, valid_self, tie).masked_fill(~valid_self, missing)
        key_cross = ranks_of(other, valid_cross, tie).masked_fill(~valid_cross, missing)
        key = -(torch.minimum if combine == "union" else torch.maximum)(key_self, key_cross)
    chosen = order_of(key, tie)[:, :k] if ties else key.topk(k, dim=-1).indices
    recent = torch.arange(count, keys, device=modality.device).expand(own.shape[0], -1)
    return torch.cat([chosen.sort(dim=-1).values, recent], dim=-1).int().view(*scores[0].shape[:2], -1)


def max_pool(values: Tensor, kinds: Tensor, kernel: int = 7) -> Tensor:
    """Maximum over the neighbours of the same run."""
    run = torch.cat([kinds.new_zeros(1, dtype=torch.long), (kinds[1:] != kinds[:-1]).cumsum(0)])
    half = kernel // 2
    windows = torch.nn.functional.pad(values, (half, half), value=-torch.inf).unfold(-1, kernel, 1)
    runs = torch.nn.functional.pad(run, (half, half), value=-1).unfold(-1, kernel, 1)
    return windows.masked_fill(runs != run[:, None], -torch.inf).amax(-1)


def targets(problem: Problem) -> list[Target]:
    """Return what the GPU is to reach."""
    if problem.model != "LLaVA-1.5-7B" or problem.batch == 8:
        return []
    return [at_most(8 if problem.batch == 1 else 15)]


def measure(bench: Bench, problem: Problem, combine: str, pool: str) -> None:
    """Measure one problem by one rule."""
    modality = problem.modality(bench.device)
    queries = modality[:, -problem.window :].clone()  # of both kinds: both lists are valid everywhere
    # log-normal, like column sums of softmax rows
    shape = (2, problem.batch, problem.num_kv_heads, problem.keys)
    own, other = torch.randn(shape, device=bench.device).mul(1.5).exp() / problem.keys
    options = {"budget": problem.budget, "combine": combine, "pool": pool}

    def ours() -> Tensor:
        return csp_ext.select(own, other, modality, queries, **options)[0]

    def peer(ties: bool) -> Tensor:
        return eager((own, other), modality, queries, **options, ties=ties)

    # calibrated keys are sums, whose rounding may flip a pair
    if combine != "calibrated" and not torch.equal(ours(), peer(ties=True)):
        raise SystemExit(f"select and its eager peer disagree: {options}")
    plan = bench.plan(
        "select",
        batch=problem.batch,
        score_heads=problem.num_kv_heads,
        keys=problem.keys,
        window=problem.window,
        budget=problem.budget,
        pool=pool,
        combine=combine,
    )
    bench.row(
        f"{problem.model} B={problem.batch} {combine} pool={pool}",
        ours,
        {"eager, ties": lambda: peer(ties=True), "eager, no ties": lambda: peer(ties=False)},
        plan,
        targets=targets(problem),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    bench = Bench("select, T=20 %", arguments(__doc__, argv))
    problems = gpu_problems()[:-1] if bench.for_gpu else cpu_problems([torch.float32])
    for problem in bench.few(problems):
        for combine, pool in RULES:
            measure(bench, problem, combine, pool)
    bench.report()


if __name__ == "__main__":
    main()
