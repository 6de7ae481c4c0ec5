"""The build backend: scikit-build-core, plus torch as a build requirement only where none is installed.

Just the headers of torch's stable ABI are needed. Naming torch in `build-system.requires` would make every
isolated build fetch its newest CUDA build, gigabytes, beside the torch that is there already.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from scikit_build_core.build import *  # noqa: F403
from scikit_build_core.build import get_requires_for_build_editable as _editable
from scikit_build_core.build import get_requires_for_build_wheel as _wheel

sys.path.insert(0, str(Path(__file__).parent.parent / "cmake"))
from find_torch import torch_folder

_TORCH = [] if torch_folder() else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _wheel(config_settings) + _TORCH


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _editable(config_settings) + _TORCH
