"""The csp command: its output against reality, and one line for every mistake."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import csp_ext
from csp_ext import cli

Csp = Callable[..., Any]


@pytest.fixture
def csp() -> Csp:
    runner = CliRunner()

    def run(*arguments: object) -> Any:
        result = runner.invoke(cli.main, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def one_line(result: Any) -> str:
    """Return the only line of a refused call."""
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("csp: ")
    return str(lines[0])


# ---- info ----


def test_info_is_true(csp: Csp) -> None:
    facts = json.loads(csp("info", "--json").stdout)
    assert facts["versions"]["csp_ext"] == csp_ext.__version__
    assert facts["versions"]["torch"] == importlib.metadata.version("torch")
    assert facts["build"] == dict(csp_ext.build_info())
    assert facts["cpu"]["capability"] == csp_ext.cpu_capability()
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["cuda"]["loaded"] == csp_ext.cuda_status().loaded
    assert facts["cuda"]["reason"] == csp_ext.cuda_status().reason
    assert set(facts["libraries"]) == {"cpu ops", "cuda ops", "host"}
    for name, library in facts["libraries"].items():
        if library["path"] is None:
            assert name == "cuda ops"
            continue
        assert not Path(library["path"]).is_absolute()
        assert any((Path(folder) / library["path"]).is_file() for folder in facts["package"])
    assert facts["libraries"]["cpu ops"]["loaded"]


def test_info_for_people(csp: Csp) -> None:
    text = csp("info").stdout
    assert "libcsp_ops_cpu.so" in text
    assert csp_ext.cpu_capability() in text
    assert csp_ext.cuda_status().reason in text
    assert torch.__version__ in text


def test_info_needs_the_base_dependencies_only() -> None:
    code = (
        "import sys, importlib.metadata as m\n"
        "real = m.version\n"
        "optional = ('transformers', 'matplotlib', 'pillow')\n"
        "for name in ('transformers', 'matplotlib', 'PIL'): sys.modules[name] = None\n"
        "def version(name):\n"
        "    if name in optional: raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
        "from csp_ext.cli import main\n"
        "main(['info'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for line in ("transformers", "matplotlib", "pillow"):
        assert any(row.startswith(line) and "not installed" in row for row in done.stdout.splitlines())


def test_help_names_every_command(csp: Csp) -> None:
    text = csp("--help").stdout
    assert all(name in text for name in ("demo", "generate", "info"))
    for name in ("demo", "generate", "info"):
        assert csp(name, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("text", "budget"), [("0.2", 0.2), ("20%", 0.2), ("300", 300), ("1", 1), ("1.0", 1.0), ("5e-1", 0.5)]
)
def test_parse_budget(text: str, budget: float) -> None:
    parsed = cli.parse_budget(text)
    assert parsed == budget
    assert type(parsed) is type(budget)


# ---- demo and generate ----

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
from PIL import Image  # noqa: E402

from csp_ext.demo.checkpoint import device_of  # noqa: E402
from csp_ext.dispatch import missing_kernels  # noqa: E402
from csp_ext.tiny_llava import save_tiny_llava  # noqa: E402

SIDE = 8
EDGE = 14 * SIDE


@pytest.fixture(autouse=True)
def chatty() -> Iterator[None]:
    """Give transformers its voice back after a command has silenced it."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    yield
    logging.set_verbosity(level)
    if bars:
        logging.enable_progress_bar()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("llava"), image_size=EDGE)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photographs")
    paths = [folder / "one.png", folder / "two.png"]
    for path, width in zip(paths, (300, 200), strict=True):
        Image.effect_mandelbrot((width, 240), (-3, -2.5, 2, 2.5), 100).save(path)
    return paths


