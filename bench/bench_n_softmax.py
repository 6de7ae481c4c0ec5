"""n_softmax against torch: exp and a masked division, and torch.softmax as the floor of any such op."""

from __future__ import annotations

import harness
import torch

import csp_ext


def eager(logits: torch.Tensor, n: float) -> torch.Tensor:
    shift = logits.amax(-1, keepdim=True).clamp_min(0)
    weights = (logits - shift).exp()
    return weights / (n * (-shift).exp() + weights.sum(-1, keepdim=True))


def main() -> None:
    options = harness.arguments(__doc__)
    rows = []
    bound = harness.copy_bandwidth()
    shapes = [(32, 64, 4096)] if options.quick else [(32, 64, 4096), (28, 410, 8192), (4096, 32, 17)]
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(shape).to(dtype)
            t = harness.interleave(
                {
                    "csp": lambda x=logits: csp_ext.n_softmax(x, 1.0),
                    "eager": lambda x=logits: eager(x, 1.0),
                    "torch.softmax": lambda x=logits: torch.softmax(x, -1),
                }
            )
            moved = 2 * logits.numel() * logits.element_size()
            rows.append(
                {
                    "case": f"{list(shape)} {str(dtype).removeprefix('torch.')}",
                    "csp ms": t["csp"].median * 1e3,
                    "eager / csp": t["eager"].median / t["csp"].median,
                    "softmax / csp": t["torch.softmax"].median / t["csp"].median,
                    "of copy bandwidth": moved / t["csp"].median / bound,
                }
            )
    harness.report("n_softmax", rows, options.json)


if __name__ == "__main__":
    main()
