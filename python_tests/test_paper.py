"""The paper's figures and tables measured again: attention weights, divergence, density, times and files."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
pytest.importorskip("rouge")

import csp_ext
from csp_ext.analysis import attention
from csp_ext.analysis.attention import BINS, BINS_PER_DECADE, LOWEST, mean_weights, weight_counts
from csp_ext.analysis.density import bin_middles, density
from csp_ext.analysis.divergence import jensen_shannon
from csp_ext.cli import main
from csp_ext.commands.paper import NAMES
from csp_ext.evaluation import load_eval_model, make_samples
from csp_ext.evaluation.checkpoint import checkpoint_folder
from csp_ext.evaluation.items import Draft
from csp_ext.evaluation.milebench import write_dataset
from csp_ext.evaluation.suite import write_suite
from csp_ext.evaluation.world import Layout
from csp_ext.integration.recording import Recording
from csp_ext.paper.latency import TURN, Pruned
from csp_ext.paper.studies import STUDIES

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
    with pytest.raises(ValueError, match=r"window begins at position \d+, the recording has queries from"):
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


def csp(*words):
    return CliRunner().invoke(main, ["paper", *map(str, words)])


def cells(line):
    """Return the cells of a row in Markdown."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def numbers_of(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize("name", NAMES)
def test_a_study_writes_its_files_and_says_how(name, tmp_path):
    budget = ["--budget", "20%"] if name in ("table2", "fig7") else []
    result = csp(name, "--quick", "--samples", 1, "--dataset", "code", "--out", tmp_path, *budget)
    assert result.exit_code == 0, result.output
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert numbers_of(tmp_path / f"{name}.csv")
    text = (tmp_path / f"{name}.md").read_text()
    for fact in ("Model: evaluation model, 4 KV heads", "torch", f"csp paper {name} --out {tmp_path}"):
        assert fact in text
    assert "Repeat with:" in result.stdout


def test_studies_are_those_of_the_command():
    assert tuple(STUDIES) == NAMES


@pytest.fixture(scope="module")
def milebench(tmp_path_factory):
    """Two samples in the format of ALFRED, which the paper has numbers of, and two of a task of our own."""
    root = tmp_path_factory.mktemp("milebench")
    samples = make_samples("photo", 2, 1)
    drafts = [
        Draft("".join(f"{{image#{i + 1}}} " for i in range(12)) + sample.question, "photo ada", sample.images)
        for sample in samples
    ]
    write_dataset(root, "ALFRED", drafts, question_type="open-ended")
    write_suite(root, tasks=["code"], count=2, seed=7, mode="S")
    return root


def test_published_numbers_stand_beside_their_own_data_only(milebench, tmp_path):
    words = ["--model", checkpoint_folder(), "--data", milebench, "--out", tmp_path, "--max-new-tokens", 8]
    result = csp("table1", *words)
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "table1.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| method"))
    assert cells(head)[:4] == ["method", "all", "S-4", "text"]
    (snapkv,) = [line for line in lines if line.startswith("| snapkv-release, released")]
    assert cells(snapkv)[:4] == ["snapkv-release, released", "-", "19.5", "-"]
    # S-4 has a second data set, which is not here: its number in the paper's table means something else.
    assert not any(line.startswith("| csp, paper's") for line in lines)
    rows = numbers_of(tmp_path / "table1.csv")
    (full,) = [row for row in rows if row["arm"] == "full" and row["group"] == "text"]
    assert float(full["score"]) == 1


def test_times_are_those_of_the_papers_data_set(milebench, tmp_path):
    words = ["--model", checkpoint_folder(), "--data", milebench, "--out", tmp_path, "--quick"]
    assert csp("table2", *words).exit_code == 0
    text = (tmp_path / "table2.md").read_text()
    assert "sample 0 of ALFRED" in text
    assert "19.736 | 0.476 GiB |" in text
    rows = {float(row["budget"]): row for row in numbers_of(tmp_path / "table2.csv")}
    tokens = int(rows[1.0]["prompt_tokens"])
    per_token = 2 * 4 * 4 * 32 * 4  # keys and values, layers, heads, head_dim, bytes
    for budget, row in rows.items():
        assert int(row["prompt_cache_bytes"]) == int(budget * tokens + 1e-6) * per_token
        assert int(row["final_cache_bytes"]) - int(row["prompt_cache_bytes"]) == 64 * per_token


def test_budgets_are_compared_turn_by_turn():
    # The machine is ten times slower in the second turn, for both.
    full, half = (2.0,) * TURN + (20.0,) * TURN, (1.0,) * TURN + (10.0,) * TURN
    one, other = (Pruned(1.0, steps, 0.0, 0, 0) for steps in (full, half))
    assert other.relative_to(one) == 0.5


def test_one_json_object(tmp_path):
    result = csp(
        "fig3", "--samples", 1, "--dataset", "code", "--window", "question", "--out", tmp_path, "--json"
    )
    found = json.loads(result.stdout)
    assert [row["layer"] for row in found["records"]] == [0, 1, 2, 3]
    assert all(0 <= row["jsd_low"] <= row["jsd_mean"] <= row["jsd_high"] <= 1 for row in found["records"])
    assert "the text after the last image" in found["notes"][0]


def test_what_was_left_out_is_said(milebench, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(milebench, data)
    next((data / "code" / "images").rglob("*.png")).unlink()
    words = ["--model", checkpoint_folder(), "--data", data, "--dataset", "code", "--out", tmp_path / "out"]
    result = csp("fig3", *words)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "fig3.md").read_text()
    assert "1 sample of code; seed 0. Left out before: 1, first " in text
    assert "there is no image" in text


def test_a_measured_study_is_not_measured_again(tmp_path, monkeypatch):
    words = ["fig6", "--samples", 1, "--dataset", "code", "--out", tmp_path]
    assert csp(*words).exit_code == 0
    before = (tmp_path / "fig6.csv").read_bytes()

    def forbidden(*args, **kwargs):
        raise AssertionError("ran again")

    monkeypatch.setattr(Recording, "of", forbidden)
    assert csp(*words).exit_code == 0
    assert (tmp_path / "fig6.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["fig2"], "there is no 'fig2' in the paper to measure; there are table1, table2"),
        (["fig1", "--budget", "0.2"], "fig1 prunes nothing; it takes no --budget"),
        (["fig5", "--budget", "0.2", "--budget", "0.3"], "fig5 takes one budget, got 2"),
        (["fig7", "--budget", "300"], "budget must be a share of the prompt such as 20%, got '300'"),
        (["fig7", "--window", "question"], "fig7 has no window of its own"),
        (["fig3", "--window", "0"], "window must be question, a share such as 10% or a number of tokens"),
        (["table3", "--model", "."], "table3 takes several --model, got 1"),
        (["fig6", "--dataset", "codes"], "the generated suite has no task codes; it has code, photo"),
        (["fig6", "--protocol", "blind"], "protocol must be one of aware, agnostic, got 'blind'"),
    ],
)
def test_mistakes_are_one_line(words, reason, tmp_path):
    result = csp(*words, "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"csp: {reason}")
    assert result.stderr.count("\n") == 1
