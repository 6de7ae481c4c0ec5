"""Loads the golden vectors: files made by executing the public release, described in their own README."""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from csp_ext.methods import Layer

GOLDEN = Path(
    os.environ.get("CSP_GOLDEN") or Path(__file__).resolve().parents[1].parent / "shared" / "golden"
)

CASES = [
    "p1_text_window",
    "p2_mixed_window",
    "p3_mostly_image_window",
    "p4_no_image",
    "p5_all_image",
    "p6_image_window",
    "p7_text_window_h8",
    "p8_few_text",
    "pe1_cross_ratio_zero",
    "pe2_cross_ratio_one",
    "pe3_too_short",
    "pe4_budget_over_one",
    "pe5_unequal_ratios",
    "pe6_bias_two_empty",
]
PROPOSAL_CASES = CASES[:8]

needs_golden = pytest.mark.skipif(
    not (GOLDEN / "README.md").is_file(),
    reason=f"NO GOLDEN VECTORS in {GOLDEN}: set CSP_GOLDEN to their folder",
)


@dataclass(frozen=True)
class Case:
    """One golden file: tensors as stored, metadata as numbers."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def query(self) -> Tensor:
        return self.tensors["q"].float()  # [1, H, L, D]

    @property
    def key(self) -> Tensor:
        return self.tensors["k"].float()

    @property
    def value(self) -> Tensor:
        return self.tensors["v"].float()

    @property
    def layer(self) -> Layer:
        """The case as a method sees it: the only layer, all of its queries."""
        return Layer(self.query, self.key, self.value, self.modality, 0, 1, None, True)

    @property
    def modality(self) -> Tensor:
        return self.tensors["is_image"][None].to(torch.int8)  # [1, L]

    @property
    def length(self) -> int:
        return int(self.metadata["L"])

    @property
    def hh(self) -> int:
        return int(self.metadata["hh_size"])

    @property
    def recent(self) -> int:
        return int(self.metadata["recent_size"])

    @property
    def ratios(self) -> tuple[float, float]:
        return float(self.metadata["hh_ratio"]), float(self.metadata["recent_ratio"])

    @property
    def combos(self) -> dict[str, dict]:
        return json.loads(self.metadata["combos"])


def parse_tag(tag: str) -> tuple[float, float]:
    """Return cross_ratio and kv_recent_bias of a tag such as ``csp.cr0.5_kb1.5``."""
    ratio, bias = tag.removeprefix("csp.cr").split("_kb")
    return float(ratio), float(bias)


@functools.cache
def load(name: str) -> Case:
    """Read one golden file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return Case(name, tensors, dict(file.metadata() or {}))
