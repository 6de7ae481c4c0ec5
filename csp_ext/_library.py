"""Loads the op libraries into torch, once, when the package is imported."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path

import torch

_NOT_BUILT = (
    "csp_ext was imported from a folder without its compiled libraries; "
    "install it (pip install .) and import it from outside the source folder"
)
try:
    # An editable install rebuilds when it meets a compiled module, so this comes before a library is loaded.
    from csp_ext import _host  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(_NOT_BUILT) from error


@dataclass(frozen=True)
class CudaStatus:
    """Whether the CUDA library is loaded, and if not, why.

    Attributes
    ----------
    loaded : bool
        True when ``torch.ops.csp.*`` take CUDA tensors.
    reason : str
        Empty when loaded; otherwise one line that says why not.
    """

    loaded: bool
    reason: str


def package_folders() -> list[Path]:
    """Return every folder the package spans: one when installed, source and build when editable."""
    files = importlib.resources.files("csp_ext")
    return [Path(str(path)) for path in getattr(files, "_paths", [files])]


def find_library(name: str) -> Path | None:
    """Return the path of the shared library `name` inside the package, or None."""
    for folder in package_folders():
        path = folder / name
        if path.is_file():
            return path
    return None


def _load_cpu() -> Path:
    path = find_library("libcsp_ops_cpu.so")
    if path is None:
        raise ImportError(_NOT_BUILT)
    torch.ops.load_library(str(path))
    return path


def _load_cuda() -> CudaStatus:
    if torch.version.cuda is None:
        return CudaStatus(False, "the installed torch is a CPU build")
    path = find_library("libcsp_ops_cuda.so")
    if path is None:
        return CudaStatus(False, "csp_ext was built without CUDA: install it again where nvcc is found")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return CudaStatus(False, f"libcsp_ops_cuda.so could not be loaded: {error}")
    return CudaStatus(True, "")


CPU_LIBRARY = _load_cpu()
_CUDA_STATUS = _load_cuda()


def cuda_status() -> CudaStatus:
    """Return whether the CUDA ops are loaded, with the reason where they are not."""
    return _CUDA_STATUS
