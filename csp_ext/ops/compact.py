"""compact: the kept rows of a cache, copied into new tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csp_ext.ops._call import call, same_device


def compact(key: Tensor, value: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Copy the rows that `indices` names out of a cache, bit for bit.

    Parameters
    ----------
    key : Tensor [B, Hkv, L, D]
        Any dtype, any strides with unit stride in D.
    value : Tensor [B, Hkv, L, Dv]
        Dtype of `key`; Dv may differ from D.
    indices : Tensor [B, Hs, T], int32
        Rows in ``[-1, L)``, in any order, repeats allowed; -1 gives a row of zeros. Hs is Hkv, or 1 for every
        head alike.

    Returns
    -------
    key : Tensor [B, Hkv, T, D]
    value : Tensor [B, Hkv, T, Dv]
        New and contiguous, in the dtype of the inputs.

    Raises
    ------
    ValueError
        If a shape, dtype or device does not fit, or an index lies outside ``[-1, L)``. On CUDA such an
        index acts as -1 unless ``CSP_CHECK=1`` is set.

    Notes
    -----
    Eq. 4 of CSP (arXiv 2412.04652), without its concatenation: `indices` holds the recent rows too.
    Differentiable in `key` and `value`.
    """
    return call(torch.ops.csp.compact, key, value, indices)


@torch.library.register_fake("csp::compact")
def _fake(key: Tensor, value: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    same_device("compact", key=key, value=value, indices=indices)
    rows = (key.shape[0], key.shape[1], indices.shape[2])
    return key.new_empty((*rows, key.shape[3])), value.new_empty((*rows, value.shape[3]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    key, value, indices = inputs
    ctx.save_for_backward(indices)
    ctx.shapes = (key.shape, value.shape)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    (indices,) = ctx.saved_tensors
    into = [
        _scatter(grad, indices, shape) if needed else None
        for grad, shape, needed in zip(grads, ctx.shapes, ctx.needs_input_grad[:2], strict=True)
    ]
    return into[0], into[1], None


def _scatter(grad: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
    """Add each row's gradient to the row it was copied from; free slots drop theirs."""
    # one spare row at the end takes the gradients of the free slots
    spare = grad.new_zeros((shape[0], shape[1], shape[2] + 1, shape[3]))
    rows = torch.where(indices < 0, shape[2], indices).long()[..., None]  # [B, Hs, T, 1]
    return spare.scatter_add(2, rows.expand(grad.shape), grad)[:, :, : shape[2]]


torch.library.register_autograd("csp::compact", _backward, setup_context=_setup_context)
