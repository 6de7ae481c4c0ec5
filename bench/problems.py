"""The problems that are measured, and tensors for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from harness import name_of
from torch import Tensor

# query heads, KV heads, prompt length, head_dim, batches of the GPU's problems
MODELS = {
    "LLaVA-1.5-7B": (32, 32, 4096, 128, (1, 8, 24)),
    "Qwen2.5-VL-7B": (28, 4, 32768, 128, (1, 8)),
}


@dataclass(frozen=True)
class Problem:
    """One layer of a model at the end of its prompt; a fifth of the cache is kept."""

    model: str
    batch: int
    num_heads: int
    num_kv_heads: int
    window: int
    keys: int
    head_dim: int
    dtype: torch.dtype

    @property
    def budget(self) -> int:
        """Rows that are kept."""
        return self.keys // 5 + 1

    @property
    def case(self) -> str:
        """What a row calls it."""
        return f"{self.model} B={self.batch} {name_of(self.dtype)}"

    def tiny(self) -> Problem:
        """Return a problem of the same kind that a CPU does in no time."""
        group = self.num_heads // self.num_kv_heads
        return replace(
            self,
            num_heads=2 * min(group, 3),
            num_kv_heads=2,
            window=20 if self.window < 100 else 40,
            keys=240 if group == 1 else 280,
            head_dim=16,
        )

    def query(self, device: str, queries: int | None = None) -> Tensor:
        """Return queries [B, Hq, O, D]."""
        shape = (self.batch, self.num_heads, queries or self.window, self.head_dim)
        return torch.randn(shape, device=device).to(self.dtype)

    def cache(self, device: str, keys: int | None = None) -> Tensor:
        """Return keys or values [B, Hkv, L, D]."""
        shape = (self.batch, self.num_kv_heads, keys or self.keys, self.head_dim)
        return torch.randn(shape, device=device).to(self.dtype)

    def modality(self, device: str) -> Tensor:
        """Return [B, L]: photographs of 576 tokens between stretches of text; half the window is text."""
        kinds = (torch.arange(self.keys, device=device) % 640 < 576).to(torch.int8)
        kinds[-self.window :] = 1
        kinds[-self.window // 2 :] = 0
        return kinds.expand(self.batch, -1).contiguous()

    def shape(self) -> dict[str, int | str]:
        """Return the sizes that the planner's `score` takes."""
        return {
            "batch": self.batch,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "window": self.window,
            "keys": self.keys,
            "head_dim": self.head_dim,
            "dtype": name_of(self.dtype),
        }


def gpu_problems(windows: Sequence[int] = (32,)) -> list[Problem]:
    """Return the GPU's problems: each model, batch and window in bfloat16, and one in float16."""
    found = [
        Problem(model, batch, heads, kv_heads, window, length, head_dim, torch.bfloat16)
        for model, (heads, kv_heads, length, head_dim, batches) in MODELS.items()
        for window in windows
        for batch in batches
    ]
    return [*found, replace(found[0], dtype=torch.float16)]


def cpu_problems(
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16), windows: Sequence[int] = (64,)
) -> list[Problem]:
    """Return the CPU's problems: batch 1, a shorter prompt under grouped queries."""
    shapes = [("LLaVA-1.5-7B", 32, 32, 4096), ("GQA 28/4 heads", 28, 4, 8192)]
    return [
        Problem(model, 1, heads, kv_heads, window, length, 128, dtype)
        for model, heads, kv_heads, length in shapes
        for window in windows
        for dtype in dtypes
    ]
