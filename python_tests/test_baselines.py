"""The baselines against straight readings of their formulas, in float64 and one head at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from csp_ext import reference
from csp_ext.methods import H2O, Layer, LookM, PyramidKV, RoCo, SnapKV, merging
from csp_ext.methods.ranked import Ranked
from csp_ext.methods.roco import attention_moments

# Per kind of padding two rows, each with its spans of padding.
PADDINGS: dict[str, list[list[tuple[int, int]]]] = {
    "none": [[], []],
    "left": [[], [(0, 9)]],
    "right": [[], [(110, 150)]],
    "inside": [[], [(0, 3), (40, 47), (145, 150)]],
}


def modality_of(padding: list[tuple[int, int]]) -> list[int]:
    """Return 150 tokens of text with two images and spans of padding."""
    row = [0] * 150
    row[10:35], row[50:70] = [1] * 25, [1] * 20
    for start, stop in padding:
        row[start:stop] = [-1] * (stop - start)
    return row


def make_layer(
    padding: str = "none",
    dtype: torch.dtype = torch.float32,
    shown: int = 150,
    causal: bool = True,
    scale: float | None = None,
) -> Layer:
    """Return a layer of random tensors with 4 query heads over 2 KV heads."""
    rows = [modality_of(spans) for spans in PADDINGS[padding]]
    generator = torch.Generator().manual_seed(0)
    shape = (2, 4, 150, 8)
    query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
    return Layer(
        (2 * query[:, :, 150 - shown :]).to(dtype),
        key[:, :2].to(dtype),
        value[:, :2].to(dtype),
        torch.tensor(rows, dtype=torch.int8),
        0,
        1,
        scale,
        causal,
    )


def selected(method: Ranked, layer: Layer) -> Tensor:
    longest = int((layer.modality >= 0).sum(-1).max())
    return method.start(layer.modality, longest, False).select(layer)


def head_attention(layer: Layer, row: int, head: int) -> tuple[Tensor, Tensor]:
    """Return the attention [Q, L] of a KV head, the mean of its group, and what each query sees."""
    length, shown = layer.key.shape[2], layer.query.shape[2]
    asks = torch.arange(length - shown, length)
    real = layer.modality[row] >= 0
    sees = real[asks][:, None] & real
    if layer.causal:
        sees &= torch.arange(length) <= asks[:, None]
    group = layer.query.shape[1] // layer.key.shape[1]
    scale = layer.key.shape[-1] ** -0.5 if layer.scale is None else layer.scale
    weights = []
    for query in layer.query[row, head * group : (head + 1) * group].double():
        logits = (query @ layer.key[row, head].double().T * scale).masked_fill(~sees, -torch.inf)
        weights.append(logits.softmax(-1).nan_to_num(0))
    return torch.stack(weights).mean(0), sees


def heads_of(layer: Layer) -> itertools.product:
    return itertools.product(range(layer.key.shape[0]), range(layer.key.shape[1]))


# --- RoCo ----------------------------------------------------------------------------------

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


# --- LOOK-M --------------------------------------------------------------------------------


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
    selection = LookM(budget=30, merge="none").start(layer.modality, 150, True)
    slots = selection.select(layer)
    key, value = reference.compact(layer.key, layer.value, slots)
    merged = selection.merge(layer, slots, key.clone(), value.clone())
    assert torch.equal(merged[0], key)
    assert torch.equal(merged[1], value)
    h2o = selected(H2O(budget=30), layer)
    both = [
        set(a.tolist()) & set(b.tolist()) for a, b in zip(slots.flatten(0, 1), h2o.flatten(0, 1), strict=True)
    ]
    assert all(26 <= len(same) <= 30 for same in both)
    first = slots[slots >= 0].view(2, 2, 30)[..., :4]
    assert first.tolist() == [[[0, 1, 2, 3]] * 2, [[9, 10, 11, 12]] * 2]


# --- PyramidKV -----------------------------------------------------------------------------


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
