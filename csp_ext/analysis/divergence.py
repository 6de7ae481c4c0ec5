"""How far two distributions are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def jensen_shannon(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Return the Jensen-Shannon divergence of histograms over common bins.

    Parameters
    ----------
    first, second : array_like
        [..., bins] counts, at least 0; they need not add up to the same.

    Returns
    -------
    ndarray
        [...] bits: 0 for equal shapes, 1 for no bin in common, NaN where a histogram is empty.

    Raises
    ------
    ValueError
        If the shapes differ or a count is negative.
    """
    p, q = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if p.shape != q.shape:
        raise ValueError(f"first and second must have one shape, got {p.shape} and {q.shape}")
    if (p < 0).any() or (q < 0).any():
        raise ValueError("first and second must be counts, got a negative one")
    with np.errstate(invalid="ignore"):
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    middle = (p + q) / 2
    return np.maximum((_bits(p, middle) + _bits(q, middle)) / 2, 0)


def _bits(p: NDArray[np.float64], of: NDArray[np.float64]) -> Any:
    """Return the Kullback-Leibler divergence in bits; what has no probability adds nothing."""
    ratio = np.divide(p, of, out=np.ones_like(p), where=(p > 0) | np.isnan(p))
    return (p * np.log2(ratio)).sum(-1)
