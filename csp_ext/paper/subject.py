"""The models and the data of a measurement: those of the package, or folders of the user's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from csp_ext.demo import checkpoint
from csp_ext.evaluation.checkpoint import EXAMINATION_SEED, load_eval_model
from csp_ext.evaluation.items import Dataset, Problem
from csp_ext.evaluation.milebench import read_datasets
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


@contextmanager
def generated(count: int, seeds: Sequence[int], tasks: Sequence[str]) -> Iterator[dict[int, list[Dataset]]]:
    """Give data sets of the generated world, `count` samples each, that no model was trained on.

    Their images are files, which are gone afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="csp-paper-") as root:
        result = {}
        for seed in seeds:
            folder = Path(root) / str(seed)
            names = tasks or list(TASKS)
            write_suite(folder, tasks=names, count=count, seed=EXAMINATION_SEED + seed, mode="S")
            result[seed], _ = read_datasets(folder, names)
        yield result


def stored(
    root: Path, names: Sequence[str], count: int | None
) -> tuple[dict[int, list[Dataset]], list[Problem]]:
    """Return the first `count` samples of each data set of a folder in MileBench's format."""
    datasets, problems = read_datasets(root, names or None)
    cut = [replace(dataset, samples=dataset.samples[:count]) for dataset in datasets]
    return {0: cut}, problems
