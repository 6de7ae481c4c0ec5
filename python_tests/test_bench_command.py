"""``csp bench``: whole models with random weights, measured beside rivals, with bounds and targets."""

from __future__ import annotations

import csv
import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

from torch._dynamo.utils import counters
from transformers import LlavaForConditionalGeneration

from csp_ext.cli import main
from csp_ext.speed import files, measure, memory, shapes, targets, workload
from csp_ext.speed.arms import Arm, make_arms
from csp_ext.speed.bounds import amdahl_s, roofline_s
from csp_ext.speed.measure import Measured, Row, Settings
from csp_ext.speed.profile import profile
from csp_ext.speed.turn import Turn, take_turn
from csp_ext.tiny_llava import save_tiny_llava

CPU = torch.device("cpu")
TOKENS, NEW = 240, 20  # of a quick run
SETTINGS = Settings((1,), (0.5,), new_tokens=NEW, rounds=2, compiled=False, quick=True)


@pytest.fixture(scope="module")
def model() -> Any:
    model = shapes.skeleton(shapes.QUICK.config(), torch.float32)
    shapes.fill(model, CPU)
    return model


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["bench", *arguments])


# --- the command -----------------------------------------------------------------------------


def test_estimate_runs_nothing():
    """By hand: LLaVA-1.5-7B reads 13.2 GB of weights and 512 KiB per cached token."""
    arguments = ["--estimate", "--batch", "24", "--budget", "100%", "--budget", "10%"]
    found = json.loads(run(*arguments, "--json").stdout)
    assert (found["model"], found["dtype"]) == ("llava-7b", "bfloat16")
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096 + 32064 * 4096)
    steps = [weights + 24 * 2**19 * (kept + 64) for kept in (3100, 310)]
    assert [row["step_bytes"] for row in found["estimate"]] == steps
    assert found["estimate"][1]["speedup_at_most"] == pytest.approx(steps[0] / steps[1])
    assert found["estimate"][1]["prompt_cache_bytes"] == 24 * 2**19 * 310
    text = run(*arguments).stdout
    assert "2.96x" in text
    assert "computed, not measured" in text


def test_quick_run(tmp_path):
    result = run("--quick", "--json", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "bench.json").read_text()) | {"files": found["files"]}
    assert {path.name for path in tmp_path.iterdir()} == set(files.NAMES)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    names = ["static, full", "dynamic, full", "csp 100 %", "csp 20 %", "csp 16 tokens", "gather 20 %"]
    assert [(row["batch"], row["arm"]) for row in found["rows"]] == [(b, n) for b in (1, 2) for n in names]
    slot = 2 * 3 * 64 * 4  # keys and values, layers, hidden size, bytes
    assert found["slot_bytes"] == slot
    for row in found["rows"]:
        full = row["batch"] * TOKENS * slot
        kept = {None: 16, 1.0: TOKENS, 0.2: TOKENS // 5}[row["budget"]]
        assert row["kept_tokens"] == kept
        assert row["prompt_cache_bytes"] == full * kept // TOKENS
        if row["budget"] is not None:
            assert row["of_full_prompt_cache"] == row["budget"]
        held = kept + (NEW if row["kind"] in ("csp", "static") else NEW - 1)  # the last token is not fed
        assert row["stored_bytes"] == row["batch"] * held * slot
        assert row["ms_quartile_1"] <= row["ms_per_token"] <= row["ms_quartile_3"]
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms_per_token"])
        assert 0 < row["attention_ms"] < row["first_token_ms"]
        assert row["peak_bytes"] > row["stored_bytes"] // 2
        assert (row["prune_share_of_prefill"] is None) == (row["kind"] != "csp")
        assert row["roofline_ms"] > 0
        assert row["amdahl_ms"] > 0
        assert row["rounds"][0]["steps"] == NEW - 1 - 8 - 8  # warm-up, profile
        if row["kind"] == "static":
            assert row["of_static"] == 1
            assert row["amdahl_ms"] == pytest.approx(row["ms_per_token"])
    with (tmp_path / "bench.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["arm"] for line in lines] == names * 2
    assert float(lines[3]["ms_per_token"]) == found["rows"][3]["ms_per_token"]
    assert found["targets"] == [], "a model that is all overhead is judged by none"
    assert "## targets" not in (tmp_path / "bench.md").read_text()


def test_out_of_memory_is_a_row_of_the_tables(tmp_path, monkeypatch):
    def turn(model: Any, inputs: Any, arm: Arm, *rest: Any, **options: Any) -> Turn:
        if arm.kind == "dynamic" and inputs["input_ids"].shape[0] == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return take_turn(model, inputs, arm, *rest, **options)

    monkeypatch.setattr(measure, "take_turn", turn)
    result = run("--quick", "--batch", "2", "--budget", "50%", "--no-compile", "--out", str(tmp_path / "new"))
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "new" / "bench.json").read_text())["rows"]
    failures = {row["arm"]: row["failure"] for row in rows}
    assert failures.pop("dynamic, full") == "out of memory"
    assert set(failures.values()) == {""}
    page = (tmp_path / "new" / "bench.md").read_text()
    for text in (result.stdout, page):
        assert re.search(r"batch 2 *\n", text)
        assert not re.search(r"batch 1 *\n", text)
        assert "csp 50 %" in text
        assert "out of memory" in text
        assert "--batch 2 --budget 50% --prompt-tokens 240 --new-tokens 20" in " ".join(text.split())
    assert "![What pruning saves: quick](bench.png)" in page


