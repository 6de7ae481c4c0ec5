"""CSP inside transformers: one verb, :func:`apply`, which returns a :class:`Handle`.

Public interfaces only: a named attention function, a cache layer, one forward pre-hook. Whatever belongs to a
sequence lives in its cache; nothing is kept on the modules.
"""

from csp_ext.integration.requirement import require_transformers

require_transformers()

from csp_ext.integration.applying import apply  # noqa: E402
from csp_ext.integration.handle import Handle  # noqa: E402
from csp_ext.integration.static import CSPStaticCache  # noqa: E402
from csp_ext.integration.stats import LayerStats, PruneStats  # noqa: E402

__all__ = ["CSPStaticCache", "Handle", "LayerStats", "PruneStats", "apply"]
