"""The numbers that the paper and its release give, to stand beside a measurement of the same data.

Scores are percentages of LLaVA-v1.5-7B at a cache of 20 %, from the paper's tables 1 and 2 and from the
released files ``outputs/*/<data set>/eval.json``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Table 1, the row of CSP.
TABLE_1_CSP = {
    "T-1": 39.9,
    "T-2": 46.8,
    "T-3": 32.5,
    "T-4": 41.6,
    "S-1": 57.5,
    "S-2": 34.1,
    "S-3": 13.7,
    "S-4": 27.8,
    "S-5": 61.0,
    "NH": 1.4,
    "IR": 6.3,
}
# Per data set: CSP (the run new_csp_v1), SnapKV, LOOK-M with text prior and pivotal merging.
RELEASED_METHODS = {"csp-release": 0, "snapkv-release": 1, "lookm-tp-release": 2}
RELEASED: dict[str, tuple[float | None, float | None, float | None]] = {
    "ActionLocalization": (23.50, 23.00, 23.00),
    "ActionPrediction": (52.50, 52.50, 52.50),
    "ActionSequence": (44.00, 44.00, 44.00),
    "ObjectExistence": (50.00, 50.00, 50.00),
    "ObjectInteraction": (49.00, 49.00, 49.00),
    "MovingAttribute": (49.00, 49.00, 49.00),
    "ObjectShuffle": (33.50, 33.50, 33.50),
    "EgocentricNavigation": (30.00, 30.00, 29.50),
    "MovingDirection": (33.00, 32.00, 32.50),
    "CounterfactualInference": (30.00, 30.00, 30.00),
    "StateChange": (None, None, 32.50),
    "CharacterOrder": (None, None, 30.00),
    "SceneTransition": (68.00, 67.50, 67.50),
    "WebQA": (58.50, 58.00, 57.50),
    "TQA": (40.50, 32.50, 40.00),
    "MultiModalQA": (66.00, 65.50, 66.50),
    "SlideVQA": (46.00, 46.00, 46.00),
    "OCR-VQA": (9.00, 8.50, 8.50),
    "DocVQA": (47.50, 45.50, 46.50),
    "Spot-the-Diff": (17.55, 15.96, 16.23),
    "CLEVR-Change": (19.05, 18.18, 18.33),
    "IEdit": (4.93, 4.81, 4.20),
    "MMCoQA": (None, None, 32.50),
    "ALFRED": (23.14, 19.46, 16.38),
    "nuscenes": (61.00, 61.50, 61.00),
    "TextNeedleInAHaystack": (None, None, 10.31),
    "ImageNeedleInAHaystack": (None, 0.00, None),
    "GPR1200": (None, 4.83, 4.00),
}


@dataclass(frozen=True)
class Cost:
    """One row of table 2: milliseconds per token and GiB of cache, on an RTX 4090."""

    milliseconds: float
    gib: float


TABLE_2 = {
    1.0: Cost(26.023, 1.571),
    0.6: Cost(24.377, 1.207),
    0.3: Cost(21.027, 0.523),
    0.2: Cost(19.736, 0.476),
    0.1: Cost(16.287, 0.208),
}


def released_mean(method: str, datasets: Iterable[str]) -> float | None:
    """Return the mean released score of a method, as a share; None unless every data set has one."""
    at = RELEASED_METHODS.get(method)
    scores = [None if at is None or name not in RELEASED else RELEASED[name][at] for name in datasets]
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) / 100 if known and len(known) == len(scores) else None
