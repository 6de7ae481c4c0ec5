"""The attention weights of data sets' observation windows: figures 1, 3 and 4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from csp_ext.analysis.attention import CROSS, SELF, mean_weights, queries_needed, weight_counts
from csp_ext.analysis.divergence import jensen_shannon
from csp_ext.evaluation.batches import batches
from csp_ext.evaluation.encoding import Encoder
from csp_ext.evaluation.items import Dataset, Problem
from csp_ext.integration import apply
from csp_ext.integration.recording import Recording


@dataclass(frozen=True)
class Weights:
    """What was counted.

    Attributes
    ----------
    counts : dict of Tensor
        Per data set, int64 [layers, Hq, 2, BINS], see :func:`csp_ext.analysis.attention.weight_counts`.
    prompts : int
        How many.
    problems : list of Problem
        Samples that were left out.
    """

    counts: dict[str, Tensor]
    prompts: int
    problems: list[Problem]

    @property
    def total(self) -> Tensor:
        """All data sets together."""
        return torch.stack(list(self.counts.values())).sum(0)


@torch.inference_mode()
def collect(
    model: Any,
    encoder: Encoder,
    datasets: Sequence[Dataset],
    *,
    window: float | int | str,
    batch_image: int,
    progress: Callable[[int], None],
) -> Weights:
    """Run every sample's prompt and count the weights of its window.

    Parameters
    ----------
    model : PreTrainedModel
        Left as it was.
    encoder : Encoder
        Of the model.
    datasets : sequence of Dataset
        All of their samples are taken.
    window : float, int or "question"
        See :func:`csp_ext.analysis.attention.weight_counts`.
    batch_image : int
        Images that are run together.
    progress : callable
        Gets the number of samples done since the last call.
    """
    counts: dict[str, Tensor] = {}
    problems: list[Problem] = []
    prompts = 0
    with apply(model, method="full") as handle:
        for dataset in datasets:
            for batch in batches(dataset, batch_image):
                prepared = [encoder.prepare(item) for item in batch]
                problems += [entry for entry in prepared if isinstance(entry, Problem)]
                ready = [entry for entry in prepared if not isinstance(entry, Problem)]
                ready, inputs, refused = encoder.encode(ready)
                problems += refused
                if ready:
                    needed = queries_needed(window, inputs["input_ids"].shape[1])
                    found = weight_counts(Recording.of(handle, inputs, needed), window)
                    counts[dataset.name] = counts.get(dataset.name, 0) + found
                    prompts += len(ready)
                progress(len(batch))
    return Weights(counts, prompts, problems)


@dataclass(frozen=True)
class Divergence:
    """Jensen-Shannon divergence between the self and the cross weights, in bits, [layers] each.

    The mean, the least and the greatest of the heads, and that of the heads' weights put together.
    """

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    pooled: NDArray[np.float64]


def divergence(counts: Tensor) -> Divergence:
    """Return the divergence per layer of [layers, Hq, 2, BINS]."""
    heads = jensen_shannon(counts[:, :, SELF], counts[:, :, CROSS])
    together = counts.sum(1)
    pooled = jensen_shannon(together[:, SELF], together[:, CROSS])
    return Divergence(heads.mean(1), heads.min(1), heads.max(1), pooled)


@dataclass(frozen=True)
class Summary:
    """Self and cross weights in a few numbers.

    Attributes
    ----------
    pairs : tuple of int
        Weights counted, self and cross.
    mean : tuple of float
        Of a weight.
    cross_share : float
        Of all attention.
    bits : float
        Divergence of the two, over all layers and heads together.
    """

    pairs: tuple[int, int]
    mean: tuple[float, float]
    cross_share: float
    bits: float


def summary(counts: Tensor) -> Summary:
    """Return the numbers of [layers, Hq, 2, BINS], all layers and heads together."""
    both = counts.sum((0, 1))
    mean, pairs = mean_weights(both), both.sum(-1)
    mass = torch.nan_to_num(mean) * pairs
    return Summary(
        pairs=(int(pairs[SELF]), int(pairs[CROSS])),
        mean=(float(mean[SELF]), float(mean[CROSS])),
        cross_share=float(mass[CROSS] / mass.sum()),
        bits=float(jensen_shannon(both[SELF], both[CROSS])),
    )
