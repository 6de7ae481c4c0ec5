"""segmented_column_sum: the column sums of an attention matrix, split by modality."""

from __future__ import annotations

import torch
from torch import Tensor

from csp_ext.ops._call import accumulate_dtype, call, same_device


def segmented_column_sum(attn: Tensor, query_modality: Tensor, key_modality: Tensor) -> tuple[Tensor, Tensor]:
    """Sum each column of an attention matrix over the queries of its own and of the other modalities.

    Parameters
    ----------
    attn : Tensor [B, H, O, N]
        fp32, fp16, bf16 or (CPU) fp64; any strides with unit stride in N.
    query_modality : Tensor [B, O], int8
        Negative: this query does not observe.
    key_modality : Tensor [B, N], int8
        Negative: padding, whose sums are zero.

    Returns
    -------
    self, cross : Tensors [B, H, N]
        fp32, or fp64 for fp64 input.

    Raises
    ------
    ValueError
        If a shape, dtype, device or stride does not fit.

    Notes
    -----
    Eq. 1 of CSP (arXiv 2412.04652), for a matrix that is in memory anyway; :func:`csp_ext.score` never
    makes one. Not differentiable.
    """
    return call(torch.ops.csp.segmented_column_sum, attn, query_modality, key_modality)


@torch.library.register_fake("csp::segmented_column_sum")
def _fake(attn: Tensor, query_modality: Tensor, key_modality: Tensor) -> tuple[Tensor, Tensor]:
    same_device("segmented_column_sum", attn=attn, query_modality=query_modality, key_modality=key_modality)
    shape = (attn.shape[0], attn.shape[1], attn.shape[3])
    dtype = accumulate_dtype(attn.dtype)
    return attn.new_empty(shape, dtype=dtype), attn.new_empty(shape, dtype=dtype)
