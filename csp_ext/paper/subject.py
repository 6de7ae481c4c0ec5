"""The models and the data of a measurement: those of the package, or folders of the user's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from csp_ext.demo import checkpoint
from csp_ext.demo.console import UserError, require
from csp_ext.evaluation.benchmark import FRAME
from csp_ext.evaluation.checkpoint import EXAMINATION_SEED, load_eval_model
from csp_ext.evaluation.items import Dataset, Problem
from csp_ext.evaluation.milebench import read_datasets
from csp_ext.evaluation.settings import Settings
from csp_ext.evaluation.suite import write_suite
from csp_ext.evaluation.tasks import TASKS
from csp_ext.paper.request import Subject


def embedded(num_kv_heads: int = 4) -> Subject:
    """Return a model that comes with the package."""
    model, processor = load_eval_model(num_kv_heads=num_kv_heads)
    return Subject(f"evaluation model, {num_kv_heads} KV heads", model, processor)


def opened(folder: Path, device: str, dtype: str) -> Subject:
    """Return a checkpoint of the user's."""
    model, processor = checkpoint.load(folder, checkpoint.device_of(device), dtype)
    return Subject(folder.resolve().name, model, processor)


def with_room(settings: Settings, subjects: Sequence[Subject]) -> Settings:
    """Return settings that cut contexts so that every model has positions left for the answer."""
    texts = [subject.model.config.get_text_config(decoder=True) for subject in subjects]
    room = [most for text in texts if (most := getattr(text, "max_position_embeddings", None)) is not None]
    if settings.context_len is not None or not room:
        return settings
    most = min(room)
    return replace(settings, context_len=max(most // 2, most - settings.max_new_tokens - FRAME))


@contextmanager
def asked(
    root: Path | None, names: Sequence[str], count: int | None, seeds: Sequence[int]
) -> Iterator[tuple[dict[int, list[Dataset]], list[Problem]]]:
    """Give the data sets of each seed, and what had to be left out of them.

    Parameters
    ----------
    root : Path or None
        A folder in MileBench's format; None: data of the generated world that no model was trained on, whose
        images are files that are gone afterwards.
    names : sequence of str
        Data sets or tasks; empty: all.
    count : int or None
        The first so many samples of each; None only of a folder: all.
    seeds : sequence of int
        Of generated data; a folder has one.
    """
    if root is not None:
        datasets, problems = read_datasets(root, names or None)
        if not datasets:
            raise UserError(f"no sample in {root} can be used; the first problem is {problems[0]}")
        if any(dataset.metric == "rouge_l" for dataset in datasets):
            require("eval", "rouge")
        cut = [replace(dataset, samples=dataset.samples[:count]) for dataset in datasets]
        yield {seeds[0]: cut}, problems
        return
    for name in names:
        if name not in TASKS:
            raise UserError(f"the generated suite has no task {name}; it has {', '.join(TASKS)}")
    tasks = list(names or TASKS)
    with tempfile.TemporaryDirectory(prefix="csp-paper-") as scratch:
        result = {}
        for seed in seeds:
            folder = Path(scratch) / str(seed)
            write_suite(folder, tasks=tasks, count=count or 1, seed=EXAMINATION_SEED + seed, mode="S")
            result[seed], _ = read_datasets(folder, tasks)
        yield result, []
