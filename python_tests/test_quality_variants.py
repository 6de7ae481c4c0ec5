"""The variants that bench/quality_variants.py compares do what their names say."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import csp_ext
from csp_ext.config import CSPConfig
from csp_ext.methods import CSP, Layer

pytest.importorskip("transformers")

BENCH = Path(__file__).parent.parent / "bench"
TEXT, IMAGE = [0] * 5, [1] * 16
KINDS = torch.tensor([[*TEXT, *IMAGE, *TEXT, *IMAGE, *TEXT, *TEXT]] * 2, dtype=torch.int8)


@pytest.fixture
def load(monkeypatch):
    """Import a module of the bench folder."""
    monkeypatch.syspath_prepend(str(BENCH))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)
    for module in [m for m in sys.modules.values() if str(BENCH) in str(getattr(m, "__file__", ""))]:
        del sys.modules[module.__name__]


@pytest.fixture
def layer():
    """Two prompts with two images, 4 query heads, 2 KV heads."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, KINDS.shape[1], 16, generator=generator) * 2 for heads in (4, 2, 2)
    )
    return Layer(query, key, value, KINDS, index=1, count=4, scale=None, causal=True)


def kept(method, layer):
    return method.start(layer.modality, layer.key.shape[2], True).select(layer)


@pytest.mark.parametrize("changes", [{}, {"hop": 0}, {"delay": 2}, {"n": 0.0, "hop": 5}])
def test_the_open_score_keeps_what_the_package_keeps(load, layer, changes):
    config = CSPConfig(budget=20, **changes)
    assert torch.equal(kept(load("variants.scored").Scored(config), layer), kept(CSP(config), layer))


def test_smoothings(load):
    smoothing = load("variants.smoothing")
    # The second image's first cell and its last, and the last token before it.
    scores = torch.zeros(2, 1, KINDS.shape[1])
    scores[..., 26], scores[..., 41], scores[..., 25] = 8, 4, 2

    def raised(smooth):
        result = smooth(scores, KINDS)
        assert torch.equal(result[0], result[1])
        return {at: int(value) for at, value in enumerate(result[0, 0]) if value}

    assert raised(smoothing.Past()) == {25: 2, 26: 8, 27: 8, 28: 8, 29: 8, 41: 4}
    across = {25: 2, 26: 8, 27: 8, 28: 8, 29: 8, 41: 4, 42: 4, 43: 4, 44: 4}
    assert raised(smoothing.Past(within_run=False)) == across
    assert raised(smoothing.Grid((-1, 1), (-1, 1))) == {
        25: 2,
        26: 8,
        27: 8,
        30: 8,
        31: 8,
        36: 4,
        37: 4,
        40: 4,
        41: 4,
    }
    row = {25: 2, 26: 8, 27: 8, 28: 8, 29: 8, 38: 4, 39: 4, 40: 4, 41: 4}
    assert raised(smoothing.Grid((0, 0), (-3, 3))) == row
    past = {25: 2, 26: 8, 27: 8, 28: 8, 29: 8, 41: 4}
    assert raised(smoothing.Grid((0, 0), (-3, 0))) == past
    assert raised(smoothing.WholeImage(1.0)) == {25: 2, **dict.fromkeys(range(26, 42), 8)}
    assert smoothing.WholeImage(0.25)(scores, KINDS)[0, 0, 41] == 0.75 * 4 + 0.25 * 8


def test_a_causal_hop_asks_nothing_of_what_comes_later(load, layer):
    scored = load("variants.scored")
    method = scored.Scored(CSPConfig(budget=20), asking=scored.Asking(causal=True))
    place = torch.tensor([[[3, 30]]] * 2)
    given = method.start(KINDS, KINDS.shape[1], True).asked(layer, place)
    assert given.shape == (2, 2, 2, KINDS.shape[1] - 8)
    assert (given[:, :, 0, :4] > 0).all()
    assert not given[:, :, 0, 4:].any()
    assert not given[:, :, 1, 31:].any()


