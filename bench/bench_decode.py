"""decode against torch's CPU flash attention that returns its LSE, with the n-softmax correction.

The peer is ``aten::_scaled_dot_product_flash_attention_for_cpu`` and ``out * sigmoid(lse)``. With fewer KV
heads than query heads it is timed twice: on the grouped cache as it is, which it takes without expanding, and
on a cache expanded beforehand (the copy is not charged). The ratio is against the faster one.

Usage: python bench/bench_decode.py [--json] [--quick]
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import arguments, interleave, report

import csp_ext

BATCH, HEAD_DIM = 8, 128
HEADS = ((32, 32), (28, 4))
KEYS = (820, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def peer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return torch's attention with the n-softmax correction for n = 1."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    return out * torch.sigmoid(lse).to(out.dtype).unsqueeze(-1)


def measure(dtype: torch.dtype, heads: int, kv_heads: int, keys: int, repeats: int) -> dict[str, object]:
    """Time one shape, the peer and a plain read of the cache (a sum) in turn; return a row of the table."""
    torch.manual_seed(0)
    query = torch.randn(BATCH, heads, 1, HEAD_DIM).to(dtype)
    key, value = (torch.randn(BATCH, kv_heads, keys, HEAD_DIM).to(dtype) for _ in range(2))
    # the very memory of the cache: how fast a buffer reads changes from one allocation to the next
    plain = [cache.view(torch.float32) for cache in (key, value)]
    sides: dict[str, Callable[[], object]] = {
        "decode": lambda: csp_ext.decode(query, key, value),
        "peer": lambda: peer(query, key, value),
        "read": lambda: [x.sum() for x in plain],
    }
    if heads != kv_heads:
        group = heads // kv_heads
        wide_key, wide_value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        sides["expanded"] = lambda: peer(query, wide_key, wide_value)
    error = (csp_ext.decode(query, key, value)[0] - peer(query, key, value)).abs().max().item()
    assert error < 1e-2, f"decode and its peer differ by {error}"

    times = interleave(sides, repeats)
    ours = times["decode"]
    cache_bytes = 2 * key.numel() * key.element_size()
    peers = [times[name].median for name in ("peer", "expanded") if name in times]
    return {
        "case": f"{str(dtype)[6:]} heads {heads}/{kv_heads} keys {keys}",
        "ms": ours.median * 1e3,
        "GB/s": cache_bytes / ours.median / 1e9,
        "read GB/s": cache_bytes / times["read"].median / 1e9,
        "share of read": times["read"].median / ours.median,
        "share, best runs": times["read"].low / ours.low,
        "peer ms": times["peer"].median * 1e3,
        "expanded ms": times["expanded"].median * 1e3 if "expanded" in times else "-",
        "times faster": min(peers) / ours.median,
    }


def main() -> None:
    """Print one row per dtype, head ratio and number of keys."""
    options = arguments(__doc__)
    quick = options.quick
    rows = [
        measure(dtype, heads, kv_heads, keys, 5 if quick else 21)
        for dtype in DTYPES
        for heads, kv_heads in HEADS
        for keys in (KEYS[:1] if quick else KEYS)
    ]
    report(f"decode, batch {BATCH}, head_dim {HEAD_DIM}, one new query", rows, options.json)


if __name__ == "__main__":
    main()
