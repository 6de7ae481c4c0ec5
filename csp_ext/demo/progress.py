"""A comparison of runs with a progress bar for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.progress import Progress

if TYPE_CHECKING:
    from csp_ext.demo.prompts import Prompt
    from csp_ext.demo.run import Run


def compare(
    progress: Progress,
    model: Any,
    prompt: Prompt,
    runs: list[Run],
    new_tokens: int,
    repeats: int,
    warm_up: bool,
) -> list[str]:
    """Run :func:`csp_ext.demo.run.compare` with a bar per run."""
    from csp_ext.demo.run import compare

    total = new_tokens * repeats
    bars = {run.name: progress.add_task(f"generating, {run.name}", total=total) for run in runs}

    def advance(name: str) -> None:
        progress.advance(bars[name])

    notes = compare(model, prompt, runs, new_tokens, repeats=repeats, warm_up=warm_up, on_token=advance)
    for bar in bars.values():
        progress.update(bar, total=progress.tasks[bar].completed)
    return notes
