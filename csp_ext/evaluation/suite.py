"""The generated world's questions as data sets in MileBench's format."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from csp_ext.evaluation.items import Draft
from csp_ext.evaluation.milebench import write_dataset
from csp_ext.evaluation.tasks import TASKS, Sample, make_samples

# What an answer needs; tasks of a group are averaged.
GROUP_OF_TASK = {
    "code": "text",
    "photo": "image",
    "photo_photo": "image",
    "pin": "turn",
    "photo_code": "cross",
    "code_photo": "cross",
    "triple": "cross",
    "link_photo": "hop",
    "link_code": "hop",
}


def write_suite(root: Path, *, tasks: Iterable[str], count: int, seed: int, mode: str) -> list[Path]:
    """Write one data set per task, named after it, with images in PNG.

    Parameters
    ----------
    root : Path
        Created if need be.
    tasks : iterable of str
        Keys of ``TASKS``.
    count : int
        Samples per task.
    seed : int
        The same seed gives the same samples.
    mode : str
        "S" or "A", see :func:`csp_ext.evaluation.make_samples`.

    Returns
    -------
    list of Path
        The annotations.

    Raises
    ------
    ValueError
        If a task or the mode is unknown, or `count` is not positive.
    UserError
        If a data set exists already or cannot be written.
    """
    tasks = list(dict.fromkeys(tasks))
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"tasks must be among {', '.join(TASKS)}, got {task!r}")
    return [
        write_dataset(
            root,
            task,
            map(_draft, make_samples(task, count, seed, mode=mode)),
            question_type="open-ended",
            metric="exact_match",
            group=GROUP_OF_TASK[task],
        )
        for task in tasks
    ]


def _draft(sample: Sample) -> Draft:
    number = itertools.count(1)
    return Draft(
        context=re.sub("<image>", lambda _: f"{{image#{next(number)}}}", sample.prompt),
        response=sample.answer,
        images=sample.images,
        question=sample.question,
        evidence=tuple(sample.evidence),
    )