def test_checkpoint_of_the_users(tmp_path):
    folder = save_tiny_llava(tmp_path / "tiny", image_size=84)
    options = ["--quick", "--json", "--batch", "1", "--budget", "50%", "--prompt-tokens", "100"]
    result = run(*options, "--model", str(folder), "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["model"], found["dtype"], found["prompt"]["images"]) == ("tiny", "float32", 1)
    assert [row["arm"] for row in found["rows"]][2:] == ["csp 50 %", "csp 16 tokens", "gather 50 %"]
    assert found["rows"][2]["of_full_prompt_cache"] == 0.5
    met = {target["what"]: target["met"] for target in found["targets"]}
    assert met["cache / (budget x full)"] is True
    assert all(target["met"] is None for target in found["targets"] if target["where"].startswith("GPU"))
    assert "| not run |" in (tmp_path / "out" / "bench.md").read_text().split("## targets")[1]
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    result = run(*options, "--model", str(folder), "--out", str(tmp_path / "out"))
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "csp bench makes prompts for LLaVA only" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cuda:7"], "cuda:7"),
        (["--model", "llava-70b"], "llava-7b, llava-13b, scaled or a folder, got 'llava-70b'"),
        (["--model", "."], "has no config.json"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--budget", "300"], "budget must be a share of the prompt such as 20%, got '300'"),
        (["--budget", "120%"], "got '120%'"),
        (["--new-tokens", "9"], "new-tokens must be at least 20, got 9"),
        (["--prompt-tokens", "60"], "prompt-tokens must be at least 69"),
        (["--model", "llava-13b", "--batch", "4000", "--prompt-tokens", "3100"], "batch 4000 needs about"),
    ],
)
def test_mistakes_in_one_line(tmp_path, arguments, said):
    result = run("--quick", "--out", str(tmp_path), *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


# --- models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "slot"),
    [("llava-7b", 7_063_427_072, 2**19), ("llava-13b", 13_351_494_656, 819_200)],
)
def test_shapes_of_the_releases(name, parameters, slot):
    config = shapes.SHAPES[name].config()
    model = shapes.skeleton(config, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert all(parameter.is_meta for parameter in model.parameters())
    assert shapes.parameter_bytes(model) == 2 * parameters
    assert workload.slot_bytes(config, torch.bfloat16) == slot
    # Neither the tower and projector nor the embedding are read in a step.
    decoder = model.get_decoder()
    table = model.get_input_embeddings().weight.numel()
    outside = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in decoder.parameters())
    assert shapes.step_weight_bytes(model) == 2 * (parameters - outside)
    assert outside > table
    assert workload.Workload.of(config, 3100) == workload.Workload(3100, 5, 576)


