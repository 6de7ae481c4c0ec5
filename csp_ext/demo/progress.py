"""Progress bars of the commands, and silence from transformers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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


def bars(hidden: bool) -> Progress:
    """Return progress bars on stderr that vanish when done; a log file gets none."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=hidden or not console.is_terminal,
    )


def quiet() -> None:
    """Keep transformers' own bars and hints off the terminal; errors stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
