"""prune against the same chain in eager torch: matmul, masked n-softmax, two sums, ranks, gather and cat."""

from __future__ import annotations

import torch
from harness import arguments, copy_bandwidth, flops, interleave, report
from torch import Tensor

import csp_ext


def eager_scores(query: Tensor, key: Tensor, modality: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 1 and 7 with the attention matrix of the window in memory, [B, Hkv, L] each."""
    batch, _, window, head_dim = query.shape
    num_kv_heads, length = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, num_kv_heads, -1, head_dim)  # [B, Hkv, G * O, D]
    logits = torch.matmul(grouped * head_dim**-0.5, key.transpose(2, 3)).float()
    logits = logits.view(batch, num_kv_heads, -1, window, length)
    position = torch.arange(length)
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


def row(
    case: str, num_heads: int, num_kv_heads: int, length: int, dtype: torch.dtype, repeats: int
) -> dict[str, object]:
    """Measure one problem."""
    window, head_dim, budget = 64, 128, length // 5 + 1
    query = torch.randn(1, num_heads, window, head_dim).to(dtype)
    key, value = (torch.randn(1, num_kv_heads, length, head_dim).to(dtype) for _ in range(2))
    # a photograph of 576 tokens, then some text, over and over
    modality = (torch.arange(length) % 640 < 576).to(torch.int8)[None]
    scores = csp_ext.score(query, key, modality)
    indices, _ = csp_ext.select(*scores, modality, modality[:, -window:], budget=budget)
    time = interleave(
        {
            "prune": lambda: csp_ext.prune(query, key, value, modality, budget=budget),
            "eager": lambda: eager_prune(query, key, value, modality, budget),
            "score": lambda: csp_ext.score(query, key, modality),
            "select": lambda: csp_ext.select(*scores, modality, modality[:, -window:], budget=budget),
            "compact": lambda: csp_ext.compact(key, value, indices),
        },
        repeats,
    )
    plan = csp_ext.plan(
        "prune", batch=1, num_heads=num_heads, num_kv_heads=num_kv_heads, window=window, keys=length,
        head_dim=head_dim, budget=budget, dtype=str(dtype)[6:], num_threads=torch.get_num_threads(),
    )  # fmt: skip
    moved = plan["bytes_read"] + plan["bytes_written"]
    return {
        "case": f"{case} {str(dtype)[6:]}",
        "prune ms": time["prune"].median * 1e3,
        "eager ms": time["eager"].median * 1e3,
        "eager / ours": time["eager"].median / time["prune"].median,
        **{f"{part} ms": time[part].median * 1e3 for part in ("score", "select", "compact")},
        "bound ms": 1e3 * max(plan["flops"] / flops(), moved / copy_bandwidth()),
        "workspace MiB": plan["workspace_bytes"] / 2**20,
    }


def main() -> None:
    """Print the table; the bound is the larger of FLOPs at the matmul rate and bytes at the copy rate."""
    options = arguments(__doc__)
    repeats = 5 if options.quick else 15
    rows = [
        row(case, num_heads, num_kv_heads, length, dtype, repeats)
        for case, num_heads, num_kv_heads, length in [("LLaVA-1.5-7B", 32, 32, 4096), ("GQA", 28, 4, 8192)]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    report("prune, B=1, O=64, D=128, T=20 %", rows, options.json)


if __name__ == "__main__":
    main()
