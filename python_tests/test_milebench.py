"""MileBench's format, the generated suite in it, prompts, truncation and groups for generation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image

from csp_ext.demo.console import UserError
from csp_ext.evaluation import TASKS, make_samples
from csp_ext.evaluation.batches import batches
from csp_ext.evaluation.items import GROUP_OF, Dataset, Draft, Item
from csp_ext.evaluation.milebench import read_datasets, write_dataset
from csp_ext.evaluation.prompts import SYSTEM, assemble
from csp_ext.evaluation.suite import GROUP_OF_TASK, write_suite
from csp_ext.evaluation.truncation import Context, Dropped, Limit, truncate

SAMPLE = {
    "sample_id": 0,
    "task_instruction_id": 1,
    "task_instance": {
        "context": "First {image#1} and then {table#2}. What fell?",
        "images_path": ["a/1.png", "2.png"],
        "choice_list": ["The cup.", "Nothing."],
    },
    "response": "the cup",
    "image_quantity_level": "Few",
}
META = {"question_type": "multi-choice", "task_instruction": ["Look.", "Pick one."]}


def written(root, data, *, name="Toy", meta=META, suffix=""):
    """Write an annotation and the two images that SAMPLE wants."""
    folder = root / name
    for path in ("images/a/1.png", "images/2.png"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / path)
    text = data if isinstance(data, str) else json.dumps({"meta_data": meta, "data": data})
    (folder / f"{name}{suffix}.json").write_text(text)
    return root


def changed(sample_id, task=(), **fields):
    """Return SAMPLE with another id and other fields; None takes one away."""
    sample = SAMPLE | {"sample_id": sample_id} | fields
    sample["task_instance"] = SAMPLE["task_instance"] | dict(task)
    return {key: value for key, value in sample.items() if value is not None}


def item(context, *, choices=(), images=2, **fields):
    paths = tuple(Path(f"{i}.png") for i in range(1, images + 1))
    plain = Item(
        dataset="Toy",
        sample_id="0",
        instruction="Look.",
        context=context,
        choices=choices,
        images=paths,
        combined=False,
        level="Few",
        response="x",
        question=None,
        evidence=(),
    )
    return replace(plain, **fields)


class Words:
    """A tokenizer: one token per word."""

    def __init__(self):
        self.words = []

    def __call__(self, text, *, add_special_tokens):
        assert not add_special_tokens
        self.words += [word for word in text.split() if word not in self.words]
        return {"input_ids": [self.words.index(word) for word in text.split()]}

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


def test_a_sample_is_read(tmp_path):
    (dataset,), problems = read_datasets(written(tmp_path, [SAMPLE]))
    assert problems == []
    assert (dataset.name, dataset.group, dataset.metric) == ("Toy", "Toy", "multiple_choice")
    (sample,) = dataset.samples
    folder = tmp_path / "Toy" / "images"
    assert sample.images == (folder / "a" / "1.png", folder / "2.png")
    assert (sample.instruction, sample.level, sample.response) == ("Pick one.", "Few", "the cup")
    assert sample.choices == ("The cup.", "Nothing.")


def test_groups_and_metrics_come_from_names_and_declarations(tmp_path):
    assert len(GROUP_OF) == 29
    sample = changed(0, task={"choice_list": []})
    for name in ("MMCoQA", "TextNeedleInAHaystack", "IEdit"):
        written(tmp_path, [sample], name=name, meta=META | {"question_type": "open-ended", "group": "mine"})
    own = META | {"metric": "token_accuracy", "group": "mine"}
    written(tmp_path, [sample], name="own", meta=own)
    datasets, problems = read_datasets(tmp_path)
    assert problems == []
    assert {d.name: (d.group, d.metric) for d in datasets} == {
        "IEdit": ("S-3", "rouge_l"),
        "MMCoQA": ("S-4", "contains"),
        "TextNeedleInAHaystack": ("NH", "token_match"),
        "own": ("mine", "token_accuracy"),
    }
    assert [d.name for d in read_datasets(tmp_path, ["own", "IEdit"])[0]] == ["own", "IEdit"]


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (changed(7, task_instruction_id=2), "task_instruction_id is 2, but there are 2 instructions"),
        (changed(7, task_instruction_id=-1), "task_instruction_id is -1"),
        (changed(7, task_instruction_id=None), "task_instruction_id is missing"),
        (changed(7, response="The pot."), "the response 'The pot.' is not among the 2 choices"),
        (changed(7, response=" "), "the response is empty"),
        (changed(7, response=["x"]), "response must be a text or an integer or a number, got ['x']"),
        (changed(7, {"images_path": ["a/1.png", "3.png"]}), "there is no image"),
        (changed(7, {"images_path": ["a/1.png", "x" * 999]}), "there is no image"),
        (changed(7, {"context": "What \ud800?"}), "a text holds half a surrogate pair"),
        (changed(7, {"images_path": ["a/1.png"]}), "the text refers to image 2 of 1"),
        (changed(7, {"images_path": "a/1.png"}), "images_path must be a list, got 'a/1.png'"),
        (changed(7, {"choice_list": [None]}), "choice_list must be a list of texts, got [None]"),
        (changed(7, {"context": 5}), "context must be a text, got 5"),
        (changed(7, {"question": "Who fell?"}), "the context does not end with the question 'Who fell?'"),
        (changed(7, {"evidence": [1.5]}), "evidence must be a list of integers"),
        (changed(0), "has the id of an earlier sample"),
        (changed(None), "data[1]: sample_id is missing"),
        (changed(True), "data[1]: sample_id must be an integer or a text, got True"),
        ("text", "data[1]: an object with sample_id is wanted, not 'text'"),
    ],
)
def test_a_bad_sample_is_reported_and_the_rest_read(tmp_path, sample, reason):
    (dataset,), (problem,) = read_datasets(written(tmp_path, [SAMPLE, sample, changed(9)]))
    assert [good.sample_id for good in dataset.samples] == ["0", "9"]
    assert problem.reason.startswith(reason)
    assert problem.file == tmp_path / "Toy" / "Toy.json"
    known = isinstance(sample, dict) and not isinstance(sample.get("sample_id", True), bool)
    assert problem.sample_id == (str(sample["sample_id"]) if known else None)
    assert str(problem).startswith(f"{problem.file}, sample {sample['sample_id']}: " if known else "/")


@pytest.mark.parametrize(
    ("data", "meta", "reason"),
    [
        ("{", META, "is not JSON: Expecting property name"),
        ("[" * 100_000, META, "is not JSON"),
        ("[]", META, "an object with meta_data is wanted, not []"),
        ([], META, "holds no samples"),
        ([changed(0, response="no")], META, "none of its samples can be used"),
        (
            [SAMPLE],
            META | {"question_type": "essay"},
            "question_type must be multi-choice or open-ended, got",
        ),
        ([SAMPLE], META | {"metric": "bleu"}, "metric must be one of"),
        ([SAMPLE], META | {"task_instruction": "Look."}, "task_instruction must be a list, got 'Look.'"),
        ({}, META, "data must be a list, got {}"),
    ],
)
def test_a_bad_data_set_is_reported_and_the_rest_read(tmp_path, data, meta, reason):
    written(tmp_path, [SAMPLE], name="Good")
    (dataset,), problems = read_datasets(written(tmp_path, data, name="Bad", meta=meta))
    assert dataset.name == "Good"
    assert problems[-1].sample_id is None
    assert problems[-1].reason.startswith(reason)


def test_variants(tmp_path):
    root = written(tmp_path, [changed(0, {"combined_1_images": ["0-0.jpg"]})])
    written(tmp_path, [changed(1)], suffix="-adv")
    combined = root / "Toy" / "combined_1_images" / "0-0.jpg"
    combined.parent.mkdir()
    Image.new("RGB", (4, 4)).save(combined)

    (adversarial,), _ = read_datasets(root, adversarial=True)
    assert adversarial.samples[0].sample_id == "1"
    (one,), problems = read_datasets(root, combined=1)
    assert problems == []
    assert one.samples[0].images == (combined,)
    assert one.samples[0].combined
    none, (problem,) = read_datasets(root, combined=4)
    assert none == []
    assert problem.file.name == "Toy_combined_4.json"
    assert problem.reason == "cannot be read: No such file or directory"
    with pytest.raises(ValueError, match="combined must be at least 0"):
        read_datasets(root, combined=-1)


def test_mistakes_in_what_to_read_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no data set: there is no <Dataset>/<Dataset>"):
        read_datasets(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        read_datasets(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no data set DocVQA; it has Toy"):
        read_datasets(written(tmp_path, [SAMPLE]), ["DocVQA"])


def test_written_data_sets_are_read(tmp_path):
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    drafts = [
        Draft("{image#1} or?", "no", [image], ("yes", "no"), "or?", (3, 4)),
        Draft("what?", "no", (), ("no",)),
    ]
    write_dataset(tmp_path, "Own", drafts, question_type="multi-choice", instruction="Go.", group="g")
    (dataset,), problems = read_datasets(tmp_path)
    assert problems == []
    assert (dataset.group, dataset.metric) == ("g", "multiple_choice")
    one, two = dataset.samples
    assert (one.question, one.evidence, one.choices, one.instruction) == ("or?", (3, 4), ("yes", "no"), "Go.")
    assert np.array_equal(np.asarray(Image.open(one.images[0])), np.asarray(image))
    assert (two.images, two.question) == ((), None)
    with pytest.raises(UserError, match=r"Own.json exists already"):
        write_dataset(tmp_path, "Own", drafts, question_type="multi-choice")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_dataset(tmp_path / "file", "Own", drafts, question_type="multi-choice")


@pytest.mark.parametrize("mode", ["S", "A"])
def test_the_suite_reads_back_as_the_samples(tmp_path, mode):
    write_suite(tmp_path, tasks=TASKS, count=2, seed=11, mode=mode)
    datasets, problems = read_datasets(tmp_path, list(TASKS))
    assert problems == []
    assert set(GROUP_OF_TASK) == set(TASKS)
    for dataset, task in zip(datasets, TASKS, strict=True):
        assert (dataset.name, dataset.group, dataset.metric) == (task, GROUP_OF_TASK[task], "exact_match")
        samples = make_samples(task, 2, 11, mode=mode)
        for read, sample in zip(dataset.samples, samples, strict=True):
            prompt = assemble(read, "<image>")
            assert prompt.text == sample.prompt
            assert prompt.text[prompt.question_start :] == sample.question
            assert (read.response, list(read.evidence)) == (sample.answer, sample.evidence)
            assert len(prompt.images) == len(sample.images)
            for path, image in zip(prompt.images, sample.images, strict=True):
                assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))


def test_the_suites_prompts_have_the_samples_tokens(tmp_path):
    pytest.importorskip("transformers")
    from csp_ext.evaluation.processor import build_processor

    processor = build_processor()
    write_suite(tmp_path, tasks=["triple"], count=1, seed=3, mode="S")
    (read,) = read_datasets(tmp_path)[0][0].samples
    (sample,) = make_samples("triple", 1, 3)
    wanted = processor(text=sample.prompt, images=sample.images, return_tensors="pt")
    limit = Limit(1000, 16, processor.tokenizer)
    prompt = assemble(read, processor.image_token, limit=limit)
    assert prompt.dropped == Dropped()
    got = processor(text=prompt.text, images=[Image.open(p) for p in prompt.images], return_tensors="pt")
    assert got["input_ids"].tolist() == wanted["input_ids"].tolist()
    assert (got["pixel_values"] == wanted["pixel_values"]).all()
    told = [processor.decode(got["input_ids"][0, position]) for position in read.evidence]
    digits = [word for word in read.response.split() if word.isdigit()]
    assert all(word in ("<image>", digit) for word, digit in zip(told, digits, strict=True))

    short = assemble(read, processor.image_token, limit=replace(limit, tokens=100))
    shorter = processor.tokenizer(short.text)["input_ids"]
    assert short.dropped.images == 12 - len(short.images) > 0
    assert len(shorter) - 1 + 15 * len(short.images) <= 100
    assert sample.prompt.endswith(short.text.removeprefix("<image>"))


def test_mistakes_in_a_suite_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"tasks must be among code, .* got 'codes'"):
        write_suite(tmp_path, tasks=["code", "codes"], count=1, seed=0, mode="S")
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        write_suite(tmp_path, tasks=["code"], count=0, seed=0, mode="S")
    assert list(tmp_path.iterdir()) == []


def test_prompts_as_written():
    asked = item("See {image#1}, {table#2}. Which?", choices=("A cup", "A pot"), question="Which?")
    prompt = assemble(asked, "<i>")
    options = "\nChoice list: \nA. A cup\nB. A pot\nYour answer is: "
    assert prompt.text == f"Look.\nSee <i>, <i>. Which?{options}"
    assert prompt.text[prompt.question_start :] == f"Which?{options}"
    assert prompt.images == asked.images

    framed = assemble(asked, "<i>", template="milebench")
    assert framed.text == f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{prompt.text} [/INST]"
    assert framed.text[framed.question_start :] == f"Which?{options} [/INST]"

    retrieval = assemble(replace(asked, dataset="GPR1200"), "<i>")
    assert "\nA cup\nA pot\nYour answer is: " in retrieval.text
    assert assemble(item("Why?"), "<i>").question_start is None


def test_images_follow_the_text_that_refers_to_them():
    one, two = item("x").images
    prompt = assemble(item("{image#2} {image#1} {table#2} <i>"), "<i>")
    assert prompt.images == (two, one, two)
    assert prompt.text == "Look.\n<i> <i> <i> "


def test_adjacent_images_are_set_apart():
    prompt = assemble(item("{image#1}{image#2}{image#1} a"), "<i>")
    assert prompt.text == "Look.\n<i>\n<i>\n<i> a"
    four = assemble(item("{image#1}{image#2}{image#1}{image#2}Why?", question="Why?"), "<i>")
    assert four.text == "Look.\n<i>\n<i>\n<i>\n<i>\nWhy?"
    assert four.text[four.question_start :] == "Why?"
    amid = assemble(item("{image#1}{image#2} why?", question="{image#2} why?"), "<i>")
    assert amid.text[amid.question_start :] == "<i>\n why?"


def test_combined_images_come_first_and_are_named():
    sheet = item("{image#1} or {table#12}?", images=1, combined=True, question="or {table#12}?")
    prompt = assemble(sheet, "<i>")
    assert prompt.text == "<i>\nLook.\n<Image 1>  or <Image 12> ?"
    assert prompt.text[prompt.question_start :] == "or <Image 12> ?"
    assert prompt.images == sheet.images
    limit = Limit(3, 1000, Words())
    short = assemble(sheet, "<i>", limit=limit)
    assert short.text == "<i>\nLook.\n12> ?"
    assert short.text[short.question_start :] == "12> ?"
    assert short.dropped == Dropped(images=0, text_tokens=4)
    assert assemble(replace(sheet, images=sheet.images * 2), "<i>").text.startswith("<i>\n<i>\n\nLook.")


# "a b c", image, "d e", image, "f g": 3 + 4 + 2 + 4 + 2 = 15 tokens where an image takes 4.
ONE, TWO = Path("1.png"), Path("2.png")
WHOLE = Context(("a b c", "d e", "f g"), (ONE, TWO), question=(1, 1))


@pytest.mark.parametrize(
    ("budget", "fragments", "images", "question", "dropped"),
    [
        (15, ("a b c", "d e", "f g"), (ONE, TWO), (1, 1), (0, 0)),
        (14, ("", "d e", "f g"), (ONE, TWO), (1, 1), (0, 3)),  # the first text does not fit
        (12, ("", "d e", "f g"), (ONE, TWO), (1, 1), (0, 3)),
        (11, ("d e", "f g"), (TWO,), (1, 1), (1, 3)),  # the first image does not fit
        (7, ("", "f g"), (TWO,), (1, 0), (1, 5)),
        (5, ("f g",), (), (0, 3), (2, 5)),  # no image fits
        (1, ("g",), (), (0, 1), (2, 6)),  # only the last text is ever cut
        (0, ("",), (), (0, 0), (2, 7)),
        (-3, ("",), (), (0, 0), (2, 7)),
    ],
)
def test_truncation_by_hand(budget, fragments, images, question, dropped):
    cut, lost = truncate(WHOLE, budget, 4, Words())
    assert cut == Context(fragments, images, question)
    assert lost == Dropped(*dropped)


def test_truncated_prompts():
    long = item("a b c {image#1} d e {image#2} f g", question="e {image#2} f g")
    # The instruction takes one token of the budget.
    prompt = assemble(long, "<i>", limit=Limit(12, 4, Words()))
    assert prompt.text == "Look.\n d e <i> f g"
    assert prompt.text[prompt.question_start :] == "e <i> f g"
    assert prompt.images == long.images[1:]
    assert prompt.dropped == Dropped(images=1, text_tokens=3)
    text_only = assemble(long, "<i>", template="milebench", limit=Limit(4, 4, Words()))
    assert text_only.images == ()
    assert "<i>" not in text_only.text
    assert text_only.text[text_only.question_start :] == " f g [/INST]"
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 4"):
        Limit(0, 4, Words())


def test_chats():
    pytest.importorskip("transformers")
    from csp_ext.evaluation.processor import build_processor

    processor = build_processor()
    asked = item("ada {image#1}{image#2} so ask code ada", instruction="", question="ask code ada")
    prompt = assemble(asked, "<image>", template="chat", processor=processor)
    assert prompt.text.split() == ["ada", "<image>", "<image>", "so", "ask", "code", "ada", "say"]
    assert prompt.text[prompt.question_start :].split() == ["ask", "code", "ada", "say"]
    assert prompt.images == asked.images
    with pytest.raises(UserError, match="has no chat template"):
        assemble(asked, "<image>", template="chat")
    processor.chat_template = "{{ messages[0]['content'][9] }}{{ raise() }}"
    with pytest.raises(UserError, match="the chat template refuses this prompt"):
        assemble(asked, "<image>", template="chat", processor=processor)
    with pytest.raises(ValueError, match="template must be one of plain, milebench, chat, got 'bare'"):
        assemble(asked, "<image>", template="bare")


def test_batches():
    counts = [2, 30, 2, 0, 9, 2, 2, 9, 9]
    samples = tuple(replace(item("x", images=n), sample_id=str(i)) for i, n in enumerate(counts))
    dataset = Dataset("Toy", "Toy", "exact_match", samples)

    def ids(name, batch_image):
        return [[s.sample_id for s in group] for group in batches(replace(dataset, name=name), batch_image)]

    needle = "TextNeedleInAHaystack"
    assert ids(needle, 6) == [["3"], ["0", "2", "5"], ["6"], ["4"], ["7"], ["8"], ["1"]]
    assert ids("Toy", 24) == [["3"], ["0", "2", "5", "6"], ["4", "7"], ["8"], ["1"]]
    assert ids("MMCoQA", 24) == ids("GPR1200", 24) == [[i] for i in "302564781"]
    with pytest.raises(ValueError, match="batch_image must be at least 1, got 0"):
        batches(dataset, 0)
