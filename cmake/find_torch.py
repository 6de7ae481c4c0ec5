"""Print the include folder and the version of the installed torch, or exit 1.

A build environment made by pip hides the packages of the environment it builds for; its torch is found by its
place on disk. Only the headers of the stable ABI are read, so torch itself is never imported.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
from pathlib import Path


def torch_folder() -> Path | None:
    """Return the folder of the torch package: importable here, or installed in the environment around."""
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        places.insert(0, str(Path(spec.origin).parent.parent))
    for place in places:
        folder = Path(place) / "torch"
        if (folder / "include/torch/csrc/stable/library.h").is_file():
            return folder
    return None


if __name__ == "__main__":
    found = torch_folder()
    if found is None:
        sys.exit(1)
    match = re.search(r"__version__ = '([^']+)'", (found / "version.py").read_text())
    print(found / "include", match.group(1) if match else "unknown", sep=";", end="")
