"""n_softmax against torch: exp and a masked division, and torch.softmax as the floor of any such op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from harness import Bench, arguments, name_of
from problems import gpu_problems

import csp_ext

CPU_SHAPES = [(32, 64, 4096), (28, 410, 8192), (4096, 32, 17)]


def eager(logits: torch.Tensor, n: float) -> torch.Tensor:
    """Return the n-softmax as one writes it in torch."""
    shift = logits.amax(-1, keepdim=True).clamp_min(0)
    weights = (logits - shift).exp()
    return weights / (n * (-shift).exp() + weights.sum(-1, keepdim=True))


def measure(bench: Bench, case: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Measure one shape [heads, O, L]."""
    logits = torch.randn(shape, device=bench.device).to(dtype)
    bench.row(
        f"{case} {list(shape)} {name_of(dtype)}".strip(),
        lambda: csp_ext.n_softmax(logits, 1.0),
        {"eager": lambda: eager(logits, 1.0), "torch.softmax": lambda: torch.softmax(logits, -1)},
        bench.plan("n_softmax", rows=shape[0] * shape[1], cols=shape[2], dtype=name_of(dtype)),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    bench = Bench("n_softmax", arguments(__doc__, argv))
    if bench.for_gpu:
        for p in bench.few(gpu_problems((32, 410))):
            measure(bench, p.model, (p.batch * p.num_heads, p.window, p.keys), p.dtype)
    else:
        for shape in CPU_SHAPES[:1] if bench.options.quick else CPU_SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                measure(bench, "", shape, dtype)
    bench.report()


if __name__ == "__main__":
    main()
