"""Typed wrappers of ``torch.ops.csp.*``, one file per op, each with its fake kernel."""

from csp_ext.ops.compact import compact
from csp_ext.ops.compact_in_place import compact_
from csp_ext.ops.decode import decode
from csp_ext.ops.dual_top_k import dual_top_k
from csp_ext.ops.n_softmax import n_softmax
from csp_ext.ops.prune import prune
from csp_ext.ops.prune_in_place import prune_
from csp_ext.ops.score import score
from csp_ext.ops.segmented_column_sum import segmented_column_sum
from csp_ext.ops.select import select

__all__ = [
    "compact",
    "compact_",
    "decode",
    "dual_top_k",
    "n_softmax",
    "prune",
    "prune_",
    "score",
    "segmented_column_sum",
    "select",
]
