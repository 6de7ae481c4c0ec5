"""dual_top_k against eager torch: two stable sorts (its tie rule), and two topk that leave ties to chance.

    python bench/bench_dual_top_k.py [--json] [--quick]

The bound is the time to read both score lists once at the read bandwidth measured here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import arguments, interleave, read_bandwidth, report
from torch import Tensor

import csp_ext

SHAPES = {"LLaVA-7B": ((1, 32, 4032), 378), "GQA": ((1, 4, 8128), 788), "one row": ((4032,), 378)}


def by_sort(scores: Tensor, k: int) -> Tensor:
    """The top k of [..., N] as a mask; of equal scores the later position."""
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.shape[-1] - 1 - order, True)


def by_topk(scores: Tensor, k: int) -> Tensor:
    """The top k of [..., N] as a mask; ties as torch.topk leaves them."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(k, sorted=False).indices, True)


def sides_of(own: Tensor, other: Tensor, k: int) -> dict[str, Callable[[], Tensor]]:
    """Our side and both peers; they must agree, as these scores hold no ties at the cut."""
    sides = {
        "csp": lambda: csp_ext.dual_top_k(own, other, k, k),
        "sort": lambda: by_sort(own, k) & by_sort(other, k),
        "topk": lambda: by_topk(own, k) & by_topk(other, k),
    }
    if not torch.equal(sides["csp"](), sides["sort"]()):
        raise SystemExit("dual_top_k and its eager peer disagree")
    return sides


def main() -> None:
    options = arguments(__doc__)
    repeats = 3 if options.quick else 25
    bandwidth = read_bandwidth()
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    for name, (shape, k) in SHAPES.items():
        own, other = torch.randn(2, *shape).mul(1.5).exp()
        times = {side: timing.median for side, timing in interleave(sides_of(own, other, k), repeats).items()}
        rows.append(
            {
                "case": f"{name} {list(shape)} k={k}",
                "csp ms": times["csp"] * 1e3,
                "us / row": times["csp"] * 1e6 * shape[-1] / own.numel(),
                "eager sort": times["sort"] / times["csp"],
                "eager topk": times["topk"] / times["csp"],
                "read bound ms": 2 * own.numel() * 4 / bandwidth * 1e3,
            }
        )
    report("dual_top_k: eager time / csp time", rows, options.json)


if __name__ == "__main__":
    main()
