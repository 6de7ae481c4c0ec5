"""Agreement with the golden vectors, of the twins and of the compiled ops."""

from __future__ import annotations

import pytest
import torch
from golden import CASES, GOLDEN, PROPOSAL_CASES, load, needs_golden, parse_tag

from csp_ext import dispatch, ops, reference, selection
from csp_ext.config import CSPConfig

pytestmark = needs_golden
COMBOS = (
    [(name, tag) for name in CASES for tag in load(name).combos] if (GOLDEN / "README.md").is_file() else []
)
RHOS = ["0.1", "0.5", "0.9"]


@pytest.fixture(params=["reference", "ops"])
def impl(request, monkeypatch):
    """The twins or the compiled ops, also behind select_tokens."""
    module = {"reference": reference, "ops": ops}[request.param]
    monkeypatch.setattr(dispatch, "ops", module)
    return module


def scores(impl, case, query_window, **options):
    query = case.query[:, :, case.length - query_window :]
    return impl.score(query, case.key, case.modality, **options)


def release(case, tag):
    ratio, bias = parse_tag(tag)
    return CSPConfig.release(*case.ratios, recent_bias=bias, cross_ratio=ratio)


def test_every_file_is_here():
    present = {path.stem for path in GOLDEN.glob("*.safetensors")}
    assert present == {*CASES, "proposals"}


