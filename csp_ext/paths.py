"""Where the installed headers and the CMake config lie, for C++ users."""

from __future__ import annotations

from csp_ext._library import package_folders


def _folder(relative: str) -> str:
    for root in package_folders():
        if (root / relative).is_dir():
            return str(root / relative)
    raise FileNotFoundError(f"csp_ext was installed without its {relative} folder")


def get_include() -> str:
    """Return the folder to put on the include path for ``#include <csp/score.h>``."""
    return _folder("include")


def cmake_prefix_path() -> str:
    """Return the folder for ``CMAKE_PREFIX_PATH``, so that ``find_package(csp_ext)`` works."""
    return _folder("share/cmake")
