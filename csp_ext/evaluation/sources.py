"""Where the samples of a measurement come from: the generated suite, or a folder in MileBench's format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from csp_ext.demo.console import UserError, require
from csp_ext.evaluation.checkpoint import EXAMINATION_SEED
from csp_ext.evaluation.items import Dataset, Problem
from csp_ext.evaluation.milebench import read_datasets
from csp_ext.evaluation.settings import Settings
from csp_ext.evaluation.suite import write_suite
from csp_ext.evaluation.tasks import TASKS

# Tokens that a template may add around instruction and context.
FRAME = 96


def tasks_of(names: Sequence[str]) -> list[str]:
    """Return the tasks of the generated suite that are asked for; all where none is named."""
    for name in names:
        if name not in TASKS:
            raise UserError(f"the generated suite has no task {name}; it has {', '.join(TASKS)}")
    return list(names or TASKS)


def draw(root: Path, tasks: Sequence[str], count: int, seed: int) -> None:
    """Write `count` samples of each task, which no model was trained on, to a folder."""
    write_suite(root, tasks=tasks, count=count, seed=EXAMINATION_SEED + seed, mode="S")


def read(
    root: Path, names: Sequence[str], count: int | None, *, adversarial: bool = False, combined: int = 0
) -> tuple[list[Dataset], list[Problem]]:
    """Read the first `count` samples of each data set of a user's folder, and what is wrong with the others.

    Raises
    ------
    UserError
        If no sample can be used, or a package that the scores need is missing.
    """
    datasets, problems = read_datasets(root, names or None, adversarial=adversarial, combined=combined)
    if not datasets:
        raise UserError(f"no sample in {root} can be used; the first problem is {problems[0]}")
    if any(dataset.metric == "rouge_l" for dataset in datasets):
        require("eval", "rouge")
    return [replace(dataset, samples=dataset.samples[:count]) for dataset in datasets], problems


def with_room(settings: Settings, models: Sequence[Any]) -> Settings:
    """Return settings that cut contexts so that every model has positions left for the answer."""
    texts = [model.config.get_text_config(decoder=True) for model in models]
    room = [most for text in texts if (most := getattr(text, "max_position_embeddings", None)) is not None]
    if settings.context_len is not None or not room:
        return settings
    most = min(room)
    return replace(settings, context_len=max(most // 2, most - settings.max_new_tokens - FRAME))