def check_runs(facts: dict[str, Any], budgets: list[float]) -> None:
    """Check one command's JSON: kept counts are the budgets, bytes follow from them."""
    full, *pruned = facts["runs"]
    length = facts["prompt"]["tokens"]
    assert facts["prompt"]["text"] + facts["prompt"]["image"] == length
    assert (full["name"], full["kept"]["total"], full["equals_full"]) == ("full", length, True)
    assert len(pruned) == len(budgets)
    for run, budget in zip(pruned, budgets, strict=True):
        slots = int(budget * length) if isinstance(budget, float) else budget
        assert run["kept"]["total"] == pytest.approx(slots)
        assert run["kept"]["text"] + run["kept"]["image"] == pytest.approx(slots)
        assert run["cache_bytes"] == run["stats"]["bytes_after"]
        assert full["cache_bytes"] == run["stats"]["bytes_before"]
        assert run["cache_bytes"] * length == full["cache_bytes"] * slots
        assert all(layer["kept"] == pytest.approx(slots) for layer in run["stats"]["layers"])
        assert run["ms_per_token"] > 0
        assert run["ms_to_first_token"] > 0


def test_demo_as_it_is(csp: Csp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "DEMO_REPEATS", 1)
    out = tmp_path / "demo.png"
    result = csp("demo", "--out", out, "--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    facts = json.loads(result.stdout)
    assert facts["model"]["parameters"] == 784_256
    assert [question["task"] for question in facts["questions"]] == ["photo_code", "link_photo"]
    for question in facts["questions"]:
        full, *pruned = question["runs"]
        labels = [(run["method"], run["budget"]) for run in pruned]
        assert labels == [(method, f"{b} %") for b in (20, 10) for method in ("csp", "snapkv")]
        for method in ("csp", "snapkv"):
            runs = [full, *(run for run in pruned if run["method"] == method)]
            check_runs({"prompt": question["prompt"], "runs": runs}, [0.2, 0.1])
        assert question["prompt"]["image"] == 12 * 16
        assert len(set(question["prompt"]["images"])) == 12
        assert all(run["right"] == (run["answer"] == question["answer"]) for run in question["runs"])
        # What the demo is there to show, at its first budget and default seed.
        assert [run["right"] for run in question["runs"][:3]] == [True, True, False]
    assert any("One sample proves nothing" in note for note in facts["notes"])
    assert facts["picture"] == str(out)
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.width == 1276
        assert 1000 < image.height < 1300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 5_000


def test_demo_for_people(csp: Csp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "DEMO_REPEATS", 1)
    monkeypatch.chdir(tmp_path)
    result = csp("demo", "--budget", "0.5", "--budget", "12", "--task", "code", "--seed", 5)
    assert result.exit_code == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    rows = [row for row in rows if row and "ms" in row]
    assert [row[0] for row in rows] == ["full", "csp", "snapkv", "csp", "snapkv"]
    assert [" ".join(row[1:4]) for row in rows[1:4]] == ["50 % 172/345", "50 % 172/345", "12 tok 12/345"]
    assert rows[0][-1] == rows[1][-1] == "right"
    assert "right answer  code " in result.stdout
    assert "docs/quality.md" in result.stdout
    assert (tmp_path / "demo.png").stat().st_size > 20_000


def test_generate_is_what_transformers_says(csp: Csp, checkpoint: Path, files: list[Path]) -> None:
    arguments = ["--model", checkpoint, "--prompt", "What is it?", "--image", files[0], "--image", files[1]]
    result = csp("generate", *arguments, "--budget", "50%", "--budget", 40, "--max-new-tokens", 5, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    facts = json.loads(result.stdout)
    check_runs(facts, [0.5, 40])
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint)
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.open(file) for file in files], return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, length:]
    assert facts["prompt"]["tokens"] == length
    assert facts["runs"][0]["tokens"] == expected.tolist()
    assert facts["texts"]["full"] == processor.tokenizer.decode(expected, skip_special_tokens=True).strip()
    with csp_ext.apply(model, budget=40):
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, length:]
    assert facts["runs"][2]["tokens"] == expected.tolist()


