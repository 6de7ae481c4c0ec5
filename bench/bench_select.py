"""select against eager torch: the same rule with all ties, and a plain argsort that leaves ties to chance.

    python bench/bench_select.py [--json] [--quick]

The bound is the time to read both score lists once at the read bandwidth measured here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import arguments, interleave, read_bandwidth, report
from torch import Tensor

import csp_ext

Scores = tuple[Tensor, Tensor]
SHAPES = {"LLaVA-7B": (1, 32, 4096, 64, 820), "GQA": (1, 4, 8192, 64, 1640), "shared": (1, 1, 4096, 64, 820)}


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
    """`select` of one unpadded row [1, H, L] at rho = 0.5 by torch's own ops; recent is the window."""
    window, keys = queries.shape[1], modality.shape[1]
    count, k = keys - window, budget - window
    own, other = (score[0, :, :count] for score in scores)
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
    recent = torch.arange(count, keys).expand(own.shape[0], -1)
    return torch.cat([chosen.sort(dim=-1).values, recent], dim=-1).int()[None]


def max_pool(values: Tensor, kinds: Tensor, kernel: int = 7) -> Tensor:
    """Maximum over the neighbours of the same run."""
    run = torch.cat([kinds.new_zeros(1, dtype=torch.long), (kinds[1:] != kinds[:-1]).cumsum(0)])
    half = kernel // 2
    windows = torch.nn.functional.pad(values, (half, half), value=-torch.inf).unfold(-1, kernel, 1)
    runs = torch.nn.functional.pad(run, (half, half), value=-1).unfold(-1, kernel, 1)
    return windows.masked_fill(runs != run[:, None], -torch.inf).amax(-1)


def prompt(keys: int) -> Tensor:
    """Modality [1, L] of a prompt with 576-token images between stretches of text."""
    modality = torch.zeros(1, keys, dtype=torch.int8)
    for start in range(35, keys - 700, 640):
        modality[:, start : start + 576] = 1
    return modality


def sides_of(
    scores: Scores, modality: Tensor, queries: Tensor, budget: int, combine: str, pool: str
) -> dict[str, Callable[[], Tensor]]:
    """Our side and both peers; the peer with ties must agree where rounding cannot flip a key."""
    options = {"budget": budget, "combine": combine, "pool": pool}
    sides = {
        "csp": lambda: csp_ext.select(*scores, modality, queries, **options)[0],
        "ties": lambda: eager(scores, modality, queries, **options, ties=True),
        "no ties": lambda: eager(scores, modality, queries, **options, ties=False),
    }
    if combine != "calibrated" and not torch.equal(sides["csp"](), sides["ties"]()):
        raise SystemExit(f"select and its eager peer disagree: {options}")
    return sides


def main() -> None:
    options = arguments(__doc__)
    repeats = 3 if options.quick else 25
    bandwidth = read_bandwidth()
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for name, (batch, heads, keys, window, budget) in SHAPES.items():
        modality = prompt(keys)
        queries = modality[:, -window:].clone()
        queries[:, : window // 2] = 1  # both lists are valid everywhere
        # log-normal, like column sums of softmax rows
        own, other = torch.randn(2, batch, heads, keys).mul(1.5).exp() / keys
        for combine in ("intersection", "union", "calibrated"):
            for pool in ("none", "max"):
                sides = sides_of((own, other), modality, queries, budget, combine, pool)
                times = {side: timing.median for side, timing in interleave(sides, repeats).items()}
                rows.append(
                    {
                        "case": f"{name} H={heads} L={keys} T={budget} {combine} pool={pool}",
                        "csp ms": times["csp"] * 1e3,
                        "us / row": times["csp"] * 1e6 / (batch * heads),
                        "eager, ties": times["ties"] / times["csp"],
                        "eager, no ties": times["no ties"] / times["csp"],
                        "read bound ms": 2 * own.numel() * 4 / bandwidth * 1e3,
                    }
                )
    report("select: eager time / csp time", rows, options.json)


if __name__ == "__main__":
    main()