@pytest.mark.parametrize("name", CASES)
def test_sums_match_the_release(impl, name):
    case = load(name)
    window = case.recent
    self_sum, cross_sum = scores(impl, case, window)
    assert self_sum.dtype == (torch.float64 if impl is reference else torch.float32)
    tags = {tag.split("_")[1] for tag, combo in case.combos.items() if "passthrough" not in combo}
    for bias in tags:
        for ours, theirs in ((self_sum, "self_sum"), (cross_sum, "cross_sum")):
            want = case.tensors[f"csp.{bias}.{theirs}"]
            torch.testing.assert_close(ours[0, :, : want.shape[1]].float(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_row_sums_match_the_release(impl, name):
    case = load(name)
    if "csp.nsoftmax_row_sum" not in case.tensors:
        assert case.name == "pe4_budget_over_one"
        return
    want = case.tensors["csp.nsoftmax_row_sum"]
    window = want.shape[1]
    seen = torch.ones(window, case.length, dtype=torch.bool).tril(case.length - window)
    logits = case.query[:, :, case.length - window :] @ case.key.mT / case.key.shape[-1] ** 0.5
    rows = impl.n_softmax(logits.masked_fill(~seen, -torch.inf), 1.0).sum(-1)
    torch.testing.assert_close(rows[0].float(), want, rtol=1e-5, atol=0)
    # each query weighs its row sum: the scores of all keys add up to the sums of the rows
    total = sum(part.double().sum(-1) for part in scores(impl, case, window))
    torch.testing.assert_close(total[0].float(), want.sum(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_segmented_column_sum_of_the_materialised_matrix(impl, name):
    case = load(name)
    window = case.recent
    seen = torch.ones(window, case.length, dtype=torch.bool).tril(case.length - window)
    logits = case.query[:, :, case.length - window :] @ case.key.mT / case.key.shape[-1] ** 0.5
    attn = impl.n_softmax(logits.masked_fill(~seen, -torch.inf), 1.0)
    query_modality = case.modality[:, case.length - window :]
    sums = impl.segmented_column_sum(attn, query_modality, case.modality)
    fused = scores(impl, case, window)
    for ours, theirs, label in zip(sums, fused, ("self_sum", "cross_sum"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-30)
        if f"csp.kb1.{label}" in case.tensors:
            want = case.tensors[f"csp.kb1.{label}"]
            torch.testing.assert_close(ours[0, :, : want.shape[1]].float(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "tag"), COMBOS)
@pytest.mark.parametrize("whole_prompt", [False, True], ids=["window", "prompt"])
def test_release_kept_sets(impl, name, tag, whole_prompt):
    case = load(name)
    combo = case.combos[tag]
    assert "error" not in combo, "no golden file holds a combo that only raises"
    query = case.query if whole_prompt else case.query[:, :, case.length - max(case.recent, 1) :]
    indices, lengths = selection.select_tokens(query, case.key, case.modality, release(case, tag))
    if "passthrough" in combo or combo["kv_recent_size"] == 0:
        whole = torch.arange(case.length, dtype=torch.int32).expand(1, case.query.shape[1], -1)
        assert torch.equal(indices, whole)
        assert lengths.tolist() == [[case.length] * case.query.shape[1]]
        return
    assert indices.shape[-1] == combo["n_out"]
    recents = set(range(case.length - combo["kv_recent_size"], case.length))
    bias = tag.split("_")[1]
    for head in range(case.query.shape[1]):
        kept = set(indices[0, head][indices[0, head] >= 0].tolist())
        assert recents <= kept
        must = set()
        for which in ("self", "cross"):
            listed = case.tensors[f"{tag}.{which}_idx"][head].tolist()
            sums = case.tensors[f"csp.{bias}.{which}_sum"][head]
            above = int(case.tensors[f"{tag}.{which}_n_above_cut"][head])
            tied = bool(listed) and sums[listed].min() == 0
            must |= set(listed[:above] if tied else listed)
        # the union of the two lists without their structural zeros, and nothing else
        assert kept - recents == must
        assert int(lengths[0, head]) == len(kept)


@pytest.mark.parametrize("name", PROPOSAL_CASES)
@pytest.mark.parametrize("rho", RHOS)
@pytest.mark.parametrize(("label", "combine"), [("f1", "union"), ("f2", "intersection")])
def test_exact_budget_proposals(impl, name, rho, label, combine):
    case = load(name)
    want = load("proposals").tensors[f"{name}.{label}.rho{rho}"].int()  # [H, hh]
    window = case.recent
    query_modality = case.modality[:, case.length - window :]
    indices, lengths = impl.select(
        *scores(impl, case, window),
        case.modality,
        query_modality,
        budget=case.hh + window,
        recent=window,
        cross_ratio=float(rho),
        combine=combine,
    )
    assert torch.equal(indices[0, :, : case.hh], want)
    assert bool((lengths == case.hh + window).all())


def test_the_proposals_are_240_rows():
    rows = [
        value.shape[0] for key, value in load("proposals").tensors.items() if ".f1." in key or ".f2." in key
    ]
    assert sum(rows) == 240


@pytest.mark.parametrize("name", PROPOSAL_CASES)
def test_paper_masks(impl, name):
    case, stored = load(name), load("proposals").tensors
    candidates = case.length - case.recent
    sums = scores(impl, case, case.recent, heads="shared")
    self_sum, cross_sum = (part[0, 0, :candidates] for part in sums)
    for ours, label in ((self_sum, "self"), (cross_sum, "cross")):
        want = stored[f"{name}.paper.{label}_sum_headmean"]
        torch.testing.assert_close(ours.float(), want, rtol=1e-5, atol=0)
    for rho in RHOS:
        k_self, k_cross = int(case.hh * (1 - float(rho))), int(case.hh * float(rho))
        mask_self, mask_cross = (
            stored[f"{name}.paper.rho{rho}.mask_{which}"].bool() for which in ("self", "cross")
        )
        # each literal mask alone, then Eq. 3 and its union; zero scores are filled from the end
        assert torch.equal(impl.dual_top_k(self_sum, self_sum, k_self, k_self), mask_self)
        assert torch.equal(impl.dual_top_k(cross_sum, cross_sum, k_cross, k_cross), mask_cross)
        both = impl.dual_top_k(self_sum, cross_sum, k_self, k_cross)
        either = impl.dual_top_k(self_sum, cross_sum, k_self, k_cross, combine="union")
        assert torch.equal(both, mask_self & mask_cross)
        assert torch.equal(either, mask_self | mask_cross)


@pytest.mark.parametrize("name", ["p2_mixed_window", "p6_image_window"])
def test_compaction_is_bit_exact(impl, name):
    case = load(name)
    indices, _ = selection.select_tokens(case.query, case.key, case.modality, release(case, "csp.cr0.5_kb1"))
    key, value = impl.compact(case.tensors["k"], case.tensors["v"], indices)
    assert key.dtype == torch.float16
    rows = case.tensors["csp.cr0.5_kb1.k_out"], case.tensors["csp.cr0.5_kb1.v_out"]
    listed = [case.tensors[f"csp.cr0.5_kb1.{which}_idx"] for which in ("self", "cross")]
    for head in range(indices.shape[1]):
        order = torch.cat([part[head].long() for part in listed])
        for position, k_row, v_row in zip(order.tolist(), rows[0][head], rows[1][head], strict=False):
            slot = (indices[0, head] == position).nonzero().flatten()
            if slot.numel():
                assert torch.equal(key[0, head, slot[0]], k_row)
                assert torch.equal(value[0, head, slot[0]], v_row)
