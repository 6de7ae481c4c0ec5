"""n-softmax: a softmax with n extra units of mass in the denominator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from csp_ext.ops._call import call


def n_softmax(logits: Tensor, n: float = 1.0) -> Tensor:
    """Normalise the last dimension as ``exp(x) / (n + sum(exp(x)))`` without overflow.

    Parameters
    ----------
    logits : Tensor [..., N]
        fp32, fp16, bf16 or (CPU) fp64, any strides. ``-inf`` masks an entry.
    n : float
        Units of mass that no entry gets; 0 is the ordinary softmax.

    Returns
    -------
    Tensor [..., N]
        Same dtype as `logits`. A fully masked row is all zeros.

    Raises
    ------
    ValueError
        If `logits` is a scalar or not floating point, or `n` is negative or not finite.

    Notes
    -----
    Eq. 7 of CSP (arXiv 2412.04652). Differentiable.
    """
    return call(torch.ops.csp.n_softmax, logits, n)


@torch.library.register_fake("csp::n_softmax")
def _fake(logits: Tensor, n: float = 1.0) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (probs,) = ctx.saved_tensors
    # The Jacobian of softmax holds for any n: n only scales the probabilities.
    return probs * (grad - (grad * probs).sum(-1, keepdim=True)), None


torch.library.register_autograd("csp::n_softmax", _backward, setup_context=_setup_context)