def test_generate_takes_a_prompt_with_image_tokens_as_it_is(
    csp: Csp, checkpoint: Path, files: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "kept.png"
    prompt = "USER: this <image> and this <image> differ how? ASSISTANT:"
    images = ["--image", files[0], "--image", files[1]]
    method = ["--window", 4, "--heads", "shared", "--combine", "union", "--cross-ratio", "0.25"]
    method += ["--decode-interval", 2]
    result = csp(
        *("generate", "--model", checkpoint, "--prompt", prompt, *images, *method),
        *("--picture", out, "--no-compare", "--max-new-tokens", 6, "--dtype", "bfloat16", "--json"),
    )
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert [run["name"] for run in facts["runs"]] == ["20 %"]
    assert "equals_full" not in facts["runs"][0]
    config = facts["runs"][0]["config"]
    given = {"window": 4, "heads": "shared", "combine": "union", "cross_ratio": 0.25, "decode_interval": 2}
    assert {name: config[name] for name in given} == given
    assert facts["runs"][0]["stats"]["renewals"] == 2
    assert facts["dtype"] == "bfloat16"
    with Image.open(out) as image:
        assert image.width > 500


def test_generate_for_people(csp: Csp, checkpoint: Path, files: list[Path]) -> None:
    prompt = json.dumps([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}])
    arguments = ["--model", checkpoint, "--prompt", prompt, "--image", files[0], "--max-new-tokens", 3]
    result = csp("generate", *arguments)
    assert result.exit_code == 0, result.stderr
    assert "64/64" in result.stdout
    assert "20 %" in result.stdout


