"""``csp eval``: arms, runs, resuming, several processes, numbers and tables."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from PIL import Image
from scipy.stats import binomtest

import csp_ext
from csp_ext.cli import main
from csp_ext.demo.console import UserError
from csp_ext.evaluation import load_eval_model, make_samples
from csp_ext.evaluation.arms import METHOD_NAMES, Arm, arms_of
from csp_ext.evaluation.encoding import Encoder
from csp_ext.evaluation.items import Draft, Problem
from csp_ext.evaluation.milebench import read_datasets, write_dataset
from csp_ext.evaluation.processes import Processes
from csp_ext.evaluation.results import compare, mcnemar, mean, retention
from csp_ext.evaluation.rivals import rivalry
from csp_ext.evaluation.runner import Settings, keys, run
from csp_ext.evaluation.store import RECORDS, Store, key_of
from csp_ext.evaluation.suite import write_suite
from csp_ext.evaluation.tables import rows, write_csv, write_markdown

NEW_TOKENS = 24


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded():
    return load_eval_model()


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    """Two tasks, three samples each, prompts of one length."""
    root = tmp_path_factory.mktemp("suite")
    write_suite(root, tasks=("photo", "photo_code"), count=3, seed=7, mode="S")
    datasets, problems = read_datasets(root)
    assert not problems
    return datasets


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A data set whose prompts have different lengths, and so different padding in a batch."""
    drafts = []
    for at, sample in enumerate(make_samples("code_photo", 3, 8)):
        context = "the and " * (9 * at) + sample.prompt
        for number in range(1, len(sample.images) + 1):
            context = context.replace("<image>", f"{{image#{number}}}", 1)
        drafts.append(Draft(context, sample.answer, sample.images, question=sample.question))
    root = tmp_path_factory.mktemp("uneven")
    write_dataset(root, "Uneven", drafts, question_type="open-ended", metric="token_accuracy")
    datasets, problems = read_datasets(root)
    assert not problems
    return datasets


def evaluated(loaded, datasets, arms, folder, **settings):
    """Run into a folder and return the records."""
    settings = Settings(**{"batch_images": 200, "max_new_tokens": NEW_TOKENS} | settings)
    store = Store(folder, {}, {})
    run(*loaded, {0: datasets}, arms, settings, store, lambda done, total: None)
    store.finish(keys({0: datasets}, arms))
    assert [key_of(record) for record in store.records()] == keys({0: datasets}, arms)
    return store.records()


def generated(loaded, dataset, method=None, **fields):
    """Return what the model itself generates for a batch of all samples."""
    model, processor = loaded
    encoder = Encoder(model, processor, "plain", None)
    _, inputs, _ = encoder.encode([encoder.prepare(item) for item in dataset.samples])
    if method is None:
        assert "_csp_handle" not in model.__dict__
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    else:
        with csp_ext.apply(model, method=method, **fields):
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def predictions(records, label, dataset):
    return [r["prediction"] for r in records if (r["arm"], r["dataset"]) == (label, dataset.name)]


def without_time(records):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_a_share_is_the_same_number_of_tokens_for_all_methods():
    for arm in arms_of(METHOD_NAMES, [0.29, 64]):
        if arm.method == "full":
            assert (arm.label, arm.tokens(100)) == ("full", 100)
            continue
        assert arm.label == f"{arm.method} {'29 %' if isinstance(arm.budget, float) else '64 tok'}"
        assert arm.tokens(100) == (29 if isinstance(arm.budget, float) else 64)
        assert arm.tokens(50) == (14 if isinstance(arm.budget, float) else 50)
    assert arms_of(["snapkv"], [0.29])[0].make(100).budget == 29
    assert arms_of(["csp"], [0.29])[0].make(100).config.budget == 29
    assert [arm.budget for arm in arms_of(["csp"], [1, 1.0, 1])] == [1, 1.0]
    with pytest.raises(ValueError, match="nothing"):
        Arm("x", "nothing", 0.2)
    with pytest.raises(ValueError, match=r"1\.5"):
        Arm("x", "csp", 1.5)
    with pytest.raises(ValueError, match="cross_ratio"):
        Arm("x", "csp", 0.2, {"cross_ratio": 2.0})
    with pytest.raises(ValueError, match="answer"):
        Arm("x", "oracle", 0.2).make(100).start(torch.zeros(1, 100, dtype=torch.int8), 100, True)


