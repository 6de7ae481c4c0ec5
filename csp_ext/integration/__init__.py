"""CSP inside transformers: one verb, :func:`apply`, which returns a :class:`Handle`.

Public interfaces only: a named attention function, a cache layer, one forward pre-hook. Whatever belongs to a
sequence lives in its cache; nothing is kept on the modules.
"""

from csp_ext.integration.handle import Handle, apply
from csp_ext.integration.stats import LayerStats, PruneStats

__all__ = ["Handle", "LayerStats", "PruneStats", "apply"]
