"""LOOK-M against a straight reading of its formulas, in float64 and one dropped token at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from method_layers import PADDINGS, head_attention, heads_of, make_layer, selected
from torch import Tensor

from csp_ext import reference
from csp_ext.methods import H2O, Layer, LookM, merging


@pytest.mark.parametrize("padding", PADDINGS)
def test_text_priors_keep_what_they_say(padding):
    layer = make_layer(padding)
    scores = [head_attention(layer, *pair)[0].sum(0) for pair in heads_of(layer)]
    for budget in (140, 40):
        recent = budget // 2
        slots = {
            prior: selected(LookM(budget=budget, text_prior=prior), layer)
            for prior in ("off", "exact", "release")
        }
        most = 0
        for (row, head), score in zip(heads_of(layer), scores, strict=True):
            real = (layer.modality[row] >= 0).nonzero().flatten().tolist()
            last, old = real[-recent:], real[:-recent]
            by_score = sorted(old, key=lambda key: -score[key])
            text = [key for key in by_score if layer.modality[row, key] == 0]
            text_first = text + [key for key in by_score if key not in text]
            room = budget - recent
            whole = len(real) <= budget
            most = max(most, len(text))
            forced = old[:4] + [key for key in by_score if key not in old[:4]]
            want = {
                "off": old if whole else forced[:room],
                "exact": old if whole else text_first[:room],
                "release": old if whole else text_first[: max(room, len(text))],
            }
            for prior, chosen in want.items():
                kept = slots[prior][row, head]
                assert kept[kept >= 0].tolist() == sorted(chosen + last)
                assert (kept[: kept.numel() - len(chosen) - len(last)] == -1).all()
        assert slots["off"].shape[-1] == slots["exact"].shape[-1] == budget
        assert slots["release"].shape[-1] == max(budget - recent, most) + recent


def naive_merge(layer: Layer, slots: Tensor, merge: str, aligned: bool) -> tuple[Tensor, Tensor]:
    """Merge one dropped token after the other, in float64."""
    rows, heads, count = slots.shape
    key, value = layer.key.double(), layer.value.double()
    outs = [torch.zeros(rows, heads, count, key.shape[-1], dtype=torch.float64) for _ in range(2)]
    for row in range(rows):
        real = (layer.modality[row] >= 0).nonzero().flatten().tolist()
        gone, similarity, target = [], [], []
        for head in range(heads):
            kept = slots[row, head].tolist()
            gone.append([key for key in real if key not in kept])
            similarity.append([])
            target.append([])
            for token in gone[head]:
                likeness = [
                    float(torch.cosine_similarity(key[row, head, token], key[row, head, slot], dim=0))
                    if slot >= 0
                    else -2.0
                    for slot in kept
                ]
                similarity[head].append(max(likeness))
                target[head].append(likeness.index(max(likeness)))
        overall = torch.tensor(similarity)
        merging_ranks = list(range(len(gone[0])))
        if merge != "pivotal" and gone[0]:
            merging_ranks = (overall.mean(0) >= overall.mean()).nonzero().flatten().tolist()
        for head, (tokens, out) in itertools.product(range(heads), zip((key, value), outs, strict=True)):
            taken: dict[int, list[Tensor]] = {}
            for turn, rank in enumerate(merging_ranks):
                token = gone[head][rank if aligned else turn]
                weight = similarity[head][rank] if merge == "weighted" else 1.0
                taken.setdefault(target[head][rank], []).append(weight * tokens[row, head, token])
            for slot, position in enumerate(slots[row, head].tolist()):
                if position < 0:
                    assert slot not in taken
                    continue
                own = tokens[row, head, position]
                others = taken.get(slot, [])
                if merge == "pivotal":
                    others = [(other + own) / 2 for other in others]
                out[row, head, slot] = (own + sum(others)) / (1 + len(others))
    return outs[0], outs[1]


MERGES = [("pivotal", True), ("weighted", True), ("average", True), ("average", False)]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize(("merge", "aligned"), MERGES)
@pytest.mark.parametrize(
    ("padding", "dtype"),
    [("left", torch.float32), ("inside", torch.float64), ("right", torch.bfloat16)],
)
def test_merging_equals_one_token_at_a_time(merge, aligned, padding, dtype):
    layer = make_layer(padding, dtype=dtype)
    # Padding may hold anything.
    hidden = (layer.modality < 0)[:, None, :, None]
    layer = Layer(**{**vars(layer), "value": layer.value.masked_fill(hidden, torch.nan)})
    method = LookM(budget=30, merge=merge, aligned=aligned, text_prior="release")
    selection = method.start(layer.modality, layer.key.shape[2], False)
    slots = torch.nn.functional.pad(selection.select(layer), (1, 0), value=-1)
    got = selection.merge(layer, slots, *reference.compact(layer.key, layer.value, slots))
    for ours, want in zip(got, naive_merge(layer, slots, merge, aligned), strict=True):
        assert ours.dtype == dtype
        assert (ours[slots < 0] == 0).all()
        torch.testing.assert_close(ours.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_what_is_not_dropped_is_not_merged():
    layer = make_layer("left")
    slots = torch.arange(150, dtype=torch.int32).expand(2, 2, -1)
    slots = torch.where(layer.modality[:, None] >= 0, slots, -1)
    assert not merging.dropped(layer.modality >= 0, slots).any()
    for merge, aligned in MERGES:
        key, value = layer.key.clone(), layer.value.clone()
        merged = LookM(merge=merge, aligned=aligned).put_in(layer, slots, key, value)
        assert torch.equal(merged[0], layer.key)
        assert torch.equal(merged[1], layer.value)


def test_a_free_slot_is_nearest_to_nothing():
    kept = torch.tensor([[[[0.0, 0.0], [-1.0, 0.0], [-1.0, -1.0]]]])
    slots = torch.tensor([[[-1, 0, 1]]], dtype=torch.int32)
    similarity, target = merging.nearest(torch.tensor([[[[1.0, 0.0], [1.0, 1.0]]]]), kept, slots)
    torch.testing.assert_close(similarity[0, 0], torch.tensor([-(0.5**0.5), -(0.5**0.5)]))
    assert target.tolist() == [[[2, 1]]]


def test_tokens_that_resemble_nothing_may_still_merge():
    similarity = torch.tensor([[[-0.5, 1.0, -0.1, -0.3], [1.0, -0.1, -0.3, -0.9]]])
    gone = torch.tensor([[[True, False, True, True], [False, True, True, True]]])
    # By rank the heads' means are -0.3, -0.2 and -0.6.
    assert merging.resembling(similarity, gone).tolist() == [[True, True, False, False]]


def test_no_merge_is_h2o_with_sinks():
    layer = make_layer("left")
    for merge in merging.MERGES:
        selection = LookM(budget=30, merge=merge).start(layer.modality, 150, True)
        assert selection.merges == (merge != "none")
    slots = LookM(budget=30, merge="none").start(layer.modality, 150, True).select(layer)
    h2o = selected(H2O(budget=30), layer)
    both = [
        set(a.tolist()) & set(b.tolist()) for a, b in zip(slots.flatten(0, 1), h2o.flatten(0, 1), strict=True)
    ]
    assert all(26 <= len(same) <= 30 for same in both)
    first = slots[slots >= 0].view(2, 2, 30)[..., :4]
    assert first.tolist() == [[[0, 1, 2, 3]] * 2, [[9, 10, 11, 12]] * 2]
