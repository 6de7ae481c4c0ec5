"""segmented_column_sum against two masked sums in eager torch, and against reading the matrix once."""

from __future__ import annotations

import torch
from harness import arguments, interleave, read_bandwidth, report
from torch import Tensor

import csp_ext


def eager(attn: Tensor, query_modality: Tensor, key_modality: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the same and the other modality as two matrix products of the weights with a mask."""
    same = (query_modality[:, :, None] == key_modality[:, None])[:, None]
    return (
        torch.where(same, attn, 0).sum(2, dtype=torch.float32),
        torch.where(same, 0, attn).sum(2, dtype=torch.float32),
    )


def row(
    case: str, heads: int, window: int, length: int, dtype: torch.dtype, repeats: int
) -> dict[str, object]:
    """Measure one problem."""
    attn = torch.rand(1, heads, window, length).to(dtype)
    keys = (torch.arange(length) % 640 < 576).to(torch.int8)[None]
    queries = keys[:, -window:].contiguous()
    time = interleave(
        {
            "ours": lambda: csp_ext.segmented_column_sum(attn, queries, keys),
            "eager": lambda: eager(attn, queries, keys),
            "sum": lambda: attn.sum(2, dtype=torch.float32),
        },
        repeats,
    )
    rate = attn.numel() * attn.element_size() / time["ours"].median
    return {
        "case": f"{case} {str(dtype)[6:]}",
        "ours ms": time["ours"].median * 1e3,
        "eager ms": time["eager"].median * 1e3,
        "ratio": time["eager"].median / time["ours"].median,
        "one plain sum ms": time["sum"].median * 1e3,
        "GB/s": rate / 1e9,
        "of the read bandwidth": rate / read_bandwidth(),
    }


def main() -> None:
    """Print the table."""
    options = arguments(__doc__)
    repeats = 5 if options.quick else 21
    rows = [
        row(case, heads, window, length, dtype, repeats)
        for case, heads, window, length in [
            ("LLaVA-1.5-7B", 32, 64, 4096),
            ("H2O, every query", 4, 2048, 2048),
        ]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    report("segmented_column_sum, B=1", rows, options.json)


if __name__ == "__main__":
    main()
