"""The finished evaluation model: its files, its examination and its card."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from csp_ext.demo.console import UserError, replacing
from csp_ext.evaluation.align import image_tokens
from csp_ext.evaluation.forward import Blocks, decode
from csp_ext.evaluation.processor import build_processor
from csp_ext.evaluation.tasks import ABOUT, SUITE_LAYOUT, TASKS, Sample, ask, make_samples
from csp_ext.evaluation.vocabulary import IMAGE
from csp_ext.evaluation.world import sample_contexts

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from csp_ext.evaluation.train import Trainer

WEIGHTS = "model.safetensors"
MODES = ("S", "A")
NEW_TOKENS = 24
# Seeds from here on are never trained on.
EXAMINATION_SEED = 1_000_000
LSE_SAMPLES = 16

CARD = """# The evaluation model of csp_ext

A LLaVA of {parameters} parameters that answers questions about many small images and the words between them,
well enough that what pruning costs can be seen. It knows nothing of the real world.

**Data.** Generated, see `world.py` and `tasks.py`: photos with a name, of a grid of cells that shows a number
and three coloured shapes; numbers told in text; numbers that the assistant gave in an earlier turn; links
that lead from a name to the photo or the text of another; fillers.
Every digit of an answer has one token of evidence. Seed {seed}; examined on other seeds.

**Training.** `{command}`:
{caption_steps} batches of captions for the vision tower ({caption_accuracy} of cells named rightly), then
{steps} batches of questions. {minutes} minutes of wall clock, {cpu_minutes} of CPU time; {hardware},
torch {torch}, float32.

**Accuracy.** Exact match of the whole answer with the full cache, through `generate()`, {samples} samples per
cell: {context}, {length} tokens
and the question. Mode S: the answer begins with words that need no context; mode A: with its first digit.

| task | what it needs | S | A |
|---|---|---|---|
{tasks}

**Attention logits.** Mean log-sum-exp of a row:

| layer | {heads} | mean |
|{ruler}
{lse}

