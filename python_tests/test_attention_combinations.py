"""A decode step of every kind of attention over every kind of pruned cache, head to head with float64."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from attention_combinations import (
    ATTENTIONS,
    BATCHES,
    BUDGET,
    DECODE_N,
    HEADS,
    Combination,
    Step,
    run,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
BENCH = Path(__file__).parent.parent / "bench"
STORES = tuple(itertools.product((HEADS, HEADS // 2), (False, True)))  # KV heads, static cache


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Import a module of the bench folder."""
    monkeypatch.syspath_prepend(str(BENCH))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)
    for module in [m for m in sys.modules.values() if str(BENCH) in str(getattr(m, "__file__", ""))]:
        del sys.modules[module.__name__]


def allowed(combination: Combination, step: Step) -> float:
    """Return how far a step may be off, relative to the largest value."""
    if combination.dtype == torch.float64:
        # The eager softmax of transformers is float32.
        return 1e-6 if combination.attention == "eager" else 1e-14
    if combination.dtype == torch.float32:
        return 1e-6
    # Roundings of bfloat16, 2^-8 each, in units of the largest value; everything else is float32.
    roundings = 2.0  # of the output, before and after its correction for n
    if not step.decoded:
        roundings = 3.0  # of the weights before they meet the values, of log n, and of the output
    if combination.attention == "eager":
        # The logits are bfloat16, too: each is off by its own rounding, and so is the mean of them all.
        roundings += 2 * step.largest_logit
    return roundings * 2**-8 + 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_equals_the_masked_full_cache_in_float64(attention: str, batch: str, dtype: torch.dtype) -> None:
    for decode_n, (kv_heads, static) in itertools.product(DECODE_N, STORES):
        combination = Combination(attention, decode_n, kv_heads, batch, static, dtype)
        for step in run(combination):
            limit = allowed(combination, step)
            assert step.error <= limit, (
                f"{combination}, {step.queries} queries: {step.error:.1e} > {limit:.1e}"
            )
            ours = attention in ("csp", "flash_attention_2") and step.queries <= 8
            assert step.decoded == (ours and (static or batch != "within the budget"))


def test_the_batches_are_what_they_are_called() -> None:
    cases = {batch: Combination("sdpa", 0.0, HEADS, batch, False, torch.float64) for batch in BATCHES}
    kept = {batch: run(case)[0].kept for batch, case in cases.items()}
    assert (kept["plain"] == BUDGET).all()
    for batch in ("left padding", "padding inside"):
        assert kept[batch][:, 0].tolist() == [BUDGET, BUDGET, 9]
    assert (kept["within the budget"] > BUDGET).any()
    assert any(row.unique().numel() > 1 for row in kept["heads of different lengths"])


def test_a_wrong_constant_or_a_key_too_many_would_show() -> None:
    right = Combination("sdpa", 1.0, 2, "left padding", False, torch.float64)
    steps = run(right)
    for wrong in (
        replace(right, decode_n=0.0),
        replace(right, decode_n=2.5),
        replace(right, batch=BATCHES[4]),
    ):
        for step, other in zip(steps, run(wrong), strict=True):
            assert (step.expected - other.output).abs().max() > 1e-2 * step.largest_value


def test_the_page_of_the_benchmark(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = load("attention_accuracy")
    few = [Combination(attention, 1.0, 2, "plain", True, torch.float32) for attention in ATTENTIONS]
    monkeypatch.setattr(bench, "combinations", lambda _dtypes: few)
    bench.main(seeds=1, folder=tmp_path)
    page = (tmp_path / "attention_accuracy.md").read_text()
    for case in few:
        steps = run(case)
        worst = max(step.error for step in steps)
        assert f"| {case.attention}, n = 1 | 0.0e+00 | {worst:.1e} |" in page
        by_count = " | ".join(f"0.0e+00 | {step.error:.1e}" for step in steps)
        assert f"| {case.attention} | {by_count} |" in page
