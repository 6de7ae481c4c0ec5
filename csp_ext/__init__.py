"""Cross-Self Pruning of the KV cache of vision-language models (arXiv 2412.04652)."""

from __future__ import annotations

from csp_ext import _library
from csp_ext._host import __version__, build_info, cpu_capability, plan
from csp_ext._library import CudaStatus, cuda_status
from csp_ext.ops import *  # noqa: F403
from csp_ext.ops import __all__ as _op_names
from csp_ext.paths import cmake_prefix_path, get_include

__all__ = [
    "CudaStatus",
    "__version__",
    "build_info",
    "cmake_prefix_path",
    "cpu_capability",
    "cuda_status",
    "get_include",
    "plan",
    *_op_names,
]

del _library
