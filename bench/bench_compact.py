"""compact against torch's gather and cat, and against plain copies of as many bytes."""

from __future__ import annotations

import torch
from harness import arguments, copy_bandwidth, interleave, report
from torch import Tensor

import csp_ext


def gather_and_cat(key: Tensor, value: Tensor, candidates: Tensor, recent: int) -> tuple[Tensor, Tensor]:
    """Do what releases do: gather the chosen rows of each cache, then append the recent ones."""
    rows = candidates[..., None].expand(-1, -1, -1, key.shape[3])
    return (
        torch.cat([key.gather(2, rows), key[:, :, key.shape[2] - recent :]], dim=2),
        torch.cat([value.gather(2, rows), value[:, :, value.shape[2] - recent :]], dim=2),
    )


def kept(heads: int, length: int, budget: int, recent: int) -> Tensor:
    """Return random kept rows [1, H, T]: scattered candidates and the recent ones."""
    chosen = (
        torch.stack([torch.randperm(length - recent)[: budget - recent] for _ in range(heads)])
        .sort(-1)
        .values
    )
    last = torch.arange(length - recent, length).expand(heads, -1)
    return torch.cat([chosen, last], dim=1)[None]


def row(
    case: str, heads: int, length: int, budget: int, recent: int, dtype: torch.dtype, repeats: int
) -> dict[str, object]:
    """Measure one problem."""
    key, value = (torch.randn(1, heads, length, 128).to(dtype) for _ in range(2))
    indices = kept(heads, length, budget, recent)
    candidates, narrow = indices[..., : budget - recent].contiguous(), indices.int()
    # a plain copy of as many bytes, new memory included
    key_rows, value_rows = key[:, :, :budget].contiguous(), value[:, :, :budget].contiguous()
    time = interleave(
        {
            "ours": lambda: csp_ext.compact(key, value, narrow),
            "torch": lambda: gather_and_cat(key, value, candidates, recent),
            "clone": lambda: (key_rows.clone(), value_rows.clone()),
        },
        repeats,
    )
    plan = csp_ext.plan(
        "compact", batch=1, num_kv_heads=heads, keys=length, budget=budget, head_dim=128, dtype=str(dtype)[6:]
    )
    moved = plan["bytes_read"] + plan["bytes_written"]
    return {
        "case": f"{case} {str(dtype)[6:]}",
        "ours ms": time["ours"].median * 1e3,
        "gather + cat ms": time["torch"].median * 1e3,
        "eager / ours": time["torch"].median / time["ours"].median,
        "GB/s": moved / time["ours"].median / 1e9,
        "of a clone of the kept bytes": time["clone"].median / time["ours"].median,
        "of copy bandwidth": moved / time["ours"].median / copy_bandwidth(),
    }


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    repeats = 5 if options.quick else 21
    rows = [
        row(case, heads, length, budget, 64, dtype, repeats)
        for case, heads, length, budget in [("LLaVA-1.5-7B", 32, 4096, 820), ("GQA", 4, 8192, 1638)]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    report("compact, B=1, D=128", rows, options.json)


if __name__ == "__main__":
    main()
