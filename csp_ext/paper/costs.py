"""Table 2: the time of a decode step and the size of the cache, by budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from csp_ext.analysis.plots import Line, Panel, draw_panels
from csp_ext.demo.console import UserError
from csp_ext.demo.report import size
from csp_ext.evaluation.encoding import Encoder, Ready
from csp_ext.evaluation.tasks import make_samples
from csp_ext.paper import published
from csp_ext.paper.latency import Latency, measure, turns
from csp_ext.paper.request import Finding, Request, Subject, Tell, percent

# The paper's data set, and about the length of its prompts.
DATASET = "ALFRED"
CONTEXTS = 9
STEPS, WARM_UP = 256, 100
QUICK_STEPS, QUICK_WARM_UP = 48, 16


def table2(request: Request, tell: Tell) -> Finding:
    """Return milliseconds per token and bytes of cache of every budget."""
    (subject,) = request.subjects
    inputs, source = _from_data(request, subject) if request.real else _generated(request, subject)
    steps, warm_up = (QUICK_STEPS, QUICK_WARM_UP) if request.quick else (STEPS, WARM_UP)
    done, total = 0, turns(request.budgets, steps, warm_up)

    def advance() -> None:
        nonlocal done
        done += 1
        tell(done, total)

    found = measure(subject.model, inputs, request.budgets, steps=steps, warm_up=warm_up, progress=advance)
    beside = request.real and all(row.budget in published.TABLE_2 for row in found.rows)
    full = next((row for row in found.rows if row.budget == 1.0), None)
    rows, numbers = [], []
    for row in found.rows:
        low, high = row.quartiles_s
        cells = [
            percent(row.budget),
            f"{1e3 * row.median_s:.3f}",
            f"{1e3 * low:.3f} to {1e3 * high:.3f}",
            "-" if full is None else f"{row.median_s / full.median_s:.1%}",
            size(row.prompt_bytes),
            "-" if full is None else f"{row.prompt_bytes / full.prompt_bytes:.1%}",
            f"{1e3 * row.prune_s:.2f}" if row.prune_s else "-",
        ]
        if beside:
            paper = published.TABLE_2[row.budget]
            cells += [f"{paper.milliseconds:.3f}", f"{paper.gib:.3f} GiB"]
        rows.append(cells)
        numbers.append(
            {
                "budget": row.budget,
                "ms_per_token": 1e3 * row.median_s,
                "ms_quartile_1": 1e3 * low,
                "ms_quartile_3": 1e3 * high,
                "prompt_cache_bytes": row.prompt_bytes,
                "final_cache_bytes": row.final_bytes,
                "prune_ms": 1e3 * row.prune_s,
                "prefill_ms": 1e3 * found.prefill_s,
                "prompt_tokens": found.tokens,
                "steps": len(row.step_s),
            }
        )
    head = ["budget", "ms/token", "quartiles", "of full", "cache", "of full", "prune, ms"]
    if beside:
        head += ["paper, ms", "paper, cache"]
    title = "Time per token and cache by budget"
    caption = f"{subject.name}, {found.tokens} prompt tokens; median and quartiles of {steps} steps."

    def draw(path: Path) -> None:
        draw_panels(_panels(found), path, title, caption)

    notes = _notes(found, source, steps, warm_up, request.real, beside)
    return Finding(title, head, rows, numbers, draw, notes)


def _panels(found: Latency) -> list[Panel]:
    shares = [100 * row.budget for row in found.rows]
    times = [1e3 * row.median_s for row in found.rows]
    low, high = ([1e3 * row.quartiles_s[at] for row in found.rows] for at in (0, 1))
    mebibytes = [row.prompt_bytes / 2**20 for row in found.rows]
    budget = "budget, %"
    return [
        Panel("decode", budget, "ms per token", [Line("csp", shares, times, low, high)], shares, True),
        Panel("prompt's cache", budget, "MiB", [Line("csp", shares, mebibytes)], shares, True),
    ]


def _notes(found: Latency, source: str, steps: int, warm_up: int, real: bool, beside: bool) -> list[str]:
    threads = torch.get_num_threads()
    notes = [
        f"Prompt: {source}, {found.tokens} tokens, {found.image_tokens} of them image; one row.",
        f"ms/token: the median of {steps} steps after {warm_up} for warming up, budgets taking turns; a step "
        "is the forward of one token over the cache and the choice of the next; its key and value are added. "
        f"{threads} thread{'s' if threads > 1 else ''} of torch.",
        f"prefill: {1e3 * found.prefill_s:.1f} ms for all budgets; prune: to score, select and compact, once "
        "per prompt. cache: keys and values of the prompt as stored, before any generated token.",
    ]
    if beside:
        notes.append(
            "paper: LLaVA-1.5-7B on an RTX 4090, ALFRED, warm-up of 100. Its caches fit a prompt of about "
            "3100 tokens in half precision at 100, 30 and 10 %, but not at 60 and 20 %."
        )
    elif real:
        notes.append("The paper has numbers at 100, 60, 30, 20 and 10 % only.")
    else:
        notes.append(
            "The paper's numbers are not beside these: they are of LLaVA-1.5-7B, whose cache is 1.571 GiB, "
            "on an RTX 4090. What can be compared is the share of the full cache."
        )
    return notes


def _generated(request: Request, subject: Subject) -> tuple[dict[str, Any], str]:
    """Return a prompt about as long as the paper's: several contexts in a row, and a question."""
    samples = make_samples("photo_code", CONTEXTS, min(request.datasets))
    text = " ".join([*(sample.context for sample in samples), samples[-1].question])
    images = [image for sample in samples for image in sample.images]
    inputs = dict(subject.processor(text=text, images=images, return_tensors="pt"))
    inputs = {name: value.to(subject.model.device) for name, value in inputs.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(subject.model.dtype)
    return inputs, f"{CONTEXTS} generated contexts in a row with {len(images)} images"


def _from_data(request: Request, subject: Subject) -> tuple[dict[str, Any], str]:
    """Return the first sample that can be used, of the paper's data set where it is there."""
    settings = request.settings
    encoder = Encoder(subject.model, subject.processor, settings.template, settings.context_len)
    datasets = [dataset for of_seed in request.datasets.values() for dataset in of_seed]
    datasets.sort(key=lambda dataset: dataset.name != DATASET)
    reason = "there is none"
    for dataset in datasets:
        for item in dataset.samples:
            ready = encoder.prepare(item)
            if not isinstance(ready, Ready):
                reason = str(ready)
                continue
            usable, inputs, problems = encoder.encode([ready])
            if usable:
                return inputs, f"sample {item.sample_id} of {dataset.name}"
            reason = str(problems[0])
    raise UserError(f"no sample can be used: {reason}")
