"""decode: attention of the newest queries over a pruned cache."""

from __future__ import annotations

import torch
from torch import Tensor

from csp_ext.ops._call import accumulate_dtype, call, same_device


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    *,
    n: float = 1.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """n-softmax attention of Q new queries over the slots ``start <= s < end`` of a cache of capacity C.

    The last Q of those slots belong to the queries themselves: query i sees slots below ``end - Q + 1 + i``.
    What stands outside a row's slots is never used, whatever it is (also nan).

    Parameters
    ----------
    query : Tensor [B, Hq, Q, D]
        fp32, fp16, bf16 or (CPU) fp64; Q is 1 to 8, D is 1 to 512. Any strides with unit stride in D.
    key, value : Tensor [B, Hkv, C, D]
        The cache, in query's dtype; Hkv divides Hq. Any strides with unit stride in D, so also a slice of a
        larger buffer.
    start : Tensor [B] or [B, Hkv], int32, optional
        First slot of each row, in [0, C]; default 0. After a prune: ``budget - lengths``.
    end : 0-dim Tensor, int32, optional
        One past the last slot, in [0, C]; default C. Read when the kernel runs, so a compiled graph may hold
        it.
    n : float
        n-softmax constant; 0 is the ordinary softmax.
    scale : float, optional
        Default ``D ** -0.5``.

    Returns
    -------
    out : Tensor [B, Hq, Q, D]
        Dtype of `query`; zeros for a query that sees no slot.
    lse : Tensor [B, Hq, Q], fp32 (fp64 for fp64 inputs)
        Natural logsumexp over the visible slots, without n; ``-inf`` for a query that sees none.

    Raises
    ------
    ValueError
        If a shape, dtype or value does not fit; the message names the argument. On CUDA `start` and `end` are
        clamped to [0, C] unless ``CSP_CHECK=1`` is set.

    Notes
    -----
    ``out = softmax(scale * query @ key) @ value * sigmoid(lse - log n)``: Eq. 7 of CSP (arXiv 2412.04652).
    Not differentiable: torch warns in a backward pass and gives no gradient.
    """
    return call(torch.ops.csp.decode, query, key, value, start, end, n=n, scale=scale)


@torch.library.register_fake("csp::decode")
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    *,
    n: float = 1.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    same_device("decode", query=query, key=key, value=value, start=start, end=end)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty(query.shape[:3], dtype=accumulate_dtype(query.dtype))