@pytest.mark.parametrize("protocol", ["aware", "agnostic"])
def test_an_arm_that_keeps_everything_is_the_plain_model(loaded, suite, uneven, tmp_path, protocol):
    arms = (*arms_of(["full"], [1.0]), *arms_of(["csp", "snapkv", "oracle"], [4000]))
    datasets = [*suite, *uneven]
    records = evaluated(loaded, datasets, arms, tmp_path / "out", protocol=protocol)
    for dataset in datasets:
        plain = generated(loaded, dataset)
        for arm in arms:
            assert predictions(records, arm.label, dataset) == plain
    assert all(record["kept"] == record["context_tokens"] == record["tokens"] for record in records[:3])
    assert {record["text_kept"] for record in records} == {1.0}
    # The model knows these answers: agreeing on nonsense would show nothing.
    assert sum(record["score"] for record in records if record["dataset"] == "photo") >= 8


def test_pruned_arms_are_apply_and_generate(loaded, suite, uneven, tmp_path):
    arms = arms_of(["csp", "snapkv", "oracle", "h2o"], [0.15])
    datasets = [*suite, *uneven]
    records = evaluated(loaded, datasets, arms, tmp_path / "out")
    for dataset in datasets:
        for method in ("csp", "snapkv", "h2o"):
            wanted = generated(loaded, dataset, method, budget=0.15)
            assert predictions(records, f"{method} 15 %", dataset) == wanted
        assert predictions(records, "snapkv 15 %", dataset) != predictions(records, "csp 15 %", dataset)
    for record in records:
        most = max(r["prompt_tokens"] for r in records if r["dataset"] == record["dataset"])
        assert record["kept"] == record["tokens"] == math.floor(0.15 * most)
    # What the oracle reads off the answer no other arm may see, wherever it stands.
    alone = evaluated(loaded, datasets, (arms[3], arms[0]), tmp_path / "alone")
    expected = [record for record in records if record["method"] in ("h2o", "csp")]
    assert sorted(without_time(alone), key=key_of) == sorted(without_time(expected), key=key_of)


def test_the_oracle_needs_few_keys(loaded, suite, tmp_path):
    arms = arms_of(["oracle", "random"], [0.1])
    records = evaluated(loaded, suite, arms, tmp_path / "out")
    assert mean(records, "oracle 10 %").value == 1
    assert mean(records, "random 10 %").value == 0


def test_the_first_token_never_depends_on_the_arm(loaded, suite, tmp_path):
    arms = arms_of(["full", "streaming", "csp"], [9])
    records = evaluated(loaded, suite[:1], arms, tmp_path / "out", max_new_tokens=1)
    assert all(predictions(records, arm.label, suite[0]) == ["photo"] * 3 for arm in arms)


def test_agnostic_prunes_what_stands_before_the_question(loaded, suite, uneven, tmp_path):
    arms = arms_of(["full", "snapkv"], [0.3])
    records = evaluated(loaded, [*suite, *uneven], arms, tmp_path / "a", protocol="agnostic")
    asked = {"photo": 4, "photo_code": 7, "Uneven": 7}
    assert all(r["prompt_tokens"] - r["context_tokens"] == asked[r["dataset"]] for r in records)
    assert {r["tokens"] for r in records if r["arm"] == "snapkv 30 %" and r["dataset"] == "photo"} == {102}

    # Two questions about one context: the same keys stay.
    (one, _, _), start = suite[0].samples, len(suite[0].samples[0].context)
    other = one.context.replace(one.question, "ask photo eve say")
    two = replace(
        suite[0],
        samples=(one, replace(one, sample_id="other", context=other, question="ask photo eve say")),
    )
    assert other[: start - len(one.question)] == one.context[: start - len(one.question)] != other
    shares = [
        {(r["text_kept"], r["image_kept"]) for r in evaluated(loaded, [two], arms[1:], path, protocol=name)}
        for name, path in (("agnostic", tmp_path / "b"), ("aware", tmp_path / "c"))
    ]
    assert [len(of_protocol) for of_protocol in shares] == [1, 2]

    # Unless the data set says what the question is, it is what follows the last image.
    unknown = [replace(suite[0], samples=tuple(replace(item, question=None) for item in suite[0].samples))]
    records = evaluated(loaded, unknown, arms[:1], tmp_path / "d", protocol="agnostic")
    assert all(r["context_tokens"] < 341 for r in records)
    assert predictions(records, "full", suite[0]) == generated(loaded, suite[0])


