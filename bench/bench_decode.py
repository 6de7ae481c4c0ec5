"""decode against torch's and flash-attn's attention over the same cache.

On a GPU the peers are scaled_dot_product_attention and flash_attn_with_kvcache, without the n-softmax.
On the CPU it is `aten::_scaled_dot_product_flash_attention_for_cpu` with `out * sigmoid(lse)`. With fewer KV
heads than query heads it is timed twice, on the grouped cache, which it takes as it is, and on a cache
expanded beforehand (the copy is not charged).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from clock import Side
from harness import Bench, Target, arguments, copy_share, faster_than, name_of
from peers import flash_attn, sdpa
from problems import Problem, gpu_problems
from torch import Tensor

import csp_ext


def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the same by its formula, in float32."""
    batch, num_kv_heads, _, head_dim = key.shape
    grouped = query.view(batch, num_kv_heads, -1, head_dim).float()
    logits = torch.matmul(grouped, key.float().transpose(2, 3)) * head_dim**-0.5
    weights = torch.softmax(logits, -1) * torch.sigmoid(torch.logsumexp(logits, -1, keepdim=True))
    return torch.matmul(weights, value.float()).view(query.shape)


def cpu_flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return torch's attention with the n-softmax correction for n = 1."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    return out * torch.sigmoid(lse).to(out.dtype).unsqueeze(-1)


def cpu_sides(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Side]:
    """Return the CPU's peers, and a plain read of the very memory of the cache (a sum)."""
    plain = [cache.view(torch.float32) for cache in (key, value)]
    sides: dict[str, Side] = {
        "cpu flash": lambda: cpu_flash(query, key, value),
        "plain read": lambda: [x.sum() for x in plain],
    }
    group = query.shape[1] // key.shape[1]
    if group > 1:
        wide_key, wide_value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        sides["expanded"] = lambda: cpu_flash(query, wide_key, wide_value)
    return sides


def gpu_sides(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Side]:
    """Return the GPU's peers."""
    flash = flash_attn(query, key, value) if query.is_cuda else None
    return {"sdpa": sdpa(query, key, value), **({"flash-attn": flash} if flash else {})}


def targets(problem: Problem) -> list[Target]:
    """Return what the GPU is to reach."""
    shares = {1: [copy_share(0.6)], 24: [copy_share(0.85)]}
    mine = shares.get(problem.batch, []) if problem.model == "LLaVA-1.5-7B" else []
    return [*mine, faster_than("sdpa"), faster_than("flash-attn")]


def measure(bench: Bench, problem: Problem) -> None:
    """Measure one new query over a full cache."""
    query = problem.query(bench.device, queries=1)
    key, value = (problem.cache(bench.device) for _ in range(2))
    sides = gpu_sides if bench.for_gpu else cpu_sides
    want = formula(query, key, value)
    error = ((csp_ext.decode(query, key, value)[0].float() - want).norm() / want.norm()).item()
    assert error < (1e-4 if problem.dtype == torch.float32 else 1e-2), f"decode is off by {error} of the norm"
    plan = bench.plan(
        "decode",
        batch=problem.batch,
        num_heads=problem.num_heads,
        num_kv_heads=problem.num_kv_heads,
        capacity=problem.keys,
        head_dim=problem.head_dim,
        dtype=name_of(problem.dtype),
    )
    bench.row(
        f"{problem.model} {problem.num_heads}/{problem.num_kv_heads} B={problem.batch} C={problem.keys} "
        f"{name_of(problem.dtype)}",
        lambda: csp_ext.decode(query, key, value),
        sides(query, key, value),
        plan,
        targets=targets(problem),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print one row per cache, pruned and whole."""
    bench = Bench("decode, one new query", arguments(__doc__, argv))
    if bench.for_gpu:
        whole = bench.few(gpu_problems())
        problems = [replace(p, keys=keys) for p in whole for keys in (p.budget, p.keys)]
    else:
        problems = bench.few(
            [
                Problem("heads", 8, heads, kv_heads, 1, keys, 128, dtype)
                for dtype in (torch.float32, torch.bfloat16, torch.float16)
                for heads, kv_heads in ((32, 32), (28, 4))
                for keys in (820, 4096)
            ]
        )
    for problem in problems:
        measure(bench, problem)
    bench.report()


if __name__ == "__main__":
    main()
