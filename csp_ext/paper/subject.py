"""The models and the data of a measurement: those of the package, or folders of the user's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from csp_ext.demo import checkpoint
from csp_ext.evaluation import sources
from csp_ext.evaluation.checkpoint import load_eval_model
from csp_ext.evaluation.items import Dataset, Problem
from csp_ext.evaluation.milebench import read_datasets
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
        datasets, problems = sources.read(root, names, count)
        yield {seeds[0]: datasets}, problems
        return
    tasks = sources.tasks_of(names)
    with tempfile.TemporaryDirectory(prefix="csp-paper-") as scratch:
        result = {}
        for seed in seeds:
            folder = Path(scratch) / str(seed)
            sources.draw(folder, tasks, count or 1, seed)
            result[seed], _ = read_datasets(folder, tasks)
        yield result, []
