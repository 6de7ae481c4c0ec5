"""Typed wrappers of ``torch.ops.csp.*``, one file per op, each with its fake kernel."""

from csp_ext.ops.decode import decode
from csp_ext.ops.n_softmax import n_softmax

__all__ = ["decode", "n_softmax"]