def test_filled_model_is_whole(model):
    twin = shapes.skeleton(shapes.QUICK.config(), torch.float32)
    shapes.fill(twin, CPU)
    for (name, mine), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    usual = LlavaForConditionalGeneration(shapes.QUICK.config())
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(usual.named_buffers()).keys()
    for name, buffer in usual.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    logits = model(input_ids=torch.arange(40)[None]).logits
    assert logits.isfinite().all()
    assert 0.5 < logits.std() < 2


def test_prompts(model):
    inputs = workload.Workload.of(model.config, TOKENS).inputs(model, 3)
    assert inputs["input_ids"].shape == (3, TOKENS)
    patches = inputs["input_ids"] == model.config.image_token_id
    assert patches.sum(-1).tolist() == [5 * 36] * 3
    assert not patches[:, -workload.QUESTION :].any()
    assert patches[:, -workload.QUESTION - 1].all()
    assert inputs["pixel_values"].shape == (15, 3, 84, 84)
    assert not torch.equal(inputs["input_ids"][0], inputs["input_ids"][1])


# --- measuring -------------------------------------------------------------------------------


def test_gather_keeps_evenly_spaced_tokens(model):
    inputs = workload.Workload.of(model.config, TOKENS).inputs(model, 2)
    caches = []
    for arm in (Arm("dynamic", TOKENS, 1.0), Arm("gather", 60, 0.25)):
        cache = arm.new_cache(model.config, TOKENS, NEW)
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
        arm.finish_prefill(cache)
        caches.append(cache)
    for whole, some in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(some.keys, whole.keys[:, :, ::4])
        assert torch.equal(some.values, whole.values[:, :, ::4])


def test_compiled_without_breaks(model):
    """Both static caches: one graph each, and one more for csp's second size; none for a second round."""
    counters.clear()
    prompt = workload.Workload.of(model.config, TOKENS)
    measured = measure.measure(
        model, prompt, replace(SETTINGS, compiled=True, backend="eager"), lambda *told: None
    )
    assert all(len(row.turns) == 2 for row in measured.rows)
    assert not counters["graph_break"]
    assert 2 <= counters["stats"]["unique_graphs"] <= 3
    assert not hasattr(model, "_csp_handle")


def test_peak_follows_what_is_held():
    with memory.exact_resident_set(CPU):
        watch = memory.Peak(CPU)
        tensor = torch.ones(16 << 20)
        del tensor
        most = watch.bytes()
    assert most is None or 60 << 20 <= most < 80 << 20  # Linux counts pages by the batch


def test_profile_counts_the_outermost():
    matrix = torch.randn(64, 64)
    record, result = profile(CPU, ("outer", "aten::"), lambda: work(matrix))
    assert torch.equal(result, matrix @ matrix)
    inner, _ = profile(CPU, ("aten::mm",), lambda: work(matrix))
    assert len(record.events) == 1
    assert 0 < record.events[0] <= record.wall == record.total
    assert 0 < inner.share < record.share <= 1
    twice, _ = profile(CPU, ("outer",), lambda: [work(matrix), work(matrix)])
    assert min(twice.events) <= twice.typical(2) <= max(twice.events)


def work(matrix: torch.Tensor) -> torch.Tensor:
    with torch.profiler.record_function("outer"):
        return matrix @ matrix


# --- bounds and targets ----------------------------------------------------------------------


def row(kind: Any, kept: int, budget: float | None, ms: float, *, batch: int = 8, **changes: Any) -> Row:
    """A row of 100 tokens with 10 bytes each, whose steps all take `ms` and read what is kept."""
    size = batch * kept * 10
    turn = Turn(
        first_s=1.0,
        prune=0.01 if kind == "csp" else None,
        step_s=[ms / 1e3] * 3,
        read_tokens=kept,
        peak=size + 500,
        prompt_bytes=size,
        stored=size,
        attention_s=ms / 2e3,
        attention_tokens=kept,
    )
    return Row(Arm(kind, kept, budget), batch, [replace(turn, **changes)], [size + 500])


