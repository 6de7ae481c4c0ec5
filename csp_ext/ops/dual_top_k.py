"""The literal masks of CSP: the top keys of two lists, intersected or united."""

from __future__ import annotations

import torch
from torch import Tensor

from csp_ext.ops._call import call, same_device


def dual_top_k(
    self: Tensor,
    cross: Tensor,
    k_self: int,
    k_cross: int,
    combine: str = "intersection",
    valid_self: Tensor | None = None,
    valid_cross: Tensor | None = None,
) -> Tensor:
    """Mark the keys among the top `k_self` of `self` and (or) the top `k_cross` of `cross`.

    Parameters
    ----------
    self, cross : Tensor [..., N]
        fp32, fp16, bf16 or (CPU) fp64 scores, any strides. Of equal scores the later position is the better;
        NaN ranks last.
    k_self, k_cross : int
        >= 0; clamped to the number of valid keys of a row.
    combine : {"intersection", "union"}
    valid_self, valid_cross : Tensor, bool, optional
        Broadcast to [..., N]. A list never selects a key that is not valid in it; by default every key is.

    Returns
    -------
    Tensor [..., N], bool

    Raises
    ------
    ValueError
        Naming the argument that does not fit and its value.

    Notes
    -----
    Eq. 2-3 of CSP (arXiv 2412.04652). Not differentiable.
    """
    return call(torch.ops.csp.dual_top_k, self, cross, k_self, k_cross, combine, valid_self, valid_cross)


@torch.library.register_fake("csp::dual_top_k")
def _fake(
    self: Tensor,
    cross: Tensor,
    k_self: int,
    k_cross: int,
    combine: str = "intersection",
    valid_self: Tensor | None = None,
    valid_cross: Tensor | None = None,
) -> Tensor:
    same_device("dual_top_k", self=self, cross=cross, valid_self=valid_self, valid_cross=valid_cross)
    return self.new_empty(self.shape, dtype=torch.bool)
