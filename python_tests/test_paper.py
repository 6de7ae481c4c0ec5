"""The paper's figures and tables measured again: attention weights, divergence, density, times and files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

import csp_ext
from csp_ext.analysis import attention
from csp_ext.analysis.attention import BINS, BINS_PER_DECADE, LOWEST, mean_weights, weight_counts
from csp_ext.analysis.density import bin_middles, density
from csp_ext.analysis.divergence import jensen_shannon
from csp_ext.evaluation import load_eval_model, make_samples
from csp_ext.evaluation.world import Layout
from csp_ext.integration.recording import Recording

SMALL = Layout(photos=3, codes=2, pins=2, links=2, fillers=5)


@pytest.fixture(scope="module", params=[4, 2], ids="{} KV heads".format)
def record(request):
    """Records two prompts of different lengths."""
    model, processor = load_eval_model(num_kv_heads=request.param)
    samples = make_samples("photo", 1, 1, layout=SMALL) + make_samples("triple", 1, 1, layout=SMALL)
    inputs = processor(
        text=[sample.prompt for sample in samples],
        images=[image for sample in samples for image in sample.images],
        return_tensors="pt",
        padding=True,
    )
    with csp_ext.apply(model, method="full") as handle:
        yield lambda observes=None: Recording.of(handle, inputs, observes)


@pytest.fixture(scope="module")
def recording(record):
    return record()


def brute_force(recording, window):
    """Softmax of one query at a time, every weight on a list of its own."""
    result = []
    for layer in recording.cache.layers:
        heads = layer.queries.shape[1]
        counts = np.zeros((heads, 2, BINS), dtype=np.int64)
        for row, modality in enumerate(recording.modality.tolist()):
            last = max(i for i, kind in enumerate(modality) if kind >= 0)
            first_after_image = max(i for i, kind in enumerate(modality) if kind == 1) + 1
            begin = first_after_image if window == "question" else last + 1 - window
            for head in range(heads):
                keys = layer.keys[row, head * layer.keys.shape[1] // heads].double()
                for i in range(begin, last + 1):
                    seen = [j for j in range(i + 1) if modality[j] >= 0]
                    query = layer.queries[row, head, i].double()
                    weights = (keys[seen] @ query * layer.scale).log_softmax(0) / np.log(10)
                    for j, weight in zip(seen, weights.tolist(), strict=True):
                        at = int(min(max((weight - LOWEST) * BINS_PER_DECADE, 0), BINS - 1))
                        counts[head, int(modality[i] != modality[j]), at] += 1
        result.append(counts)
    return np.stack(result)


@pytest.mark.parametrize("window", ["question", 12])
def test_weights_are_split_and_counted_as_by_brute_force(recording, window, monkeypatch):
    monkeypatch.setattr(attention, "TILE", 5)
    counts, expected = weight_counts(recording, window).numpy(), brute_force(recording, window)
    assert np.array_equal(counts.sum(-1), expected.sum(-1))
    # Rounding may move a weight to the next bin, no further.
    assert np.abs(counts.cumsum(-1) - expected.cumsum(-1)).max() <= 2
    assert (counts != expected).mean() < 0.01


def test_a_share_is_of_the_longest_prompt(recording):
    length = recording.modality.shape[1]
    assert torch.equal(weight_counts(recording, 0.5), weight_counts(recording, length // 2))


def test_weights_of_a_query_add_up(recording):
    counts = weight_counts(recording, 8)
    mass = torch.nan_to_num(mean_weights(counts)) * counts.sum(-1)
    # 8 queries in each of two rows; a bin's middle is up to 12 % off.
    assert torch.allclose(mass.sum(-1), torch.tensor(16.0).to(mass), rtol=0.13)


def test_a_recording_without_the_window_is_refused(record):
    assert weight_counts(record(observes=12), 12).sum() > 0
    with pytest.raises(
        ValueError, match=r"window begins at position \d+, the recording has queries from"
    ):
        weight_counts(record(observes=4), 12)


def test_divergence_is_scipys_squared():
    from scipy.spatial.distance import jensenshannon

    rng = np.random.default_rng(0)
    p, q = rng.integers(0, 9, (2, 5, 40))
    expected = [jensenshannon(a, b, base=2) ** 2 for a, b in zip(p, q, strict=True)]
    assert np.allclose(jensen_shannon(p, q), expected)
    assert jensen_shannon([1, 2, 0], [10, 20, 0]) == 0
    assert jensen_shannon([1, 0], [0, 7]) == 1
    assert np.isnan(jensen_shannon([0, 0], [1, 2]))
    with pytest.raises(ValueError, match="one shape"):
        jensen_shannon([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="negative"):
        jensen_shannon([1, -2], [1, 2])


def test_density_is_that_of_the_weights_and_adds_up():
    from scipy.stats import gaussian_kde

    rng = np.random.default_rng(0)
    drawn = rng.normal(-4, 1, 20_000)
    counts = np.histogram(drawn, bins=np.linspace(LOWEST, 0, BINS + 1))[0]
    grid = np.linspace(-12, 1, 400)
    estimate = density(counts, grid)
    assert np.abs(estimate - gaussian_kde(drawn)(grid)).max() < 0.01
    assert np.trapezoid(estimate, grid) == pytest.approx(1, abs=1e-3)
    # What is too small for the bins is missing from the curve, not from the total.
    counts[0] = counts.sum()
    assert np.trapezoid(density(counts, grid), grid) == pytest.approx(0.5, abs=1e-3)
    assert not density(np.eye(BINS)[80], bin_middles()).any()
