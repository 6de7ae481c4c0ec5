"""The version of transformers the integration needs, checked before anything of it is imported."""

from __future__ import annotations

import importlib.metadata

# The first version without `cache_position` and with stable mask sizes.
MIN_TRANSFORMERS = (5, 4)


def require_transformers(version: str | None = None) -> None:
    """Raise ImportError unless transformers is there and new enough.

    Parameters
    ----------
    version : str, optional
        Default: the installed one.
    """
    wanted = ".".join(map(str, MIN_TRANSFORMERS))
    if version is None:
        try:
            version = importlib.metadata.version("transformers")
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(
                f"csp_ext.apply needs transformers {wanted} or newer: pip install 'csp_ext[hf]'"
            ) from None
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRANSFORMERS:
        raise ImportError(f"csp_ext.apply needs transformers {wanted} or newer, {version} is installed")
