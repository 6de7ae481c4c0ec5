"""Pure-torch float64 twins of the ops: the specification in executable form.

Every function has the name and the arguments of its op in :mod:`csp_ext.ops`. Arithmetic is float64 whatever
the input dtype and floating results are returned in float64; caches are copied in the input's dtype, in place
too, indices and lengths are int32, masks are bool. The twins aim at being obviously right, not at being fast.
"""

from __future__ import annotations

from csp_ext.reference.compact import compact
from csp_ext.reference.compact_in_place import compact_
from csp_ext.reference.decode import decode
from csp_ext.reference.dual_top_k import dual_top_k
from csp_ext.reference.n_softmax import n_softmax
from csp_ext.reference.prune import prune
from csp_ext.reference.prune_in_place import prune_
from csp_ext.reference.score import score
from csp_ext.reference.segmented_column_sum import segmented_column_sum
from csp_ext.reference.select import select

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