def test_budgets_that_move_keep_their_total(load, layer):
    across = load("variants.scored").AcrossHeads(CSPConfig(budget=20), floor=0.5)
    slots = kept(across, layer)
    counts = (slots >= 0).sum(-1)
    assert counts.sum(-1).tolist() == [40, 40]
    assert counts.min() >= 8 + 6
    assert (slots[..., -8:] == torch.arange(KINDS.shape[1] - 8, KINDS.shape[1])).all()
    layers = load("variants.layers")
    assert layers.split(13, (1.45, 1.15, 0.85, 0.55)) == [19, 15, 11, 7]
    pyramid = layers.AcrossLayers(CSPConfig(budget=20), (1.45, 1.15, 0.85, 0.55))
    sizes = [kept(pyramid, dataclasses.replace(layer, index=index)).shape[-1] for index in range(4)]
    assert sum(sizes) == 4 * 20
    with pytest.raises(ValueError, match="weights must be 4"):
        kept(layers.AcrossLayers(CSPConfig(budget=20), (1.0, 1.0)), layer)


def test_a_residual_slot_restores_the_attention_of_its_query(load, monkeypatch):
    """With one observing query the kept keys and the slot give what all keys gave."""
    from csp_ext.evaluation import load_eval_model, make_samples
    from csp_ext.integration.recording import Recording

    slots = load("variants.slots")
    monkeypatch.setattr(slots, "OBSERVING", 1)
    model, processor = load_eval_model()
    samples = make_samples("code", 2, 3)
    inputs = processor(
        text=[sample.prompt for sample in samples],
        images=[image for sample in samples for image in sample.images],
        return_tensors="pt",
    )
    with csp_ext.apply(model, method="full") as handle:
        recording = Recording.of(handle, inputs)
        pruned = recording.pruned(CSP(CSPConfig(budget=0.1)))
        caches = {kind: slots.with_slot(recording, *pruned, kind) for kind in slots.KINDS}
        sink, _ = recording.pruned(CSP(CSPConfig(budget=0.1, decode_n=1.0)))

    def logits(layer, query):
        bias = 0 if layer.bias is None else layer.bias
        return query @ layer.keys.transpose(2, 3) * 32**-0.5 + bias

    for at, whole in enumerate(recording.cache.layers):
        query = whole.queries[:, :, -1:]
        full, sunk = logits(whole, query), logits(sink.layers[at], query)
        one, calibrated, residual = (logits(caches[kind].layers[at], query) for kind in slots.KINDS)
        torch.testing.assert_close(one, sunk)
        torch.testing.assert_close(calibrated.logsumexp(-1), full.logsumexp(-1))
        torch.testing.assert_close(
            residual.softmax(-1) @ caches["residual"].layers[at].values, full.softmax(-1) @ whole.values
        )


def test_the_tables_and_the_csv(load, tmp_path, capsys):
    module = load("quality_variants")
    module.main(samples=2, seed=500, only="", tasks="link_photo", folder=tmp_path, quick=False)
    text = (tmp_path / "quality_variants.md").read_text()
    assert text in capsys.readouterr().out
    with (tmp_path / "quality_variants.csv").open() as file:
        lines = list(csv.DictReader(file))
    names = {variant.name for variant in load("variants.catalogue").variants("abcdefg")}
    assert {line["variant"] for line in lines} == names | {"full cache"}
    assert len(lines) == 4 * len(names) + 1
    assert all(name in text for name in names)
    assert lines[0]["digit_accuracy"] == "1.0000"
    best = [float(line["digit_accuracy"]) for line in lines if line["variant"] == "default"]
    chance = [float(line["digit_accuracy"]) for line in lines if line["variant"] == "random"]
    assert sum(best) > sum(chance)


def test_a_paired_difference(load):
    report = load("variants.report")
    ours = {"code": np.array([[1.0, 1.0], [1.0, 1.0]]), "pin": np.array([[0.0, 0.5], [1.0, 1.0]])}
    other = {task: np.zeros((2, 2)) for task in ours}
    gap, error = report.difference(ours, other)
    assert gap.tolist() == [0.75, 0.875]
    assert error.tolist() == [0.25, 0.125]
    assert report.cell(0.75, gap[0], error[0]) == "75.0 (+75.0 ± 25.0 ▲)"
    assert report.cell(0.5, -0.1, 0.06) == "50.0 (-10.0 ± 6.0)"