def test_a_prompt_that_cannot_be_used_is_a_problem(loaded, suite, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    good, torn, long = suite[0].samples
    torn = replace(torn, images=(*torn.images[:-1], broken))
    long = replace(long, context="the " * 5000 + long.context)
    store = Store(tmp_path / "out", {}, {})
    data = {0: [replace(suite[0], samples=(torn, good, long))]}
    told = []
    arms = arms_of(["full"], [1.0])
    settings = Settings(batch_images=200)
    run(*loaded, data, arms, settings, store, lambda done, total: told.append((done, total)))
    store.finish(keys(data, arms))
    assert told == [(0, 3), (3, 3)]
    assert [record["sample_id"] for record in store.records()] == [good.sample_id]
    reasons = {entry["sample_id"]: (entry["file"], entry["reason"]) for entry in store.problems()}
    assert reasons[torn.sample_id][0] == str(broken)
    assert reasons[long.sample_id] == ("photo/photo.json", "5345 tokens, but the model takes 4096")
    # Neither is tried again.
    again = Store(tmp_path / "out", {}, {}, resume=True)
    assert all(again.has(0, item, ["full"]) for item in (torn, good, long))
    assert not again.has(0, good, ["full", "csp 20 %"])


def test_without_an_image_token_there_is_one_line(loaded):
    class Deaf:
        tokenizer = loaded[1].tokenizer
        image_token = None

    class Tokenizer:
        image_token = None

    Deaf.tokenizer = Tokenizer()
    with pytest.raises(UserError, match="no image token"):
        Encoder(loaded[0], Deaf(), "plain", None)


def test_an_interrupted_run_goes_on(loaded, suite, tmp_path):
    arms = arms_of(["full", "csp"], [0.2])
    settings = Settings(batch_images=24, max_new_tokens=8)
    data = {0: suite[:1], 1: suite[1:]}
    settings = replace(settings, seeds=(0, 1))

    def go_on(resume=True):
        ran = []
        store = Store(tmp_path, {"arms": 2}, {"a": 1}, resume=resume)
        run(*loaded, data, arms, settings, store, lambda done, total: ran.append(done))
        assert ran[-1] == 12
        store.finish(keys(data, arms))
        return store.records()

    whole = go_on(resume=False)
    assert len(whole) == 12
    file = tmp_path / RECORDS
    before = file.read_bytes()
    assert go_on() == whole
    assert file.read_bytes() == before
    lines = before.splitlines(keepends=True)
    # In the middle of a line, of a character, and between two samples of a batch.
    for end in (len(b"".join(lines[:7])) + 40, len(b"".join(lines[:3])), 1, 0):
        file.write_bytes(before[:end])
        resumed = go_on()
        assert without_time(resumed) == without_time(whole)
        survived = before[:end].count(b"\n")
        assert resumed[:survived] == whole[:survived]
    # Another process had the rest.
    file.write_bytes(b"".join(lines[:5]))
    (tmp_path / "records.rank1.jsonl").write_bytes(b"".join(lines[4:]) + b'{"seed": 0, "da')
    assert go_on() == whole
    assert not list(tmp_path.glob("*rank*"))
    file.write_bytes(b"{}}\n" + before)
    with pytest.raises(UserError, match=r"records\.jsonl is damaged"):
        go_on()


def test_only_the_same_run_goes_on(tmp_path):
    Store(tmp_path / "run", {"protocol": "aware", "seeds": (0, 1)}, {"date": "then"})
    with pytest.raises(UserError, match="--resume"):
        Store(tmp_path / "run", {"protocol": "aware", "seeds": (0, 1)}, {})
    Store(tmp_path / "run", {"protocol": "aware", "seeds": (0, 1)}, {"date": "now"}, resume=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["date"] == "then"
    with pytest.raises(UserError) as error:
        Store(tmp_path / "run", {"protocol": "agnostic", "seeds": (0,)}, {}, resume=True)
    assert str(error.value).endswith('protocol was "aware", is "agnostic"; seeds was [0, 1], is [0]')
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Store(tmp_path / "file" / "run", {}, {})


def test_processes_share_the_batches(loaded, suite, tmp_path):
    arms = arms_of(["full"], [1.0])
    alone = evaluated(loaded, suite, arms, tmp_path / "alone", batch_images=12)
    shares = []
    for rank in (1, 0):
        processes = Processes()
        processes.rank, processes.count = rank, 2
        if rank == 1:
            Store(tmp_path / "two", {}, {})
        store = Store(tmp_path / "two", {}, {}, resume=True, processes=processes)
        settings = Settings(batch_images=12, max_new_tokens=NEW_TOKENS)
        run(*loaded, {0: suite}, arms, settings, store, lambda done, total: shares.append((done, total)))
        store.finish(keys({0: suite}, arms))
        assert (tmp_path / "two" / "records.rank1.jsonl").exists() == (rank == 1)
    assert shares.count((3, 3)) == 2
    assert without_time(store.records()) == without_time(alone)


CASE = ("--samples", "2", "--dataset", "photo", "--dataset", "code", "--method", "full", "--method", "csp")


def test_launched_processes_give_what_one_gives(tmp_path):
    if importlib.util.find_spec("accelerate") is None:
        warnings.warn(
            "accelerate is not installed: csp eval in several processes is not tested", stacklevel=1
        )
        pytest.skip("accelerate is not installed")
    options = (*CASE, "--budget", "0.2", "--threads", "1", "--json", "--device", "cpu")
    command = ["-m", "csp_ext", "eval", *options, "--out", str(tmp_path / "two")]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0"]
    paths = [str(Path(csp_ext.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    one = CliRunner().invoke(main, ["eval", *options, "--out", str(tmp_path / "one")])
    assert one.exit_code == 0, one.output
    two, alone = (
        [json.loads(line) for line in (tmp_path / name / RECORDS).read_text().splitlines()]
        for name in ("two", "one")
    )
    assert len(two) == 8
    assert without_time(two) == without_time(alone)
    # One object, from the first process only.
    assert json.loads(done.stdout)["rows"] == json.loads(one.stdout)["rows"]


def record(arm, score, sample, *, dataset="A", group="g", level="Few", seed=0, protocol="aware", kept=10):
    method = arm.split()[0]
    return {
        "arm": arm,
        "name": method,
        "method": method,
        "budget": 0.2,
        "dataset": dataset,
        "group": group,
        "level": level,
        "seed": seed,
        "sample_id": str(sample),
        "protocol": protocol,
        "score": float(score),
        "kept": kept,
        "context_tokens": 50,
    }


def two_arms(full, pruned, **fields):
    records = [record("full", score, at, **fields) for at, score in enumerate(full)]
    return records + [record("csp 20 %", score, at, **fields) for at, score in enumerate(pruned)]


def test_an_arm_that_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="delay must be 0"):
        Arm("late", "csp", 0.2, {"delay": 2})
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'snap'"):
        Arm("snap", "snap", 0.2)


def test_means_and_differences():
    records = two_arms([1, 1, 1, 0], [1, 0, 0, 1]) + two_arms([1, 1], [1, 1], dataset="B", group="h")
    assert mean(records, "full").value == pytest.approx((0.75 + 1) / 2)
    assert mean(records, "full", group="g").value == 0.75
    alone = mean(records, "csp 20 %", dataset="A")
    assert (alone.value, alone.count) == (0.5, 4)
    assert alone.error == pytest.approx(np.std([1, 0, 0, 1], ddof=1) / 2)
    assert mean(records, "csp 20 %").error == pytest.approx(alone.error / 2)
    assert retention(records, "csp 20 %") == pytest.approx(0.75 / 0.875)
    assert math.isnan(retention(records[4:8], "csp 20 %"))

    gap = compare(records, "csp 20 %", "full")
    assert (gap.value, gap.better, gap.worse, gap.count) == (-0.125, 1, 2, 6)
    assert gap.error == pytest.approx(np.std([0, -1, -1, 1], ddof=1) / 2 / 2)
    assert (gap.test, gap.p) == ("McNemar, exact", pytest.approx(binomtest(1, 3).pvalue))
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 12) == pytest.approx(2 * 0.5**12)

    with pytest.raises(ValueError, match="agnostic, aware"):
        mean(records + two_arms([1], [1], protocol="agnostic"), "full")
    with pytest.raises(ValueError, match="h2o"):
        mean(records, "h2o")
    with pytest.raises(ValueError, match="share samples"):
        compare(records[:4], "csp 20 %", "full")


def test_pairs_are_by_seed_and_sample():
    one = two_arms([1, 0], [1, 0], seed=1)
    other = two_arms([0, 1], [0, 1], seed=2)
    gap = compare([*one, *reversed(other)], "csp 20 %", "full")
    assert (gap.better, gap.worse, gap.error) == (0, 0, 0)
    # Only what both have counts.
    assert compare([*one, *other[:3]], "csp 20 %", "full").count == 3


def test_other_scores_are_bootstrapped():
    rng = np.random.default_rng(0)
    full = rng.uniform(0.4, 0.9, 40)
    same = compare(two_arms(full, full + rng.normal(0, 0.05, 40)), "csp 20 %", "full")
    worse = compare(two_arms(full, full - 0.03 + rng.normal(0, 0.05, 40)), "csp 20 %", "full")
    assert same.test == worse.test == "paired bootstrap"
    assert same.p > 0.05 > 0.01 > worse.p
    # About what the normal distribution says.
    assert worse.p == pytest.approx(math.erfc(-worse.value / worse.error / math.sqrt(2)), abs=0.005)
    assert compare(two_arms(full, full), "csp 20 %", "full").p == 1
    again = compare(two_arms(full, full - 0.03), "csp 20 %", "full")
    assert again == compare(two_arms(full, full - 0.03), "csp 20 %", "full")
    # Three samples that agree are no proof.
    assert compare(two_arms(full[:3], full[:3] - 0.03), "csp 20 %", "full").p == 0.25


def test_tables_hold_the_numbers(tmp_path):
    results = rows(two_arms([1, 1, 1, 0], [1, 0, 0, 0]) + two_arms([1, 1], [1, 1], dataset="B", group="h"))
    assert [(row.arm, row.of) for row in results[:5]] == [("full", of) for of in ("all", "g", "h", "A", "B")]
    write_csv(tmp_path / "t.csv", results)
    with (tmp_path / "t.csv").open() as file:
        lines = list(csv.DictReader(file))
    suite = next(line for line in lines if line["arm"] == "csp 20 %" and line["scope"] == "suite")
    assert (suite["score"], suite["kept"], suite["difference"]) == ("0.625", "0.2", "-0.25")
    assert float(suite["p"]) == 0.5
    assert lines[0]["p"] == ""
    write_markdown(tmp_path / "t.md", results, "Title", "aware", None)
    text = (tmp_path / "t.md").read_text()
    assert "| csp | 20 % | 20.0% | 62.5 ± 12.5 | 71.4% | 0.500 | 25.0 | 100.0 |" in text
    assert "| csp 20 % | 25.0 ± 25.0 | 100.0 ± 0.0 |" in text


def test_levels_are_told_apart_where_there_are_several(tmp_path):
    records = two_arms([1, 1], [1, 0]) + two_arms([1, 1], [0, 0], dataset="B", level="Many")
    results = rows(records)
    few, many = (row for row in results if row.scope == "level" and row.arm != "full")
    assert (few.of, few.mean.value, few.difference.value) == ("Few", 0.5, -0.5)
    assert (many.of, many.mean.value) == ("Many", 0)
    write_markdown(tmp_path / "t.md", results, "Title", "aware", None)
    text = (tmp_path / "t.md").read_text()
    assert "| arm | Few | Many |" in text
    assert "| csp 20 % | 50.0 ± 50.0 | 0.0 ± 0.0 |" in text
    assert all(row.scope != "level" for row in rows(two_arms([1, 1], [1, 0])))


def test_rivals_are_compared_at_equal_budgets(tmp_path):
    records = two_arms([1, 1, 1, 0], [1, 1, 1, 0]) + two_arms([1, 1], [0, 1], dataset="B")
    ours = [record for record in records if record["name"] == "csp"]
    wrong = {("A", 0), ("A", 1), ("B", 1)}
    records += [
        record | {"name": name, "arm": f"{name} 20 %", "score": float((record["dataset"], at) not in wrong)}
        for name in ("h2o", "csp-union")
        for at, record in zip([0, 1, 2, 3, 0, 1], ours, strict=True)
    ]
    found = rivalry(records, "csp")
    assert found is not None
    # A: 1 1 1 0 against 0 0 1 1; B: 0 1 against 1 0.
    assert list(found.differences) == [("h2o", 0.2)]
    gap = found.differences["h2o", 0.2]
    assert (gap.value, gap.better, gap.worse) == (0.125, 3, 2)
    assert found.first == {0.2: (2, 2)}
    head, lines = found.lines()
    assert head == ["csp minus", "20 %"]
    assert lines[0][0] == "h2o"
    assert lines[0][1].startswith("+12.5 ± ")
    assert lines[1] == ["first or tied", "2 of 2"]
    assert rivalry([record for record in records if record["name"] != "h2o"], "csp") is None
    # One sample more is a tie, all of them are not.
    close = [record | {"score": 1.0} if record["name"] == "h2o" else record for record in records]
    assert rivalry(close, "csp").first == {0.2: (2, 2)}
    far = [record | {"score": 0.0} if record["name"] == "csp" else record for record in close]
    assert rivalry(far, "csp").first == {0.2: (0, 2)}
    write_markdown(tmp_path / "t.md", rows(records), "Title", "aware", found)
    assert "| h2o | +12.5" in (tmp_path / "t.md").read_text()


def invoke(*arguments):
    return CliRunner().invoke(main, ["eval", *map(str, arguments)], catch_exceptions=False)


def test_the_command_writes_everything(tmp_path):
    options = ("--out", tmp_path, *CASE, "--budget", "20%", "--seed", 3, "--seed", 4)
    shown = invoke(*options)
    assert shown.exit_code == 0, shown.output
    assert "8 samples of 2 data sets, embedded model" in shown.stdout
    names = {"chart.png", "records.jsonl", "run.json", "suite", "table.csv", "table.md"}
    assert {path.name for path in tmp_path.iterdir()} == names
    with Image.open(tmp_path / "chart.png") as picture:
        assert picture.size[0] > 800
        assert len(set(picture.convert("L").resize((60, 40)).tobytes())) > 10
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["csp_ext"] == csp_ext.__version__
    assert facts["settings"]["seeds"] == [3, 4]
    assert facts["settings"]["arms"][1] == {"name": "csp", "method": "csp", "budget": 0.2, "fields": {}}
    records = [json.loads(line) for line in (tmp_path / RECORDS).read_text().splitlines()]
    assert len({r["reference"] for r in records if r["dataset"] == "photo"}) == 4

    refused = invoke(*options)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    changed = invoke(*options, "--resume", "--protocol", "agnostic")
    assert changed.exit_code == 2
    assert 'protocol was "aware", is "agnostic"' in changed.stderr
    resumed = json.loads(invoke(*options, "--resume", "--json").stdout)
    assert resumed["problems"] == []
    assert resumed["rows"][0]["score"] == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--method", "nothing"), "method must be one of full"),
        (("--budget", "2.5"), "2.5"),
        (("--budget", "many"), "budget must be a share"),
        (("--dataset", "nothing"), "no task nothing"),
        (("--protocol", "both"), "protocol must be one of aware, agnostic"),
        (("--template", "none"), "template must be one of"),
        (("--max-new-tokens", "0"), "max_new_tokens must be at least 1"),
        (("--device", "nowhere"), "device must be"),
        (("--dtype", "int8"), "dtype must be one of"),
        (("--model", "missing-folder"), "missing-folder"),
        (("--data", "missing-folder"), "missing-folder is not a folder"),
        (("--data", ".", "--seed", "1", "--seed", "2"), "several seeds"),
        (("--adversarial",), "no adversarial annotations"),
        (("--combined", "2"), "no combined images"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    result = invoke("--out", tmp_path / "out", "--samples", 1, *options)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "run.json").exists()


def test_other_annotations_of_a_root(tmp_path):
    root = tmp_path / "data"
    for at, name in enumerate(("plain", "adversarial")):
        draft = Draft("{image#1} ask photo ada say", name, (Image.new("RGB", (32, 32)),))
        file = write_dataset(tmp_path / name, "Toy", [draft], question_type="open-ended", metric="contains")
        target = root / "Toy" / ("Toy.json", "Toy-adv.json")[at]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    (tmp_path / "plain" / "Toy" / "images").rename(root / "Toy" / "images")
    for options, expected in (((), "plain"), (("--adversarial",), "adversarial")):
        out = tmp_path / f"out-{expected}"
        result = invoke("--data", root, "--out", out, "--method", "full", "--max-new-tokens", 2, *options)
        assert result.exit_code == 0, result.output
        assert json.loads((out / "records.jsonl").read_text())["reference"] == expected
    result = invoke("--data", root, "--out", tmp_path / "none", "--method", "full", "--combined", 2)
    assert result.exit_code == 2
    assert "Toy_combined_2.json" in result.stderr


def test_broken_data_are_left_out_and_listed(tmp_path):
    root = tmp_path / "data"
    good = Draft("{image#1} ask photo ada say", "photo ada", (Image.new("RGB", (32, 32)),))
    drafts = [good, good, good, good, replace(good, context="the " * 5000 + good.context)]
    file = write_dataset(root, "Mixed", drafts, question_type="open-ended", metric="contains")
    images = file.parent / "images"
    (images / "00001" / "001.png").write_bytes((images / "00000" / "001.png").read_bytes()[:60])
    (images / "00002" / "001.png").unlink()
    (images / "00003" / "001.png").write_text("words")
    write_dataset(root, "Empty", [], question_type="open-ended", metric="contains")
    (root / "Torn").mkdir()
    (root / "Torn" / "Torn.json").write_text('{"meta_data": ')
    options = ("--data", root, "--out", tmp_path / "out", "--method", "full", "--context-len", 6000)
    result = invoke(*options, "--max-new-tokens", 2)
    assert result.exit_code == 3, result.output
    assert "Left out: 6" in result.stdout
    problems = [json.loads(line) for line in (tmp_path / "out" / "problems.jsonl").read_text().splitlines()]
    reasons = {(entry["dataset"], entry["sample_id"]): entry["reason"] for entry in problems}
    assert "cannot be read" in reasons["Mixed", "1"]
    assert "there is no image" in reasons["Mixed", "2"]
    assert "not in a format" in reasons["Mixed", "3"]
    assert "but the model takes 4096" in reasons["Mixed", "4"]
    assert "no samples" in reasons["Empty", None]
    assert "not JSON" in reasons["Torn", None]
    records = (tmp_path / "out" / RECORDS).read_text().splitlines()
    assert [json.loads(line)["sample_id"] for line in records] == ["0"]

    # Nothing at all is a mistake of the user's, in one line.
    nothing = invoke("--data", root, "--dataset", "Torn", "--out", tmp_path / "none")
    assert nothing.exit_code == 2
    assert "not JSON" in nothing.stderr


def test_problems_name_their_place():
    assert str(Problem(Path("a.json"), "3", "why")) == "a.json, sample 3: why"
