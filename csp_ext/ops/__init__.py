"""Typed wrappers of ``torch.ops.csp.*``, one file per op, each with its fake kernel."""

from csp_ext.ops.n_softmax import n_softmax
from csp_ext.ops.score import score

__all__ = ["n_softmax", "score"]
