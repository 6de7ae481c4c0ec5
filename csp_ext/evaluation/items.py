"""What an evaluation asks: samples, the data sets they belong to, and what had to be left out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GROUPS = {
    "T-1": ("ActionLocalization", "ActionPrediction", "ActionSequence"),
    "T-2": ("ObjectExistence", "ObjectInteraction", "MovingAttribute", "ObjectShuffle"),
    "T-3": ("EgocentricNavigation", "MovingDirection"),
    "T-4": ("CounterfactualInference", "StateChange", "CharacterOrder", "SceneTransition"),
    "S-1": ("WebQA", "TQA", "MultiModalQA", "WikiVQA"),
    "S-2": ("SlideVQA", "OCR-VQA", "DocVQA"),
    "S-3": ("Spot-the-Diff", "CLEVR-Change", "IEdit"),
    "S-4": ("MMCoQA", "ALFRED"),
    "S-5": ("nuscenes",),
    "NH": ("TextNeedleInAHaystack", "ImageNeedleInAHaystack"),
    "IR": ("GPR1200",),
}
GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
# Where a context shows an image, counted from 1; tables are images too.
REFERENCE = re.compile(r"\{(?:image|table)#(\d{1,6})\}")
LEVELS = ("Few", "Medium", "Many")
FEW, MANY = 6, 31


@dataclass(frozen=True)
class Problem:
    """Something that was left out.

    Attributes
    ----------
    file : Path
        The annotation.
    sample_id : str or None
        None if it concerns the whole data set.
    reason : str
        One line.
    """

    file: Path
    sample_id: str | None
    reason: str

    def __str__(self) -> str:
        sample = "" if self.sample_id is None else f", sample {self.sample_id}"
        return f"{self.file}{sample}: {self.reason}"


@dataclass(frozen=True)
class Item:
    """One sample.

    Attributes
    ----------
    dataset : str
        Its data set's name.
    sample_id : str
        Unique within the data set.
    instruction, context : str
        The context refers to images as ``{image#1}`` or ``{table#1}``, counted from 1.
    choices : tuple of str
        Texts of the options; empty where there are none.
    images : tuple of Path
        What the model sees: the images, or with `combined` the images they were combined into.
    combined : bool
        Whether they were.
    level : str
        "Few", "Medium" or "Many" images before combining: fewer than 6, up to 31, more.
    response : str
        The right answer; for a multiple choice an option's text.
    question : str or None
        What the context ends with, if the data set says it.
    evidence : tuple of int
        Positions in the tokenised prompt of what the answer needs; empty if the data set does not say it.
    """

    dataset: str
    sample_id: str
    instruction: str
    context: str
    choices: tuple[str, ...]
    images: tuple[Path, ...]
    combined: bool
    level: str
    response: str
    question: str | None
    evidence: tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """The samples of a data set that can be used, at least one, in the order of the file."""

    name: str
    group: str
    metric: str
    samples: tuple[Item, ...]


@dataclass(frozen=True)
class Draft:
    """A sample to be written.

    Attributes
    ----------
    context, response : str
        As in :class:`Item`; the context refers to images as ``{image#1}``.
    images : sequence of PIL.Image.Image
        Written as PNG.
    choices, question, evidence
        As in :class:`Item`.
    """

    context: str
    response: str
    images: Sequence[Any] = ()
    choices: tuple[str, ...] = ()
    question: str | None = None
    evidence: tuple[int, ...] = ()


def level_of(images: int) -> str:
    """Return MileBench's name for a number of images."""
    few, medium, many = LEVELS
    return few if images < FEW else many if images > MANY else medium
