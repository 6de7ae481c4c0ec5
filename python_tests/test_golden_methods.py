"""Agreement of the baselines with the golden vectors: kept sets, scores and merged caches."""

from __future__ import annotations

import pytest
import torch
from golden import CASES, GOLDEN, Case, load, needs_golden

from csp_ext import ops
from csp_ext.methods import H2O, LookM, SnapKV, merging
from csp_ext.methods.ranked import Ranked, RankedSelection

pytestmark = needs_golden

PRESENT = (GOLDEN / "README.md").is_file()
PRIORS = {"lookm.": "off", "lookm.tp.": "release"}
MERGES = {"pivot": "pivotal", "weighted": "weighted", "avg": "average"}


def cases_with(tensor: str) -> list[str]:
    """Return the cases that store a tensor."""
    return [name for name in CASES if tensor in load(name).tensors] if PRESENT else []


KEPT = [(name, group) for group in PRIORS for name in cases_with(f"{group}kept_mask")]
TARGETS = [(name, group) for group in PRIORS for name in cases_with(f"{group}target")]
MERGED = [
    (name, group, merge)
    for group in PRIORS
    for merge in MERGES
    for name in cases_with(f"{group.replace('tp.', 'tp_')}{merge}.k_out")
]


def started(case: Case, kind: type[Ranked], **fields: object) -> RankedSelection:
    """Start a method with the release's sizes; one prompt is too short for any."""
    method = kind(budget=max(1, case.hh + case.recent), recent=case.recent, **fields)  # type: ignore[arg-type]
    return method.start(case.modality, case.length, True)  # type: ignore[return-value]


def look_m(case: Case, group: str, merge: str = "pivot") -> RankedSelection:
    return started(
        case, LookM, text_prior=PRIORS[group], merge=MERGES[merge], aligned=MERGES[merge] != "average"
    )


def compacted(case: Case, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.compact(case.key, case.value, slots)


def per_head(values: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """Return what belongs to the dropped positions of the only row, [H, n_evicted]."""
    return values[gone].view(gone.shape[1], -1)


def test_every_group_is_tested():
    assert len(cases_with("h2o.score")) == 13
    assert len(cases_with("snapkv.idx")) == 12
    assert (len(KEPT), len(TARGETS), len(MERGED)) == (11, 10, 18)


@pytest.mark.parametrize("name", cases_with("h2o.score"))
def test_h2o(name):
    case = load(name)
    selection = started(case, H2O)
    scores = selection.method.scores(case.layer, selection)[0]
    torch.testing.assert_close(scores, case.tensors["h2o.score"], rtol=1e-5, atol=1e-7)
    if case.hh + case.recent == 0:
        assert name == "pe3_too_short"
        return
    assert torch.equal(selection.select(case.layer)[0], case.tensors["h2o.kept_sorted"].int())


@pytest.mark.parametrize("name", cases_with("snapkv.idx"))
def test_snapkv(name):
    case = load(name)
    selection = started(case, SnapKV, window=case.recent, pool="avg", pool_kernel=5)
    scores = selection.method.scores(case.layer, selection)[0, :, : case.length - case.recent]
    torch.testing.assert_close(scores, case.tensors["snapkv.pooled_score"], rtol=1e-5, atol=1e-7)
    best = case.tensors["snapkv.idx"].int().sort(-1).values
    last = torch.arange(case.length - case.recent, case.length, dtype=torch.int32)
    want = torch.cat([best, last.expand(best.shape[0], -1)], dim=-1)
    assert torch.equal(selection.select(case.layer)[0], want)


@pytest.mark.parametrize(("name", "group"), KEPT)
def test_lookm_kept(name, group):
    case = load(name)
    slots = look_m(case, group).select(case.layer)
    want = case.tensors[f"{group}kept_mask"].bool()
    for head, kept in enumerate(slots[0]):
        assert torch.equal(kept, want[head].nonzero().flatten().int())


@pytest.mark.parametrize(("name", "group"), TARGETS)
def test_lookm_targets(name, group):
    case = load(name)
    slots = look_m(case, group).select(case.layer)
    gone = merging.dropped(case.modality >= 0, slots)
    similarity, target = merging.nearest(case.key, compacted(case, slots)[0], slots)
    assert torch.equal(per_head(target, gone), case.tensors[f"{group}target"].long())
    torch.testing.assert_close(
        per_head(similarity, gone), case.tensors[f"{group}target_similarity"], rtol=1e-5, atol=1e-6
    )
    if f"{group}merge_filter" in case.tensors:
        want = case.tensors[f"{group}merge_filter"].bool()
        merges = merging.resembling(similarity, gone)[0]
        assert torch.equal(merges[: want.numel()], want)
        assert not merges[want.numel() :].any()


@pytest.mark.parametrize(("name", "group", "merge"), MERGED)
def test_lookm_merged(name, group, merge):
    case = load(name)
    selection = look_m(case, group, merge)
    slots = selection.select(case.layer)
    merged = selection.merge(case.layer, slots, *compacted(case, slots))
    label = f"{group.replace('tp.', 'tp_')}{merge}"
    for ours, which in zip(merged, ("k_out", "v_out"), strict=True):
        torch.testing.assert_close(ours[0], case.tensors[f"{label}.{which}"], rtol=5e-5, atol=5e-6)


def test_the_release_misaligns_its_average():
    case = load("p8_few_text")
    slots = look_m(case, "lookm.").select(case.layer)
    aligned = started(case, LookM, merge="average").merge(case.layer, slots, *compacted(case, slots))
    worst = (aligned[0][0] - case.tensors["lookm.avg.k_out"]).abs().max()
    assert worst > 0.1
