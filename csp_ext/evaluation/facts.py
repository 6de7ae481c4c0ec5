"""What a result has to say about where it comes from."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import csp_ext


def run_facts() -> dict[str, Any]:
    """Return versions, the commit, the machine, torch's threads and the date, ready for JSON."""
    return {
        "csp_ext": csp_ext.__version__,
        "commit": commit(Path(csp_ext.__file__).parent.parent),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_capability": csp_ext.cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit(folder: Path) -> str | None:
    """Return the commit that a checkout is at, with "+" if files differ from it; None elsewhere."""
    if not (folder / ".git").exists():
        return None
    git = ["git", "-C", str(folder)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changes.stdout.strip() else "")
