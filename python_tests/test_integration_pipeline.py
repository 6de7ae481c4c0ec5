"""The tiny LLaVA on disk, its processor, and transformers' pipeline and streaming with CSP active."""

# ruff: noqa: E402  (these imports need the optional transformers)
from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

from csp_ext.integration import apply
from csp_ext.tiny_llava import IMAGE_TOKEN_ID, build_tiny_llava, build_tiny_processor, save_tiny_llava

SIZES = {"image_size": 56, "patch_size": 7}
TOKENS = 64


def picture(seed: int = 0) -> Any:
    noise = torch.randint(
        0, 256, (80, 120, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image.fromarray(noise.numpy())


def chat(question: str, *images: Any) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny_llava"), seed=3, **SIZES)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Any:
    return transformers.pipeline("image-text-to-text", model=str(folder))


def test_the_same_seed_gives_the_same_model() -> None:
    state = torch.random.get_rng_state()
    one, two, other = (build_tiny_llava(seed, **SIZES).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_the_folder_loads_with_the_usual_calls(folder: Path) -> None:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    built = build_tiny_llava(3, **SIZES)
    for name, value in built.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    text = processor.apply_chat_template(chat("What is this?", picture()), add_generation_prompt=True)
    assert text == "USER: <image>\nWhat is this? ASSISTANT:"
    inputs = processor(images=picture(), text=text, return_tensors="pt")
    fresh = build_tiny_processor(**SIZES)(images=picture(), text=text, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], fresh["input_ids"])
    assert int((inputs["input_ids"] == IMAGE_TOKEN_ID).sum()) == TOKENS
    assert (
        processor.decode(inputs["input_ids"][0], skip_special_tokens=True)
        == "USER: \nWhat is this? ASSISTANT:"
    )
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)


def test_the_pipeline_prunes(pipe: Any) -> None:
    question = chat("How many dogs are there?", picture(1), picture(2))
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    whole = pipe(question, **options)[0]["generated_text"]
    with apply(pipe.model, budget=1.0):
        assert pipe(question, **options)[0]["generated_text"] == whole
    with apply(pipe.model, budget=24) as handle:
        pruned = pipe(question, **options)[0]["generated_text"]
    assert handle.stats.layers[0].kept == 24
    assert handle.stats.layers[0].dropped > 2 * TOKENS - 24
    assert pruned != whole
    assert pipe(question, **options)[0]["generated_text"] == whole


def test_the_pipeline_in_batches(pipe: Any) -> None:
    questions = [
        chat("What colour is it?", picture(1)),
        chat("And these two images, in detail?", picture(2), picture(3)),
    ]
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    with apply(pipe.model, budget=24):
        alone = [pipe(question, **options)[0]["generated_text"] for question in questions]
        together = pipe(questions, batch_size=2, **options)
    assert [answer[0]["generated_text"] for answer in together] == alone


def test_streaming_from_a_thread(pipe: Any) -> None:
    """The usual way to stream: generate runs in a thread of its own."""
    processor = pipe.processor
    inputs = processor(images=picture(), text="USER: <image>\nDescribe it. ASSISTANT:", return_tensors="pt")
    streamer = transformers.TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    with apply(pipe.model, budget=16) as handle:
        expected = pipe.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        thread = Thread(
            target=pipe.model.generate,
            kwargs={**inputs, "max_new_tokens": 6, "do_sample": False, "streamer": streamer},
        )
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert text == processor.tokenizer.decode(expected[0, inputs["input_ids"].shape[1] :])
    assert handle.stats.layers[0].kept == 16
