"""What ``csp info`` says: versions, libraries, CPU, CUDA and the build; needs the base dependencies only."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

import csp_ext
from csp_ext import _host, _library

# Distribution name, and what it is for where it is optional.
PACKAGES = {
    "torch": "",
    "numpy": "",
    "transformers": "csp_ext.apply, csp demo, csp generate",
    "pillow": "csp demo, csp generate",
    "matplotlib": "the pictures of csp demo and csp generate",
    "flash-attn": "nothing yet, flash_attention_2 is not supported",
}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _libraries(folders: list[Path]) -> dict[str, dict[str, Any]]:
    """Return each library's path relative to the package folder that holds it, and whether it is loaded."""
    found = {
        "cpu ops": (_library.CPU_LIBRARY, True),
        "cuda ops": (_library.find_library("libcsp_ops_cuda.so"), csp_ext.cuda_status().loaded),
        "host": (Path(str(_host.__file__)), True),
    }
    result: dict[str, dict[str, Any]] = {}
    for name, (path, loaded) in found.items():
        relative = None
        for folder in folders:
            if path is not None and path.is_relative_to(folder):
                relative = str(path.relative_to(folder))
        result[name] = {"path": relative, "loaded": loaded}
    return result


def collect() -> dict[str, Any]:
    """Return everything as plain values, ready for JSON."""
    folders = _library.package_folders()
    status = csp_ext.cuda_status()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {
            "csp_ext": csp_ext.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "package": [str(folder) for folder in folders],
        "libraries": _libraries(folders),
        "cpu": {
            "capability": csp_ext.cpu_capability(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "cuda": {
            "loaded": status.loaded,
            "reason": status.reason,
            "torch_cuda": torch.version.cuda,
            "devices": devices,
        },
        "build": dict(csp_ext.build_info()),
    }


def _grid(title: str, rows: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.title, table.title_justify = f"\n{title}", "left"
    table.add_column(style="cyan", min_width=14, no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def render(facts: dict[str, Any]) -> Group:
    """Return what :func:`collect` found, for people."""
    versions = {}
    for name, version in facts["versions"].items():
        purpose = PACKAGES.get(name)
        versions[name] = version or f"not installed{f' (needed for: {purpose})' if purpose else ''}"
    libraries = {
        name: f"{library['path'] or 'not built'}{'' if library['loaded'] else ' (not loaded)'}"
        for name, library in facts["libraries"].items()
    }
    cpu, cuda = facts["cpu"], facts["cuda"]
    return Group(
        _grid("versions", versions),
        _grid("libraries", {**libraries, "in": "\n".join(facts["package"])}),
        _grid(
            "cpu",
            {
                "capability": f"{cpu['capability']} (torch: {cpu['torch_capability']})",
                "threads": f"{cpu['threads']} of {cpu['cores']} cores",
            },
        ),
        _grid(
            "cuda",
            {
                "ops": "loaded" if cuda["loaded"] else f"not loaded: {cuda['reason']}",
                "torch": f"CUDA {cuda['torch_cuda']}" if cuda["torch_cuda"] else "a CPU build",
                "devices": ", ".join(cuda["devices"]) or "none",
            },
        ),
        _grid("build", {name.replace("_", " "): value or "-" for name, value in facts["build"].items()}),
    )
