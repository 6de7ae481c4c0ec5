"""Data sets in MileBench's format on disk.

::

    <root>/<Dataset>/<Dataset>.json                 annotation
    <root>/<Dataset>/<Dataset>-adv.json             the same samples, adversarial
    <root>/<Dataset>/<Dataset>_combined_<N>.json    the same samples with their images combined into N > 1
    <root>/<Dataset>/images/                        images, also in folders of their own
    <root>/<Dataset>/combined_<N>_images/           combined images; for N = 1 the first annotation names them

An annotation is ``{"meta_data": {...}, "data": [...]}``. Four fields of ours go beyond MileBench; data
sets that we write have them:

``meta_data.metric``
    One of ``csp_ext.evaluation.metrics.METRICS``, instead of the one that name and question type imply.
``meta_data.group``
    What the data set is averaged with; MileBench's own data sets have fixed groups.
``task_instance.question``
    What the context ends with: the question proper, for protocols that prune before they show it.
``task_instance.evidence``
    Positions in the tokenised prompt, images expanded, of the tokens that the answer needs.

Whatever is wrong with a data set or a sample becomes a :class:`Problem`; all others are read.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from csp_ext.demo.console import UserError, first_line, replacing
from csp_ext.evaluation.items import GROUP_OF, REFERENCE, Dataset, Draft, Item, Problem, level_of
from csp_ext.evaluation.metrics import metric_for, normalise


def read_datasets(
    root: Path, names: Sequence[str] | None = None, *, adversarial: bool = False, combined: int = 0
) -> tuple[list[Dataset], list[Problem]]:
    """Read data sets.

    Parameters
    ----------
    root : Path
        Holds one folder per data set.
    names : sequence of str, optional
        Which to read, in this order; all by default, in the order of their names.
    adversarial : bool
        Whether to read the adversarial annotations.
    combined : int
        Into how many images those of a sample were combined; 0 reads them one by one.

    Returns
    -------
    datasets : list of Dataset
        Those with a sample that can be used.
    problems : list of Problem
        All that was left out.

    Raises
    ------
    UserError
        If `root` has no data set, or none of a given name.
    ValueError
        If `combined` is negative, or comes with `adversarial`.
    """
    if combined < 0 or (combined and adversarial):
        raise ValueError(f"combined must be at least 0, and 0 with adversarial, got {combined}")
    if not root.is_dir():
        raise UserError(f"{root} is not a folder")
    present = sorted(path.name for path in root.iterdir() if _holds_annotation(path))
    if not present:
        raise UserError(f"{root} holds no data set: there is no <Dataset>/<Dataset>.json in it")
    for name in names or ():
        if name not in present:
            raise UserError(f"{root} holds no data set {name}; it has {', '.join(present)}")
    suffix = "-adv" if adversarial else f"_combined_{combined}" if combined > 1 else ""
    datasets: list[Dataset] = []
    problems: list[Problem] = []
    for name in dict.fromkeys(present if names is None else names):
        file = root / name / f"{name}{suffix}.json"
        try:
            dataset = _read(file, name, combined, problems)
        except _Unusable as error:
            problems.append(Problem(file, None, str(error)))
        else:
            datasets.append(dataset)
    return datasets, problems


class _Unusable(Exception):
    """Why a data set or a sample cannot be used."""


def _holds_annotation(folder: Path) -> bool:
    return any(file.name.startswith(folder.name) for file in folder.glob("*.json"))


def _read(file: Path, name: str, combined: int, problems: list[Problem]) -> Dataset:
    try:
        annotation = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise _Unusable(f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"is not JSON: {first_line(error)}") from error
    meta = _field(annotation, "meta_data", dict)
    instructions = _texts(meta, "task_instruction")
    try:
        metric = metric_for(name, _field(meta, "question_type", str), _optional(meta, "metric", str))
    except ValueError as error:
        raise _Unusable(str(error)) from error
    group = GROUP_OF.get(name) or _optional(meta, "group", str) or name
    records = _field(annotation, "data", list)
    samples: dict[str, Item] = {}
    for at, record in enumerate(records):
        sample_id = None
        try:
            sample_id = str(_field(record, "sample_id", (int, str)))
            if sample_id in samples:
                raise _Unusable("has the id of an earlier sample")
            samples[sample_id] = _item(file, name, metric, instructions, combined, sample_id, record)
        except _Unusable as error:
            reason = str(error) if sample_id is not None else f"data[{at}]: {error}"
            problems.append(Problem(file, sample_id, reason))
    if not samples:
        raise _Unusable("holds no samples" if not records else "none of its samples can be used")
    return Dataset(name, group, metric, tuple(samples.values()))


def _item(
    file: Path, name: str, metric: str, instructions: list[str], combined: int, sample_id: str, record: Any
) -> Item:
    wording = _field(record, "task_instruction_id", int)
    if not 0 <= wording < len(instructions):
        raise _Unusable(f"task_instruction_id is {wording}, but there are {len(instructions)} instructions")
    task = _field(record, "task_instance", dict)
    context = _field(task, "context", str)
    choices = _texts(task, "choice_list") if "choice_list" in task else []
    response = str(_field(record, "response", (str, int, float)))
    if not response.strip():
        raise _Unusable("the response is empty")
    if metric == "multiple_choice" and normalise(response) not in map(normalise, choices):
        raise _Unusable(f"the response {reprlib.repr(response)} is not among the {len(choices)} choices")
    try:
        "".join((instructions[wording], context, *choices, response)).encode()
    except UnicodeEncodeError as error:
        raise _Unusable("a text holds half a surrogate pair") from error
    single = _texts(task, "images_path")
    for number in REFERENCE.findall("".join((context, *choices))):
        if not 1 <= int(number) <= len(single):
            raise _Unusable(f"the text refers to image {number} of {len(single)}")
    folder, paths = "images", single
    if combined:
        folder = f"combined_{combined}_images"
        paths = _texts(task, folder)
    images = tuple(file.parent / folder / path for path in paths)
    for image in images:
        if not os.path.isfile(image):  # Path.is_file raises where a name is too long
            raise _Unusable(f"there is no image {image}")
    question = _optional(task, "question", str)
    if question is not None and not context.endswith(question):
        raise _Unusable(f"the context does not end with the question {reprlib.repr(question)}")
    evidence = _optional(task, "evidence", list) or []
    if not all(isinstance(position, int) for position in evidence):
        raise _Unusable("evidence must be a list of integers")
    return Item(
        dataset=name,
        sample_id=sample_id,
        instruction=instructions[wording],
        context=context,
        choices=tuple(choices),
        images=images,
        combined=combined > 0,
        level=level_of(len(single)),
        response=response,
        question=question,
        evidence=tuple(evidence),
    )


KINDS = {dict: "an object", list: "a list", str: "a text", int: "an integer", float: "a number"}


def _field(record: Any, key: str, kinds: type | tuple[type, ...]) -> Any:
    """Return a field of a JSON object, which must have one of these types."""
    if not isinstance(record, dict):
        raise _Unusable(f"an object with {key} is wanted, not {reprlib.repr(record)}")
    if key not in record:
        raise _Unusable(f"{key} is missing")
    value = record[key]
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(KINDS[kind] for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise _Unusable(f"{key} must be {wanted}, got {reprlib.repr(value)}")
    return value


def _optional(record: dict[str, Any], key: str, kind: type) -> Any:
    return _field(record, key, kind) if record.get(key) is not None else None


def _texts(record: Any, key: str) -> list[str]:
    """Return a list of texts; numbers among them are texts too."""
    values = _field(record, key, list)
    if not all(isinstance(value, (str, int, float)) for value in values):
        raise _Unusable(f"{key} must be a list of texts, got {reprlib.repr(values)}")
    return [str(value) for value in values]


def write_dataset(
    root: Path,
    name: str,
    drafts: Iterable[Draft],
    *,
    question_type: str,
    instruction: str = "",
    metric: str | None = None,
    group: str | None = None,
) -> Path:
    """Write a data set that :func:`read_datasets` and MileBench's own tools read.

    Parameters
    ----------
    root : Path
        Created if need be.
    name : str
        Of the data set and its folder.
    drafts : iterable of Draft
        In the order of their ids, 0, 1 and so on.
    question_type : str
        "multi-choice" or "open-ended".
    instruction : str
        What every prompt begins with.
    metric, group : str, optional
        The fields of ours.

    Returns
    -------
    Path
        The annotation, written last.

    Raises
    ------
    UserError
        If it exists already, or the folder cannot be written.
    """
    metric_for(name, question_type, metric)
    folder = root / name
    file = folder / f"{name}.json"
    if file.exists():
        raise UserError(f"{file} exists already; name another folder")
    try:
        data = [_written(folder, number, draft) for number, draft in enumerate(drafts)]
        folder.mkdir(parents=True, exist_ok=True)
        meta: dict[str, Any] = {"dataset": name, "split": "test", "num_sample": len(data)}
        meta |= {"question_type": question_type, "task_instruction": [instruction]}
        meta |= {key: value for key, value in (("metric", metric), ("group", group)) if value is not None}
        with replacing(file) as path:
            path.write_text(json.dumps({"meta_data": meta, "data": data}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    return file


def _written(folder: Path, number: int, draft: Draft) -> dict[str, Any]:
    """Write a sample's images and return its record."""
    paths = [f"{number:05d}/{index:03d}.png" for index in range(1, len(draft.images) + 1)]
    for path, image in zip(paths, draft.images, strict=True):
        target = folder / "images" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target)
    task: dict[str, Any] = {"context": draft.context, "images_path": paths}
    if draft.choices:
        task["choice_list"] = list(draft.choices)
    if draft.question is not None:
        task["question"] = draft.question
    if draft.evidence:
        task["evidence"] = list(draft.evidence)
    return {
        "sample_id": number,
        "task_instruction_id": 0,
        "task_instance": task,
        "response": draft.response,
        "image_quantity_level": level_of(len(paths)),
    }