def test_bounds_between_the_ends():
    rows = [row("static", 100, 1.0, 10), row("csp", 0, None, 2), row("csp", 25, 0.25, 5)]
    measured = Measured(rows, bandwidth=1e6, weights=3000, slot=10, tokens=100)
    assert roofline_s(measured, rows[2]) == pytest.approx((3000 + 8 * 25 * 10) / 1e6)
    assert [amdahl_s(measured, each) for each in rows] == pytest.approx([0.010, 0.002, 0.004])
    assert amdahl_s(replace(measured, rows=rows[1:]), rows[2]) is None


def test_targets_of_a_cpu():
    rows = [row("static", 100, 1.0, 10), row("csp", 100, 1.0, 8), row("csp", 1, None, 1)]
    rows += [row("csp", 20, 0.2, 1.6), row("csp", 10, 0.1, 0.96)]
    rows += [row("static", 100, 1.0, 10, batch=1), row("csp", 100, 1.0, 10.6, batch=1)]
    measured = Measured(rows, bandwidth=1e6, weights=3000, slot=10, tokens=100)
    setting = targets.Setting("scaled", 12, on_gpu=False, compiled=False)
    found = {each.what: each for each in targets.verdicts(measured, setting) if each.met is not None}
    assert {what: each.value for what, each in found.items()} == pytest.approx(
        {
            "cache / (budget x full)": 1.0,
            "batch 8: peak saved / bytes pruned": 1.0,
            "batch 8: attention / its share of tokens": 1.2,
            "batch 8: step / static, any budget": 0.8,
            "batch 1, 100 %: step / static": 1.06,
            "scoring, selecting, compacting / prefill": 0.01,
        }
    )
    assert [each.met for each in found.values()].count(False) == 1
    assert not found["batch 1, 100 %: step / static"].met
    held = [replace(each, peaks=[9000]) for each in rows]
    peak = targets.verdicts(replace(measured, rows=held), setting)[4]
    assert (peak.value, peak.met) == (0, False)


def test_targets_of_a_gpu():
    rows = [row("static", 100, 1.0, 10, batch=24), row("csp", 1, None, 1, batch=24)]
    rows += [row("csp", 10, 0.1, 2.5, batch=24), row("csp", 20, 0.2, 5, batch=24)]
    rows += [row("csp", 50, 0.5, 4, batch=1), row("csp", 100, 1.0, 4.8, batch=1)]
    measured = Measured(rows, bandwidth=1e6, weights=3000, slot=10, tokens=100)
    setting = targets.Setting("llava-7b", 32, on_gpu=True, compiled=True)
    first, tenth, fifth = targets.verdicts(measured, setting)[:3]
    assert first.value == pytest.approx(1.2)
    assert first.met is False
    assert (tenth.value, tenth.met) == (pytest.approx(4), True)
    assert (fifth.value, fifth.met) == (pytest.approx(2), False)
    assert tenth.bound == "Amdahl: 5.5"
    eager = targets.verdicts(measured, replace(setting, compiled=False))
    assert [each.met for each in eager[:3]] == [None] * 3


def test_arms_of_a_run():
    assert [arm.name for arm in make_arms((1.0, 0.6), 3100)] == [
        "static, full",
        "dynamic, full",
        "csp 100 %",
        "csp 60 %",
        "csp 16 tokens",
        "gather 60 %",
    ]
    assert [arm.kept for arm in make_arms((0.6,), 3100)] == [3100, 3100, 1860, 16, 1860]


# --- bench/long_answers.py -------------------------------------------------------------------


def test_long_answers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "bench"))
    bench = importlib.import_module("long_answers")
    monkeypatch.setattr(bench, "PROMPT", 620)  # one image
    once, again, fixed_once, fixed_again = bench.measure(batch=2, new_tokens=16, interval=4)
    assert [len(answer.pruning) for answer in (once, again, fixed_once, fixed_again)] == [0, 3, 0, 3]
    slots = [answer.cache.layers[0].keys.shape[2] for answer in (once, again, fixed_once, fixed_again)]
    assert slots == [62 + 15, 62 + 3, 62 + 16, 62 + 4]
    bench.main(batch=1, new_tokens=8, interval=3, folder=tmp_path)
    table = (tmp_path / "long_answers.md").read_text().splitlines()[-4:]
    assert [line.split(" | ")[1] for line in table] == ["0", "2", "0", "2"]
