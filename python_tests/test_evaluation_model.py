"""The generated world, the training of the evaluation model, and the model that comes with the package."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("PIL")

from csp_ext.cli import main
from csp_ext.demo.console import UserError
from csp_ext.evaluation import TASKS, load_eval_model, make_samples, render, session
from csp_ext.evaluation.align import image_tokens, pixel_values
from csp_ext.evaluation.architecture import build_model
from csp_ext.evaluation.checkpoint import answers, row_lse
from csp_ext.evaluation.forward import Blocks, decode
from csp_ext.evaluation.muon import orthogonalised
from csp_ext.evaluation.processor import build_processor
from csp_ext.evaluation.tasks import SUITE_LAYOUT, ask
from csp_ext.evaluation.train import QUICK, Trainer
from csp_ext.evaluation.vocabulary import DIGITS, ID, IMAGE, WORDS, encode
from csp_ext.evaluation.vocabulary import decode as words_of
from csp_ext.evaluation.world import Layout, sample_contexts

SMALL = Layout(photos=3, codes=2, pins=2, links=2, fillers=5)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_the_same_seed_draws_the_same_world():
    one, same, other = (sample_contexts(rng(seed), SMALL, 2) for seed in (1, 1, 2))
    assert np.array_equal(one.tokens, same.tokens)
    assert np.array_equal(one.pixels, same.pixels)
    assert not np.array_equal(one.pixels, other.pixels)


def test_cells_show_what_they_should():
    content = np.full((1, render.CELLS), render.NOTHING)
    colour = np.full((1, render.CELLS), -1)
    content[0, 5], colour[0, 5] = render.FIRST_SHAPE, 0  # a red square
    content[0, 15] = 8
    (image,) = render.render(content, colour, rng()).astype(int)
    assert image.shape == (32, 32, 3)
    red = image[8:16, 8:16]
    assert red[..., 0].max() > 170 > 110 > red[..., 1].max()
    assert image[24:, 24:].min(-1).max() > 170
    assert image[:8].max() < 130


def test_contexts_say_where_the_evidence_is():
    contexts = sample_contexts(rng(), SMALL, 4)
    assert contexts.tokens.shape == (4, SMALL.length)
    for b in range(4):
        for source in ("code", "pin"):
            for i, positions in enumerate(contexts.positions[source][b]):
                words = words_of(contexts.tokens[b, positions[0] - 2 : positions[-1] + 1]).split()
                assert words[0] == source
                assert words[2:] == [DIGITS[d] for d in contexts.numbers[source][b, i]]
        for i, positions in enumerate(contexts.positions["photo"][b]):
            cells = positions - contexts.image_starts[b, i]
            assert np.array_equal(contexts.content[b, i, cells], contexts.numbers["photo"][b, i])
            assert (contexts.tokens[b, positions] == IMAGE).all()


@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_the_evidence(task):
    contexts = sample_contexts(rng(3), SMALL, 8)
    questions = ask(rng(4), contexts, task)
    answer = questions.tokens[:, questions.answer :]
    digit = (answer >= ID["0"]) & (answer <= ID["9"])
    if task.startswith("link"):
        digit[:, 2:4] = True  # what the link leads to
    told = answer[digit].reshape(8, -1)
    assert told.shape == questions.evidence.shape
    for b in range(8):
        for token, position in zip(told[b], questions.evidence[b], strict=True):
            if contexts.tokens[b, position] != IMAGE:
                assert contexts.tokens[b, position] == token
                continue
            image = (contexts.image_starts[b] <= position).nonzero()[0]
            image = max(image, key=lambda i: contexts.image_starts[b, i])
            cell = position - contexts.image_starts[b, image]
            assert ID["0"] + contexts.content[b, image, cell] == token


def test_two_questions_of_one_source_differ():
    contexts = sample_contexts(rng(), SMALL, 64)
    evidence = ask(rng(), contexts, "photo_photo").evidence
    assert (evidence[:, :4] != evidence[:, 4:]).all()


def test_samples_are_reproducible_and_modes_split_the_same_text():
    mode_s, again, mode_a = (make_samples("triple", 2, 7, mode=mode, layout=SMALL) for mode in "SSA")
    assert mode_s[0].prompt == again[0].prompt
    assert np.array_equal(np.asarray(mode_s[1].images[2]), np.asarray(again[1].images[2]))
    assert f"{mode_s[0].question} {mode_s[0].answer}" == f"{mode_a[0].question} {mode_a[0].answer}"
    assert mode_a[0].answer[0] in "0123456789"
    assert mode_s[0].answer[0] not in "0123456789"


def test_bad_samples_are_named():
    with pytest.raises(ValueError, match=r"task must be one of code, .* got 'codes'"):
        make_samples("codes", 1, 0)
    with pytest.raises(ValueError, match="mode must be S or A, got 'B'"):
        make_samples("code", 1, 0, mode="B")


def test_tokenizer_round_trip(tmp_path):
    from transformers import AutoProcessor

    build_processor().save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    text = " ".join(WORDS[5:])
    ids = processor.tokenizer(text)["input_ids"]
    assert ids == [ID["<s>"], *encode(text)]
    assert processor.decode(ids, skip_special_tokens=True) == text
    assert processor.tokenizer("zebra")["input_ids"][1] == ID["<unk>"]


def test_processor_makes_what_training_sees():
    contexts = sample_contexts(rng([5, 0]), SMALL, 1)
    (sample,) = make_samples("code", 1, 5, layout=SMALL)
    inputs = build_processor()(text=sample.prompt, images=sample.images, return_tensors="pt")
    contexts = sample_contexts(rng([5, 0]), SMALL, 1)
    length = SMALL.length
    assert np.array_equal(inputs["input_ids"][0, :length].numpy(), contexts.tokens[0])
    torch.testing.assert_close(inputs["pixel_values"], pixel_values(contexts.pixels[0]), atol=1e-5, rtol=0)
    assert words_of(inputs["input_ids"][0, length:].tolist()) == sample.question


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_packed_questions_equal_separate_sequences(num_kv_heads):
    model = build_model(0, num_kv_heads).eval()
    contexts = sample_contexts(rng(), SMALL, 2)
    questions = [ask(rng(i), contexts, task) for i, task in enumerate(("code", "triple", "photo"))]
    blocks = Blocks(SMALL.length, tuple(q.tokens.shape[1] for q in questions))
    decoder = model.model.language_model
    flat = contexts.pixels.reshape(-1, *contexts.pixels.shape[2:])
    with torch.no_grad():
        shown = image_tokens(model.model, flat)
        packed = torch.from_numpy(np.concatenate([contexts.tokens, *(q.tokens for q in questions)], 1))
        mask = (packed == IMAGE)[..., None]
        embedded = decoder.embed_tokens(packed).masked_scatter(mask, shown)
        hidden, lse = decode(decoder, embedded, blocks, torch.arange(0, blocks.length, 7))
        logits = model.lm_head(hidden).split(blocks.questions, 1)
        for question, mine in zip(questions, logits, strict=True):
            ids = torch.from_numpy(np.concatenate([contexts.tokens, question.tokens], 1))
            theirs = model(input_ids=ids, pixel_values=pixel_values(flat)).logits[:, SMALL.length :]
            torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=1e-4)
    assert len(lse) == 4
    assert lse[0].shape[:2] == (2, 4)


def test_lse_is_that_of_the_visible_keys():
    model = build_model(0).eval()
    contexts = sample_contexts(rng(), SMALL, 1)
    question = ask(rng(), contexts, "code")
    blocks = Blocks(SMALL.length, (question.tokens.shape[1],))
    tokens = torch.from_numpy(np.concatenate([contexts.tokens, question.tokens], 1))
    decoder = model.model.language_model
    with torch.no_grad():
        decoder.layers[0].self_attn.q_proj.weight.zero_()
        _, lse = decode(decoder, decoder.embed_tokens(tokens), blocks, torch.arange(blocks.length))
    expected = torch.arange(1, blocks.length + 1).float().log()
    torch.testing.assert_close(lse[0][0], expected.expand(4, -1))


def test_muon_orthogonalises():
    singular = torch.linalg.svdvals(orthogonalised(torch.randn(3, 20, 40)))
    assert float(singular.min()) > 0.5
    assert float(singular.max()) < 1.5


def test_resumed_training_equals_uninterrupted(tmp_path):
    plan = replace(QUICK, steps=4)
    whole = Trainer(plan)
    whole.align(lambda loss: None)
    first = Trainer(plan)
    first.align(lambda loss: None)
    for _ in range(4):
        whole.step()
    for _ in range(2):
        first.step()
    first.save(tmp_path)
    second = Trainer(plan)
    second.load(tmp_path)
    for _ in range(2):
        second.step()
    for mine, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    untimed = {"seconds": 0, "cpu_seconds": 0}
    assert replace(second.progress, **untimed) == replace(whole.progress, **untimed)


def test_a_killed_run_goes_on_and_its_log_has_every_step_once(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(session, "LOG_EVERY", 1)
    plan = replace(QUICK, steps=4, caption_steps=2)
    step = Trainer.step

    def killed(trainer):
        step(trainer)
        if trainer.progress.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        session.train(plan, tmp_path, samples=1)
    monkeypatch.setattr(Trainer, "step", step)
    session.train(plan, tmp_path, samples=1, resume=True)
    log = [json.loads(line)["step"] for line in (tmp_path / session.LOG).read_text().splitlines()]
    assert log == [1, 2, 3, 4]


def test_resuming_another_plan_is_refused(tmp_path):
    Trainer(QUICK).save(tmp_path)
    with pytest.raises(UserError, match="another seed"):
        Trainer(replace(QUICK, seed=3)).load(tmp_path)
    (tmp_path / "training.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        Trainer(QUICK).load(tmp_path)


def test_the_command_trains_examines_and_writes(tmp_path):
    out = tmp_path / "model"
    run = CliRunner().invoke(main, ["train-eval-model", "--quick", "--out", str(out), "--json"])
    assert run.exit_code == 0, run.output
    scores = json.loads(run.stdout)["exact_match"]
    assert set(scores) == set(TASKS)
    card = (out / "README.md").read_text()
    assert "SHA-256" in card
    assert (out / "model.safetensors").stat().st_size < 8 << 20
    assert not (out / "training.pt").exists()


def test_the_command_names_mistakes(tmp_path):
    def refused(*arguments):
        run = CliRunner().invoke(main, ["train-eval-model", *arguments])
        assert run.exit_code == 2
        return run.output

    assert "holds no interrupted training" in refused("--resume", "--out", str(tmp_path))
    assert "num-kv-heads must be 2 or 4" in refused("--num-kv-heads", "3", "--out", str(tmp_path))
    (tmp_path / "training.pt").touch()
    assert "go on with --resume" in refused("--out", str(tmp_path))
    assert "cannot be created" in refused("--out", str(tmp_path / "training.pt"))


@pytest.fixture(scope="module")
def trained():
    return load_eval_model()


@pytest.mark.parametrize(
    "task", ["code", "photo", "pin", "photo_photo", "photo_code", "code_photo", "triple"]
)
def test_the_packaged_model_answers(trained, task):
    model, processor = trained
    samples = make_samples(task, 24, 2_000_000)
    right = [
        text == s.answer for text, s in zip(answers(model, processor, samples, 24), samples, strict=True)
    ]
    assert np.mean(right) >= 0.9


def test_the_packaged_models_logits_are_bounded(trained):
    lse = torch.tensor(row_lse(trained[0], 0))
    assert float(lse.mean(1).max()) < 10


def test_an_absent_model_is_named():
    with pytest.raises(ValueError, match="no trained model with num_kv_heads=3"):
        load_eval_model(num_kv_heads=3)


def test_the_suite_fits_the_model(trained):
    assert SUITE_LAYOUT.length + 60 < trained[0].config.text_config.max_position_embeddings
