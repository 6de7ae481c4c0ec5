"""compact_: the kept rows of a cache, moved to its front."""

from __future__ import annotations

import torch
from torch import Tensor

from csp_ext.ops._call import call, same_device
from csp_ext.ops._in_place import register_in_place


def compact_(key: Tensor, value: Tensor, indices: Tensor) -> None:
    """Move the rows that `indices` names to the front of a cache, bit for bit, without a second cache.

    Afterwards ``key[:, :, :T]`` and ``value[:, :, :T]`` equal the results of :func:`csp_ext.compact`; the
    other slots stay as they are.

    Parameters
    ----------
    key : Tensor [B, Hkv, L, D]
        Any dtype, any strides with unit stride in D and no two elements in one place; changed in place.
    value : Tensor [B, Hkv, L, Dv]
        Dtype of `key`; Dv may differ from D. Clear of `key` in memory, or beside it in a wider tensor, as
        ``wide[..., :D]`` and ``wide[..., D:]`` are. Changed in place.
    indices : Tensor [B, Hs, T], int32
        Rows in ``[-1, L)``, ascending along T as :func:`csp_ext.select` gives them; -1, anywhere, gives a row
        of zeros. T is at most L. Hs is Hkv, or 1 for every head alike.

    Raises
    ------
    ValueError
        If a shape, dtype, device or memory layout does not fit, `key` or `value` requires a gradient, or the
        indices leave ``[-1, L)`` or do not ascend. On CUDA an index outside acts as -1, and rows that do not
        ascend give unspecified ones, unless ``CSP_CHECK=1`` is set.

    Notes
    -----
    Eq. 4 of CSP (arXiv 2412.04652). Allocates nothing for contiguous `indices`. Not differentiable:
    :func:`csp_ext.compact` is.

    Examples
    --------
    >>> key = torch.arange(5.0).view(1, 1, 5, 1)
    >>> value = -key
    >>> csp_ext.compact_(key, value, torch.tensor([[[-1, 2, 4]]], dtype=torch.int32))
    >>> key[:, :, :3].flatten().tolist()
    [0.0, 2.0, 4.0]
    """
    call(torch.ops.csp.compact_, key, value, indices)


@torch.library.register_fake("csp::compact_")
def _fake(key: Tensor, value: Tensor, indices: Tensor) -> None:
    same_device("compact_", key=key, value=value, indices=indices)


register_in_place("compact_", instead="csp_ext.compact")
