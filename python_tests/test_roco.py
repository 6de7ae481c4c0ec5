"""RoCo against a straight reading of its formula, in float64 and one head at a time."""

from __future__ import annotations

import pytest
import torch
from method_layers import head_attention, heads_of, make_layer, selected

from csp_ext.methods import Layer, RoCo
from csp_ext.methods.roco import attention_moments

LAYERS = [
    {},
    {"padding": "left"},
    {"padding": "right"},
    {"padding": "inside", "dtype": torch.float64},
    {"padding": "inside", "shown": 61},
    {"padding": "left", "causal": False, "scale": 0.2},
]


@pytest.mark.parametrize("options", LAYERS)
def test_attention_moments(options):
    layer = make_layer(**options)
    mean, spread = attention_moments(layer)
    rtol = 1e-9 if layer.key.dtype == torch.float64 else 2e-5
    for row, head in heads_of(layer):
        weights, sees = head_attention(layer, row, head)
        for key in range(layer.key.shape[2]):
            seen = weights[sees[:, key], key]
            want = (seen.mean(), seen.std(correction=0)) if seen.numel() else (torch.tensor(0.0),) * 2
            got = mean[row, head, key].double(), spread[row, head, key].double()
            torch.testing.assert_close(got[0], want[0].double(), rtol=rtol, atol=1e-8)
            # The difference of squares loses half of the digits where the spread is small.
            torch.testing.assert_close(got[1], want[1].double(), rtol=50 * rtol, atol=2e-5)


def test_bfloat16_moments_are_those_of_the_upcast():
    layer = make_layer("left", dtype=torch.bfloat16)
    wide = Layer(**{**vars(layer), "query": layer.query.float(), "key": layer.key.float()})
    for ours, theirs in zip(attention_moments(layer), attention_moments(wide), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", LAYERS)
@pytest.mark.parametrize(
    "fields",
    [{}, {"protected": 0}, {"protected": 0.7, "sinks": 0}, {"protected": 60}, {"recent": 28, "protected": 9}],
)
def test_roco_keeps_what_its_formula_says(options, fields):
    layer = make_layer(**options)
    method = RoCo(budget=30, **fields)
    slots = selected(method, layer)
    share = method.protected
    wanted = int(share * 30 + 1e-6) if isinstance(share, float) else share
    for row, head in heads_of(layer):
        weights, sees = head_attention(layer, row, head)
        real = (layer.modality[row] >= 0).nonzero().flatten().tolist()
        recent, old = real[-method.recent :], real[: -method.recent]
        moments = {}
        for key in old:
            seen = weights[sees[:, key], key]
            moments[key] = (float(seen.mean()), float(seen.std(correction=0))) if len(seen) else (0.0, 0.0)
        room = 30 - method.recent
        # Where the sinks alone are too many, the last of them stay.
        kept = old[: method.sinks][-room:]
        steady = [key for key in old if key not in old[: method.sinks]]
        by_spread = sorted(steady, key=lambda key: (-moments[key][1], -key))
        kept += by_spread[: min(wanted, room - len(kept))]
        by_mean = sorted(set(steady) - set(kept), key=lambda key: (-moments[key][0], -key))
        kept += by_mean[: room - len(kept)]
        assert slots[row, head].tolist() == sorted(kept + recent)


def test_protection_matters():
    layer = make_layer()
    kept = [selected(RoCo(budget=30, protected=count), layer) for count in (0, 12)]
    assert not torch.equal(*kept)
