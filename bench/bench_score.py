"""score against eager torch and the bare q.k product: python bench/bench_score.py [--json] [--quick]."""

from __future__ import annotations

import torch
from harness import arguments, flops, interleave, report
from torch import Tensor

import csp_ext
from csp_ext import score

# batch, query heads, KV heads, window O, keys L, head_dim
SHAPES = {
    "LLaVA-1.5-7B": (1, 32, 32, 64, 4096, 128),
    "LLaVA-1.5-7B, O=8": (1, 32, 32, 8, 4096, 128),
    "GQA 28/4 heads": (1, 28, 4, 64, 8192, 128),
}


def eager(query: Tensor, key: Tensor, modality: Tensor, n: float = 1.0) -> tuple[Tensor, Tensor]:
    """Score as one writes it in torch: logits, masked n-softmax, two masked sums. Holds O x L per head."""
    batch, num_heads, window, head_dim = query.shape
    num_kv_heads, length = key.shape[1:3]
    grouped = query.reshape(batch, num_kv_heads, -1, head_dim)
    logits = torch.matmul(grouped, key.transpose(-1, -2)).reshape(batch, num_heads, window, length)
    position = torch.arange(length)
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


def compare(case: str, dtype: torch.dtype, repeats: int) -> dict[str, object]:
    """Time one shape against both peers."""
    batch, num_heads, num_kv_heads, window, length, head_dim = SHAPES[case]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, num_heads, window, head_dim, generator=generator).to(dtype)
    key = torch.randn(batch, num_kv_heads, length, head_dim, generator=generator).to(dtype)
    # One image of 576 tokens in each thousand, and half a window of it.
    modality = (torch.arange(length) % 1000 < 576).to(torch.int8).expand(batch, -1).contiguous()
    modality[:, -window // 2 :] = 0
    modality[:, -window : -window // 2] = 1
    lse = torch.full((batch, num_heads, window), 9.0)
    grouped = query.reshape(batch, num_kv_heads, -1, head_dim)
    product = torch.empty(batch, num_kv_heads, grouped.shape[2], length, dtype=dtype)
    times = interleave(
        {
            "score": lambda: score(query, key, modality),
            "lse": lambda: score(query, key, modality, lse=lse),
            "eager": lambda: eager(query, key, modality),
            "matmul": lambda: torch.matmul(grouped, key.transpose(-1, -2), out=product),
        },
        repeats,
    )
    for got, want in zip(score(query, key, modality), eager(query, key, modality), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3 if dtype == torch.float32 else 3e-2, atol=1e-4)
    scratch = csp_ext.plan(
        "score",
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        window=window,
        keys=length,
        head_dim=head_dim,
        dtype=str(dtype).removeprefix("torch."),
        num_threads=torch.get_num_threads(),
    )["workspace_bytes"]
    work = 2 * batch * num_heads * window * length * head_dim
    mine = times["score"].median
    return {
        "case": case,
        "dtype": str(dtype).removeprefix("torch."),
        "score ms": mine * 1e3,
        "eager/score": times["eager"].median / mine,
        "score/matmul": mine / times["matmul"].median,
        "with lse ms": times["lse"].median * 1e3,
        "GFLOP/s": work / mine / 1e9,
        "scratch MiB": scratch / 2**20,
        "eager matrix MiB": batch * num_heads * window * length * 4 / 2**20,
    }


def main() -> None:
    """Print one row per shape and dtype."""
    options = arguments(__doc__)
    quick = options.quick
    bound = flops() / 1e9
    rows = [
        {**compare(case, dtype, 3 if quick else 15), "fp32 bound": bound}
        for case in SHAPES
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        if not (quick and dtype == torch.float16)
    ]
    report("score", rows, options.json)


if __name__ == "__main__":
    main()