def test_generate_without_images_says_why_there_is_no_picture(
    csp: Csp, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "none.png"
    arguments = ["--model", checkpoint, "--prompt", "Hello there", "--max-new-tokens", 2, "--picture", out]
    facts = json.loads(csp("generate", *arguments, "--json").stdout)
    assert facts["prompt"]["image"] == 0
    assert facts["picture"] is None
    assert facts["notes"] == ["No picture: the prompt has no images."]
    assert not out.exists()


# ---- mistakes ----


def test_auto_takes_the_gpu_only_where_its_kernels_are(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"csp::select"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, _: name not in absent)
    assert missing_kernels("cuda") == ["select"]
    assert device_of("auto").type == "cpu"
    absent.clear()
    assert device_of("auto").type == "cuda"


def test_pruning_has_its_cpu_kernels() -> None:
    assert missing_kernels("cpu") == []


@pytest.mark.parametrize("budget", ["abc", "0", "-3", "0.0", "1.5", "nan", "inf", "120%", ""])
def test_a_bad_budget(csp: Csp, budget: str) -> None:
    assert "budget" in one_line(csp("demo", f"--budget={budget}"))


def test_demo_keeps_the_old_picture_when_it_fails(
    csp: Csp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from csp_ext.demo import evidence_picture

    def fail(*_: object) -> None:
        raise cli.UserError("no\nink")

    monkeypatch.setattr(evidence_picture, "_headline", fail)
    out = tmp_path / "demo.png"
    out.write_text("old")
    assert one_line(csp("demo", "--out", out, "--task", "code", "--json")) == "csp: no ink"
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]


def test_an_unknown_task(csp: Csp, tmp_path: Path) -> None:
    line = one_line(csp("demo", "--out", tmp_path / "demo.png", "--task", "riddle"))
    assert "task must be one of code, photo" in line
    assert "'riddle'" in line
    assert csp("demo", "--seed", -1).exit_code == 2


def test_a_picture_that_cannot_be_written(csp: Csp, tmp_path: Path) -> None:
    assert "must end in one of .png" in one_line(csp("demo", "--out", tmp_path / "demo.doc"))
    assert "does not exist" in one_line(csp("demo", "--out", tmp_path / "no" / "demo.png"))


def test_missing_extras(csp: Csp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = cli.require.__globals__["importlib"].util.find_spec
    gone = {"matplotlib", "transformers"}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name in gone else find(name, *rest)
    )
    line = one_line(csp("demo", "--out", tmp_path / "demo.png"))
    assert line == "csp: transformers, matplotlib not installed; try: pip install 'csp_ext[demo]'"
    line = one_line(csp("generate", "--model", tmp_path, "--prompt", "?"))
    assert line == "csp: transformers not installed; try: pip install 'csp_ext[hf]'"


def test_a_folder_that_is_no_checkpoint(csp: Csp, tmp_path: Path, checkpoint: Path) -> None:
    def generate(folder: Path) -> str:
        return one_line(csp("generate", "--model", folder, "--prompt", "?", "--json"))

    assert "is not a folder" in generate(tmp_path / "absent")
    assert "has no config.json" in generate(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "broken cannot be loaded" in generate(broken)
    weights.unlink()
    assert "broken cannot be loaded" in generate(broken)
    (broken / "processor_config.json").unlink()
    (broken / "tokenizer.json").unlink()
    assert "processor" in generate(broken)
    (broken / "config.json").write_text("{")
    assert "broken" in generate(broken)


def test_a_checkpoint_without_some_weights(csp: Csp, tmp_path: Path, checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = load_file(broken / "model.safetensors")
    del weights[next(name for name in weights if "q_proj" in name)]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    line = one_line(csp("generate", "--model", broken, "--prompt", "?", "--json"))
    assert "lacks 1 of its weights" in line
    assert "q_proj" in line


def test_a_text_model_is_no_vision_language_model(csp: Csp, tmp_path: Path, checkpoint: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=384, **sizes)).save_pretrained(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    processor.tokenizer.save_pretrained(tmp_path)
    assert "processor" in one_line(csp("generate", "--model", tmp_path, "--prompt", "?", "--json"))
    processor.save_pretrained(tmp_path)
    assert "cannot be loaded" in one_line(csp("generate", "--model", tmp_path, "--prompt", "?", "--json"))


def test_a_model_without_image_token_id(
    csp: Csp, tmp_path: Path, checkpoint: Path, files: list[Path]
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["image_token_index"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    arguments = ["--model", folder, "--prompt", "?", "--image", files[0], "--json"]
    assert "image token (id 99)" in one_line(csp("generate", *arguments))
    config["image_token_index"] = None
    (folder / "config.json").write_text(json.dumps(config))
    line = one_line(csp("generate", *arguments))
    assert "image_token_index" in line
    assert "NoneType" in line
    # Without the field transformers assumes LLaVA-1.5's.
    del config["image_token_index"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "image token (id 32000)" in one_line(csp("generate", *arguments))


def test_images_that_cannot_be_used(csp: Csp, tmp_path: Path, checkpoint: Path, files: list[Path]) -> None:
    def generate(prompt: str, *images: Path) -> str:
        options = [option for image in images for option in ("--image", image)]
        return one_line(csp("generate", "--model", checkpoint, "--prompt", prompt, *options, "--json"))

    noise = tmp_path / "noise.jpg"
    noise.write_bytes(b"\xff\xd8 no jpeg")
    assert "noise.jpg is not in a format" in generate("?", noise)
    assert "does not exist" in generate("?", tmp_path / "absent.jpg")
    assert "holds <image> 1 times, but 2 images" in generate("<image> ?", *files)
    assert "refuses this prompt" in generate('[{"role": "user", "content": "no image"}]', *files)


def test_options_that_cannot_be(csp: Csp, checkpoint: Path) -> None:
    def generate(*options: str) -> str:
        return one_line(csp("generate", "--model", checkpoint, "--prompt", "?", *options, "--json"))

    assert "dtype must be one of" in generate("--dtype", "int8")
    assert "device must be" in generate("--device", "toaster")
    assert "heads must be one of" in generate("--heads", "all")
    assert "window must be" in generate("--window", "many")
    assert "cross_ratio must lie in [0, 1], got 2" in generate("--cross-ratio", "2")
    if not torch.cuda.is_available():
        assert "device cuda: this machine has 0 GPUs" in generate("--device", "cuda")
