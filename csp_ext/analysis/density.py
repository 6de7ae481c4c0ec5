"""Kernel density estimates of attention weights."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from csp_ext.analysis.attention import BINS, BINS_PER_DECADE, LOWEST


def bin_middles() -> NDArray[np.float64]:
    """Return the decimal logarithm of the weight in the middle of each bin, [BINS]."""
    return LOWEST + (np.arange(BINS) + 0.5) / BINS_PER_DECADE


def density(counts: ArrayLike, at: ArrayLike) -> NDArray[np.float64]:
    """Estimate the density of the decimal logarithm of a weight with Gaussian kernels.

    The bandwidth is Scott's for as many weights as were counted, and at least a bin. The first bin, which
    also holds all that is smaller, is left out of the shape, not of the total.

    Parameters
    ----------
    counts : array_like
        [BINS], of :func:`csp_ext.analysis.attention.weight_counts`.
    at : array_like
        [N] decimal logarithms.

    Returns
    -------
    ndarray
        [N], per decade; zeros where fewer than two bins hold a weight.
    """
    from scipy.stats import gaussian_kde

    all_counts = np.asarray(counts, dtype=np.float64)
    where, inside = bin_middles()[1:], all_counts[1:]
    if (inside > 0).sum() < 2:
        return np.zeros(len(np.asarray(at)))
    middle = np.average(where, weights=inside)
    spread = np.sqrt(np.average((where - middle) ** 2, weights=inside))
    factor = max(inside.sum() ** -0.2, 1 / (BINS_PER_DECADE * spread))
    estimate = gaussian_kde(where, bw_method=factor, weights=inside)
    return np.asarray(estimate(at)) * (inside.sum() / all_counts.sum())