**Weights.** float16, {bytes} bytes, SHA-256 `{digest}`.
"""


def checkpoint_folder(num_kv_heads: int = 4) -> Path:
    """Return where the package keeps a trained model."""
    return Path(__file__).parent / ("checkpoint" if num_kv_heads == 4 else f"checkpoint_gqa{num_kv_heads}")


def load_eval_model(
    *, num_kv_heads: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the trained model that comes with the package.

    Parameters
    ----------
    num_kv_heads : int
        Which of the trained models.
    dtype : torch.dtype
        Of the weights in memory; on disk they are float16.

    Returns
    -------
    model : LlavaForConditionalGeneration
        In evaluation mode.
    processor : LlavaProcessor
        Takes prompts of :func:`csp_ext.evaluation.make_samples` and their images.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = checkpoint_folder(num_kv_heads)
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"the package has no trained model with num_kv_heads={num_kv_heads}")
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, local_files_only=True, dtype=dtype)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


@torch.inference_mode()
def answers(model: Any, processor: Any, samples: list[Sample], batch: int = 16) -> list[str]:
    """Return what the model generates for each sample, greedily, over the full cache."""
    texts: list[str] = []
    for at in range(0, len(samples), batch):
        part = samples[at : at + batch]
        inputs = processor(
            text=[sample.prompt for sample in part],
            images=[image for sample in part for image in sample.images],
            return_tensors="pt",
            padding=True,
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def exact_match(model: Any, processor: Any, task: str, mode: str, count: int, seed: int) -> float:
    """Return the share of fresh samples that the model answers without a mistake."""
    samples = make_samples(task, count, EXAMINATION_SEED + seed, mode=mode)
    given = answers(model, processor, samples)
    return float(np.mean([text == sample.answer for text, sample in zip(given, samples, strict=True)]))


@torch.inference_mode()
def row_lse(model: Any, seed: int) -> list[list[float]]:
    """Return per layer and head the mean log-sum-exp of the attention logits, over rows of fresh prompts."""
    rng = np.random.default_rng([EXAMINATION_SEED + seed, 99])
    contexts = sample_contexts(rng, SUITE_LAYOUT, LSE_SAMPLES)
    questions = [ask(rng, contexts, task) for task in TASKS]
    tokens = torch.from_numpy(np.concatenate([contexts.tokens, *(q.tokens for q in questions)], 1))
    decoder = model.model.language_model
    shown = image_tokens(model.model, contexts.pixels.reshape(-1, *contexts.pixels.shape[2:]))
    embedded = decoder.embed_tokens(tokens).masked_scatter((tokens == IMAGE)[..., None], shown)
    blocks = Blocks(contexts.layout.length, tuple(q.tokens.shape[1] for q in questions))
    _, lse = decode(decoder, embedded, blocks, torch.arange(blocks.length))
    return [layer.mean((0, 2)).tolist() for layer in lse]


def publish(
    trainer: Trainer, folder: Path, count: int, report: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    """Write the model as others load it, examine what was written, and write the card.

    Parameters
    ----------
    trainer : Trainer
        A finished run.
    folder : Path
        Gets weights in float16, configuration, tokenizer, image processor and ``README.md``.
    count : int
        Samples per task and mode.
    report : callable
        Gets the name of each examination before it starts.

    Returns
    -------
    dict
        Exact match per task and mode.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: weight.half() for name, weight in trainer.model.state_dict().items()}
    trainer.model.save_pretrained(folder, state_dict=state)
    build_processor().save_pretrained(folder)
    # safetensors makes its file private.
    (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode & 0o777)
    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    scores: dict[str, dict[str, float]] = {}
    for task in TASKS:
        report(task)
        scores[task] = {
            mode: exact_match(model, processor, task, mode, count, trainer.plan.seed) for mode in MODES
        }
    card = _card(trainer, folder, scores, row_lse(model, trainer.plan.seed), count)
    with replacing(folder / "README.md") as path:
        path.write_text(card)
    return scores


def _card(
    trainer: Trainer, folder: Path, scores: dict[str, dict[str, float]], lse: list[list[float]], count: int
) -> str:
    plan, progress = trainer.plan, trainer.progress
    weights = folder / WEIGHTS
    size = SUITE_LAYOUT
    facts = {
        "parameters": f"{sum(parameter.numel() for parameter in trainer.model.parameters()):,}",
        "command": f"csp train-eval-model --seed {plan.seed} --num-kv-heads {plan.num_kv_heads}",
        "seed": plan.seed,
        "caption_steps": plan.caption_steps,
        "caption_accuracy": f"{100 * progress.caption_accuracy:.1f} %",
        "steps": progress.step,
        "minutes": f"{progress.seconds / 60:.0f}",
        "cpu_minutes": f"{progress.cpu_seconds / 60:.0f}",
        "hardware": f"{torch.get_num_threads()} threads, {os.cpu_count()} shared {platform.machine()} cores",
        "torch": torch.__version__,
        "samples": count,
        "context": f"{size.photos} images, {size.codes} texts, {size.pins} answers, {size.links} links, "
        f"{size.fillers} fillers",
        "length": size.length,
        "tasks": "\n".join(
            f"| `{task}` | {ABOUT[task]} | {modes['S']:.3f} | {modes['A']:.3f} |"
            for task, modes in scores.items()
        ),
        "heads": " | ".join(f"head {head}" for head in range(len(lse[0]))),
        "ruler": "---|" * (len(lse[0]) + 2),
        "lse": "\n".join(
            f"| {layer} | {' | '.join(f'{value:.1f}' for value in values)} | {np.mean(values):.1f} |"
            for layer, values in enumerate(lse)
        ),
        "bytes": f"{weights.stat().st_size:,}",
        "digest": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    return CARD.format(**facts)


def require_room(folder: Path) -> None:
    """Check that a model can be written to `folder`.

    Raises
    ------
    UserError
        If it is a file or cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be created: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} is not writable")
