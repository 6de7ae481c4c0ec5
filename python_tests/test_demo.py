"""The parts of the demo and of generate: photographs, prompts, measured runs, patches and the pictures."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
from PIL import Image

from csp_ext.config import CSPConfig
from csp_ext.demo import photographs, picture, prompts
from csp_ext.demo.console import UserError, check_target, replacing, require
from csp_ext.demo.report import numbers, same_start, settings, size, table
from csp_ext.demo.run import LayerKept, Run, compare, head_share
from csp_ext.integration import apply
from csp_ext.methods import CSP, SnapKV
from csp_ext.tiny_llava import IMAGE_TOKEN_ID, build_tiny_llava, build_tiny_processor

SIDE = 4  # patches along an image's edge
PATCH = 14


@pytest.fixture(scope="module")
def model() -> Any:
    return build_tiny_llava(image_size=SIDE * PATCH, patch_size=PATCH)


@pytest.fixture(scope="module")
def processor() -> Any:
    return build_tiny_processor(image_size=SIDE * PATCH, patch_size=PATCH)


@pytest.fixture(scope="module")
def images() -> list[photographs.Photograph]:
    """Two smooth pictures, one of them wide, one high."""
    result = []
    for name, (width, height) in {"wide": (400, 300), "high": (320, 380)}.items():
        y, x = np.mgrid[0:height, 0:width] / min(width, height)
        pixels = np.stack([x % 1, y % 1, (1 + np.sin(5 * x + 3 * y)) / 2], -1)
        result.append(photographs.Photograph(name, Image.fromarray((255 * pixels).astype(np.uint8))))
    return result


@pytest.fixture(scope="module")
def prompt(model: Any, processor: Any, images: list[photographs.Photograph]) -> prompts.Prompt:
    text = "Look. The first: <image> and the second: <image> How many people are there, and what do they do?"
    return prompts.assemble(processor, model, text, images)


@pytest.fixture(scope="module")
def runs(model: Any, prompt: prompts.Prompt) -> list[Run]:
    result = [Run("full"), *(Run(str(budget), CSP(CSPConfig(budget=budget))) for budget in (1.0, 0.5, 30))]
    assert compare(model, prompt, result, 6, repeats=2) == []
    return result


# ---- photographs ----


def test_read_turns_a_photograph_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.new("L", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    photograph = photographs.read(tmp_path / "a.jpg")
    assert (photograph.name, photograph.image.size, photograph.image.mode) == ("a", (20, 40), "RGB")


@pytest.mark.parametrize("kind", ["absent", "text", "truncated", "folder"])
def test_read_explains_what_is_no_picture(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.png"
    if kind == "text":
        path.write_text("not a picture")
    elif kind == "truncated":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:500])
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(UserError, match=r"^image .*x\.png (does not exist|is not in|cannot be read)"):
        photographs.read(path)


# ---- prompts ----


def test_a_prompt_mixes_text_and_images(prompt: prompts.Prompt) -> None:
    ids = prompt.inputs["input_ids"][0]
    assert torch.equal(prompt.modality == 1, ids == IMAGE_TOKEN_ID)
    assert prompt.image_tokens == 2 * SIDE**2
    assert prompt.text_tokens + prompt.image_tokens == prompt.length == ids.numel()
    borders = (prompt.modality[1:] != prompt.modality[:-1]).sum()
    assert borders == 4  # every image has text before and after it


def test_a_question_comes_after_its_images(processor: Any) -> None:
    messages = prompts.written(processor, "What is it?", 2)
    assert [part["type"] for part in messages[0]["content"]] == ["image", "image", "text"]


def test_the_image_token_places_the_images(processor: Any) -> None:
    text = "USER: <image> before <image> ASSISTANT:"
    assert prompts.written(processor, text, 2) == text
    with pytest.raises(UserError, match="the prompt holds <image> 2 times, but 3 images were given"):
        prompts.written(processor, text, 3)


def test_json_is_a_chat_but_a_bracket_is_text(processor: Any) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
    assert prompts.written(processor, json.dumps(messages), 1) == messages
    assert prompts.written(processor, "[sic] what?", 0)[0]["content"][-1]["text"] == "[sic] what?"


def test_without_a_template_the_image_tokens_come_first() -> None:
    bare = type("Bare", (), {"image_token": "<image>", "chat_template": None})()
    assert prompts.written(bare, "What?", 2) == "<image>\n<image>\nWhat?"
    assert prompts.written(bare, "What?", 0) == "What?"
    with pytest.raises(UserError, match="takes no images"):
        prompts.written(type("Text", (), {})(), "What?", 1)


def test_a_model_without_image_token_is_refused(processor: Any, images: list[photographs.Photograph]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=384, **sizes))
    with pytest.raises(UserError, match="LlamaForCausalLM has no image_token_id in its config"):
        prompts.assemble(processor, llama, "<image> what?", images[:1])


def test_another_models_processor_is_refused(processor: Any, images: list[photographs.Photograph]) -> None:
    other = build_tiny_llava(image_size=SIDE * PATCH)
    other.config.image_token_id = 77
    with pytest.raises(UserError, match=r"is the model's image token \(id 77\)"):
        prompts.assemble(processor, other, "<image> what?", images[:1])


def test_a_chat_the_template_cannot_read_is_refused(processor: Any, model: Any) -> None:
    with pytest.raises(UserError, match="the processor refuses this prompt"):
        prompts.assemble(processor, model, [{"role": "user", "content": 3}], [])


# ---- runs ----


def test_the_full_run_keeps_everything(runs: list[Run], prompt: prompts.Prompt, model: Any) -> None:
    text = model.config.get_text_config()
    per_token = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4
    assert runs[0].cache_bytes == prompt.length * per_token
    assert runs[0].kept_total(prompt) == prompt.length
    assert len(runs[0].tokens) == 6
    assert len(runs[0].first_token_s) == 2
    assert len(runs[0].token_s) == 2 * 5


def test_a_budget_of_everything_changes_nothing(runs: list[Run], prompt: prompts.Prompt) -> None:
    assert runs[1].tokens == runs[0].tokens
    assert runs[1].cache_bytes == runs[0].cache_bytes
    assert runs[1].kept_total(prompt) == prompt.length


@pytest.mark.parametrize("which", [2, 3])
def test_a_pruned_run_keeps_its_budget(
    runs: list[Run], prompt: prompts.Prompt, model: Any, which: int
) -> None:
    run = runs[which]
    budget = prompt.length // 2 if which == 2 else 30
    assert run.kept_total(prompt) == pytest.approx(budget)
    assert run.kept(prompt, 0) + run.kept(prompt, 1) == pytest.approx(budget)
    assert run.cache_bytes * prompt.length == runs[0].cache_bytes * budget
    assert run.cache_bytes == run.stats["bytes_after"]
    assert runs[0].cache_bytes == run.stats["bytes_before"]


def test_kept_tokens_are_those_of_the_handle(runs: list[Run], prompt: prompts.Prompt, model: Any) -> None:
    with apply(model, budget=30) as handle:
        model.generate(**prompt.inputs, max_new_tokens=2, do_sample=False)
    for mine, layer in zip(runs[3].layers, handle.stats.layers, strict=True):
        heads = layer.indices.shape[1]
        expected = torch.zeros(prompt.length)
        for head in layer.indices[0]:
            expected[head[head >= 0].long()] += 1 / heads
        torch.testing.assert_close(mine.share, expected)
        assert mine.tokens(prompt.modality, 1) == pytest.approx(
            layer.share_kept(1) * prompt.image_tokens, abs=1e-6
        )


def test_compare_leaves_the_model_alone(runs: list[Run], model: Any) -> None:
    assert "generate" not in model.__dict__
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks


def test_a_model_that_cannot_be_pruned_says_why(
    model: Any, prompt: prompts.Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.config.get_text_config(), "cross_attention_layers", [1], raising=False)
    with pytest.raises(UserError, match="cross-attention layers"):
        compare(model, prompt, [Run("20 %", CSP(CSPConfig()))], 2)


def test_head_share_ignores_free_slots() -> None:
    indices = torch.tensor([[-1, 0, 3], [-1, -1, 3]], dtype=torch.int32)
    assert head_share(indices, 5).tolist() == [0.5, 0, 0, 1, 0]


# ---- the table ----


def test_numbers_say_what_the_runs_say(runs: list[Run], prompt: prompts.Prompt) -> None:
    row = json.loads(json.dumps(numbers(runs[3], prompt, runs[0])))
    assert row["kept"]["share"] == pytest.approx(30 / prompt.length)
    assert row["config"]["budget"] == 30
    assert row["cache_bytes"] == runs[3].cache_bytes
    assert row["equals_full"] == (runs[3].tokens == runs[0].tokens)
    assert row["ms_per_token"] == pytest.approx(1e3 * float(np.median(runs[3].token_s)))
    assert "equals_full" not in numbers(runs[3], prompt, None)


def test_settings_are_plain_and_complete() -> None:
    assert settings(None) is None
    assert settings(CSP(CSPConfig(budget=7))) == CSPConfig(budget=7).to_dict()
    assert json.loads(json.dumps(settings(SnapKV(budget=0.3))))["budget"] == 0.3


def test_the_table_fits_a_terminal(runs: list[Run], prompt: prompts.Prompt) -> None:
    from rich.console import Console

    file = io.StringIO()
    # As long as a prompt of four LLaVA-1.5 images.
    longer = replace(prompt, modality=prompt.modality.repeat(72))
    Console(width=80, file=file).print(table([runs[0], Run("1000 tok", token_s=[0.1234])], longer, runs[0]))
    text = file.getvalue()
    assert "…" not in text
    assert f"{longer.image_tokens}/{longer.image_tokens}" in text
    assert "2 images, " in text


def test_same_start_and_size() -> None:
    assert same_start([1, 2, 3], [1, 2, 4]) == 2
    assert same_start([1], [1, 2]) == 1
    assert [size(n) for n in (5, 1536, 5 << 20, 3 << 30)] == ["5 B", "1.5 KiB", "5.00 MiB", "3.00 GiB"]


# ---- patches and the picture ----


def test_tokens_are_patches_in_row_major_order(model: Any, prompt: prompts.Prompt) -> None:
    """Changing one patch of the pixels changes the token at its place most."""
    pixels = prompt.inputs["pixel_values"][:1]
    row, column = 1, 2
    changed = pixels.clone()
    changed[:, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] += 3
    with torch.no_grad():
        before, after = (
            torch.cat(list(model.get_image_features(pixel_values=x).pooler_output)) for x in (pixels, changed)
        )
    difference = (after - before).norm(dim=-1)
    assert difference.argmax() == row * SIDE + column
    assert prompts.why_no_patches(prompt) == ""
    assert prompts.patch_side(prompt) == SIDE


def test_seen_pixels_are_the_photographs(
    processor: Any, prompt: prompts.Prompt, images: list[photographs.Photograph]
) -> None:
    edge = SIDE * PATCH
    for seen, photograph in zip(prompts.seen_pixels(processor, prompt), images, strict=True):
        width, height = photograph.image.size
        short = min(width, height)
        left, top = (width - short) // 2, (height - short) // 2
        square = photograph.image.crop((left, top, left + short, top + short)).resize((edge, edge))
        assert seen.shape == (edge, edge, 3)
        assert np.abs(seen - np.asarray(square) / 255).mean() < 0.03


def test_pictures_are_refused_where_tokens_are_no_squares(prompt: prompts.Prompt) -> None:
    pixels = prompt.inputs["pixel_values"]
    tiles = replace(prompt, inputs={"pixel_values": pixels[:, None]})
    assert "does not see each image as one square" in prompts.why_no_patches(tiles)
    wide = replace(prompt, inputs={"pixel_values": pixels[..., :PATCH]})
    assert "does not see each image as one square" in prompts.why_no_patches(wide)
    fewer = replace(prompt, modality=prompt.modality[: -prompt.length // 2])
    assert "are not squares of patches" in prompts.why_no_patches(fewer)
    assert prompts.why_no_patches(replace(prompt, photographs=[])) == "the prompt has no images"


def test_patch_shares_lie_where_their_tokens_are(prompt: prompts.Prompt) -> None:
    share = torch.zeros(prompt.length)
    image, row, column = 1, 3, 1
    position = torch.nonzero(prompt.modality == 1)[image * SIDE**2 + row * SIDE + column]
    share[position] = 0.5
    shares = picture.patch_shares(LayerKept(0, share), prompt, SIDE)
    assert shares.shape == (2, SIDE, SIDE)
    assert shares[image, row, column] == 0.5
    assert shares.sum() == 0.5


def test_fade_shows_kept_patches_and_greys_the_others() -> None:
    pixels = np.full((6, 6, 3), [0.9, 0.3, 0.1])
    faded = picture.fade(pixels, np.array([[1.0, 0.0], [0.5, 0.0]]))
    np.testing.assert_allclose(faded[:3, :3], pixels[:3, :3])
    dropped = faded[:3, 3:]
    assert dropped.mean() < 0.3
    assert np.ptp(dropped, axis=-1).max() < 0.05
    assert dropped.mean() < faded[3:, :3].mean() < pixels.mean()


def test_many_layers_are_thinned_evenly() -> None:
    layers = [LayerKept(i, torch.zeros(1)) for i in range(32)]
    assert [layer.layer for layer in picture.chosen_layers(layers)] == [0, 4, 9, 13, 18, 22, 27, 31]
    assert picture.chosen_layers(layers[:3]) == layers[:3]


def test_draw_writes_the_picture(
    processor: Any, prompt: prompts.Prompt, runs: list[Run], tmp_path: Path
) -> None:
    sizes = []
    for budget in (1, 3):
        picture.draw(processor, prompt, runs[budget], tmp_path / f"{budget}.png", "tiny")
        with Image.open(tmp_path / f"{budget}.png") as image:
            assert image.format == "PNG"
            sizes.append(image.size)
            pixels = np.asarray(image.convert("RGB")).astype(int)
        # Two rows and three columns of tiles; the first column is the photograph itself.
        assert min(sizes[-1]) > 500
        left, right = pixels[:, : sizes[-1][0] // 3], pixels[:, sizes[-1][0] // 2 :]
        assert left.std() > 30
        dark = ((right.max(-1) < 60) | (np.ptp(right, axis=-1) < 12) & (right.max(-1) < 110)).mean()
        assert dark < 0.25 if budget == 1 else dark > 0.3
    assert sizes[0] == sizes[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.png", "3.png"]


# ---- files and extras ----


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    target.write_text("old")

    def fail() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert target.read_text() == "old"
    with replacing(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_check_target_names_the_trouble(tmp_path: Path) -> None:
    for path, trouble in (
        (tmp_path / "a.txt", "must end in one of .png"),
        (tmp_path / "no" / "a.png", "does not exist"),
        (tmp_path / "d.png", "is a folder"),
    ):
        if path.name == "d.png":
            path.mkdir()
        with pytest.raises(UserError, match=trouble):
            check_target(path, picture.SUFFIXES)


def test_require_names_what_to_install() -> None:
    require("demo", "json")
    with pytest.raises(UserError, match=r"no_such_module not installed; try: pip install 'csp_ext\[demo\]'"):
        require("demo", "json", "no_such_module")
