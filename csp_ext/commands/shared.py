"""What the commands share: options, errors in one line, budgets, progress bars."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from csp_ext.demo.console import UserError

Protocol = Annotated[
    str, typer.Option(help="aware: methods see the question; agnostic: they prune before it comes.")
]
Template = Annotated[str, typer.Option(help="plain, milebench or chat.")]
ContextLen = Annotated[
    int | None,
    typer.Option(help="Cut longer contexts to so many tokens; default: what the model has room for."),
]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens to generate per answer.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, float16 or bfloat16.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and no progress bars.")]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a mistake of the user's into one line on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        typer.echo(f"csp: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None


def parse_budget(text: str) -> int | float:
    """Return the budget a user wrote: "0.2" and "20%" are shares, "300" is a number of tokens."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        return float(text) if any(mark in text for mark in ".en") else int(text)
    except ValueError:
        wanted = "a share such as 0.2 or a number of tokens such as 300"
        raise UserError(f"budget must be {wanted}, got {text!r}") from None


def progress_bars(hidden: bool) -> Progress:
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
