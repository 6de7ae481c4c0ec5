"""Cross-Self Pruning of the KV cache of vision-language models (arXiv 2412.04652)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from csp_ext._library import CudaStatus, cuda_status  # isort: skip  (it loads the ops, or says what is missing)
from csp_ext._host import __version__, build_info, cpu_capability, plan
from csp_ext.config import CSPConfig
from csp_ext.device import cuda_device
from csp_ext.ops import (
    compact,
    compact_,
    decode,
    dual_top_k,
    n_softmax,
    prune,
    prune_,
    score,
    segmented_column_sum,
    select,
)
from csp_ext.paths import cmake_prefix_path, get_include
from csp_ext.selection import select_tokens, window_modality

if TYPE_CHECKING:
    from csp_ext.integration import CSPStaticCache, Handle, apply

__all__ = [
    "CSPConfig",
    "CSPStaticCache",
    "CudaStatus",
    "Handle",
    "__version__",
    "apply",
    "build_info",
    "cmake_prefix_path",
    "compact",
    "compact_",
    "cpu_capability",
    "cuda_device",
    "cuda_status",
    "decode",
    "dual_top_k",
    "get_include",
    "n_softmax",
    "plan",
    "prune",
    "prune_",
    "score",
    "segmented_column_sum",
    "select",
    "select_tokens",
    "window_modality",
]


def __getattr__(name: str) -> Any:
    # The integration needs transformers, the ops do not.
    if name in ("apply", "CSPStaticCache", "Handle"):
        from csp_ext import integration

        return getattr(integration, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
