"""What a table or figure is asked for, and what it gives."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csp_ext.evaluation.items import Dataset, Problem
from csp_ext.evaluation.settings import Settings

# Told how much is done, and of how much.
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes
    ----------
    name : str
        In tables.
    model, processor
        On the model's device, in evaluation mode.
    """

    name: str
    model: Any
    processor: Any

    def described(self) -> str:
        """Return name, kind and size in one line."""
        text = self.model.config.get_text_config(decoder=True)
        count = sum(parameter.numel() for parameter in self.model.parameters())
        heads = f"{text.num_attention_heads} heads, {text.num_key_value_heads} KV heads"
        dtype = str(self.model.dtype).removeprefix("torch.")
        return (
            f"{self.name} ({type(self.model).__name__}, {count:,} parameters, "
            f"{text.num_hidden_layers} layers, {heads}, {dtype}, {self.model.device})"
        )


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes
    ----------
    name : str
        Of the table or figure.
    subjects : tuple of Subject
        One, or several to compare.
    datasets : dict of sequence of Dataset
        Per seed.
    problems : tuple of Problem
        What could not be read of the data.
    settings : Settings
        How answers are generated.
    real : bool
        Whether the data is a folder in MileBench's format, and not generated.
    budgets : tuple of float
        Shares of the prompt.
    window : float, int or "question"
        Whose attention is looked at.
    quick : bool
        Whether fewer points, steps and samples will do.
    out : Path
        Folder of the results.
    command : tuple of str
        What repeats it.
    """

    name: str
    subjects: tuple[Subject, ...]
    datasets: Mapping[int, Sequence[Dataset]]
    problems: tuple[Problem, ...]
    settings: Settings
    real: bool
    budgets: tuple[float, ...]
    window: float | int | str
    quick: bool
    out: Path
    command: tuple[str, ...]

    def asked(self, used: int) -> str:
        """Return what the models were asked, in one line; `used` samples were usable."""
        sets = [dataset for of_seed in self.datasets.values() for dataset in of_seed]
        names = list(dict.fromkeys(dataset.name for dataset in sets))
        count = sum(len(dataset.samples) for dataset in sets)
        kind = "MileBench format" if self.real else "generated, mode S"
        seeds = ", ".join(map(str, self.datasets))
        amount = f"{used} sample" if used == 1 else f"{used} samples"
        if used < count:
            amount = f"{used} of {count} samples, the others unusable,"
        unread = f" Left out before: {len(self.problems)}, first {self.problems[0]}." if self.problems else ""
        return f"Data ({kind}): {amount} of {', '.join(names)}; seed {seeds}.{unread}"

    def repeated(self) -> list[str]:
        """Return the models, the versions and the command that repeats it, line by line."""
        return [
            f"Model: {'; '.join(subject.described() for subject in self.subjects)}.",
            f"Versions: {versions()}.",
            f"Repeat with: {shlex.join(self.command)}",
        ]


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes
    ----------
    title : str
        Of table and picture.
    headers, rows : sequences of str
        The table for people.
    records : sequence of dict
        The same in numbers, for the CSV file; all have the same keys.
    notes : sequence of str
        What the reader must know.
    draw : callable
        Writes the picture to a path.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    records: Sequence[Mapping[str, Any]]
    draw: Callable[[Path], None]
    notes: Sequence[str] = field(default=())


def versions() -> str:
    """Return the versions of what computes."""
    import torch
    import transformers

    import csp_ext

    parts = {"csp_ext": csp_ext.__version__, "torch": torch.__version__}
    parts |= {"transformers": transformers.__version__, "Python": platform.python_version()}
    return ", ".join(f"{name} {version}" for name, version in parts.items())


def percent(budget: float) -> str:
    """Return a share as people read it."""
    return f"{100 * budget:.4g} %"
