"""PyramidKV's budgets by hand, and that each layer keeps the best of SnapKV."""

from __future__ import annotations

import itertools

import pytest
import torch
from method_layers import make_layer, selected
from torch import Tensor

from csp_ext.methods import Layer, PyramidKV, SnapKV


def test_pyramid_by_hand():
    # 100 beside the recent ones: from 195 down to 5 in steps of 63 1/3; the first remainder is the larger
    assert PyramidKV.budgets(110, 10, 4, 1000) == [205, 142, 78, 15]
    # a row of 150 tokens has only 140 beside the recent ones: from 140 down to 60
    assert PyramidKV.budgets(110, 10, 5, 150) == [150, 130, 110, 90, 70]
    assert PyramidKV.budgets(110, 10, 1, 1000) == [110]
    assert PyramidKV.budgets(110, 10, 3, 110) == [110] * 3
    assert PyramidKV.budgets(110, 10, 3, 90) == [90] * 3
    assert PyramidKV.budgets(10, 10, 2, 40) == [10, 10]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 32])
def test_pyramids_add_up(count):
    for budget, recent, length in itertools.product((1, 9, 64, 97), (0, 1, 8), (98, 120, 700)):
        recent = min(recent, budget)
        slots = PyramidKV.budgets(budget, recent, count, length)
        assert sum(slots) == count * budget
        assert slots == sorted(slots, reverse=True)
        assert recent <= min(slots)
        assert max(slots) <= length


def test_a_pyramid_keeps_the_best_of_snapkv():
    layer = make_layer("inside")
    for index in range(3):
        placed = Layer(**{**vars(layer), "index": index, "count": 3})
        slots = selected(PyramidKV(budget=40, recent=6, window=6), placed)
        for row in range(2):
            length = int((layer.modality[row] >= 0).sum())
            own = PyramidKV.budgets(40, 6, 3, length)[index]
            alone = Layer(
                **{
                    name: value[row : row + 1] if isinstance(value, Tensor) else value
                    for name, value in vars(placed).items()
                }
            )
            want = selected(SnapKV(budget=own, recent=6, window=6), alone)
            kept = slots[row : row + 1]
            assert torch.equal(kept[kept >= 0], want[want >= 0])
            assert (kept >= 0).sum() == 2 * own
