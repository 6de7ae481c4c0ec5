"""One sitting of ``csp train-eval-model``: progress, a log, the state on disk, the model at the end."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from csp_ext.demo.console import UserError, replacing
from csp_ext.evaluation.checkpoint import publish, require_room
from csp_ext.evaluation.tasks import TASKS
from csp_ext.evaluation.train import STATE, Plan, Trainer

LOG = "training.jsonl"
SAVE_EVERY_S = 60.0
LOG_EVERY = 20


def train(
    plan: Plan,
    out: Path,
    *,
    minutes: float | None = None,
    resume: bool = False,
    threads: int = 1,
    samples: int = 64,
    console: Console | None = None,
) -> dict[str, dict[str, float]]:
    """Train the evaluation model, or go on training it, and write it.

    Parameters
    ----------
    plan : Plan
        What to train.
    out : Path
        Folder of the finished model; holds the state of the run until then.
    minutes : float, optional
        Wall-clock time to squeeze the run into.
    resume : bool
        Whether to go on from the state in `out`.
    threads : int
        Of torch.
    samples : int
        Per task and mode, for the examination at the end.
    console : rich.console.Console, optional
        Where progress goes; stderr by default.

    Returns
    -------
    dict
        Exact match per task and mode.
    """
    require_room(out)
    if not resume and (out / STATE).exists():
        raise UserError(f"{out} holds an interrupted training; go on with --resume, or name another folder")
    torch.set_num_threads(threads)
    trainer = Trainer(plan, minutes)
    if resume:
        trainer.load(out)
    _forget_after(out / LOG, trainer.progress.step)
    console = console or Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bars:
        if not resume:
            captions = bars.add_task("captions", total=plan.caption_steps)
            trainer.align(
                lambda loss: bars.update(captions, advance=1, description=f"captions, loss {loss:.2f}")
            )
            trainer.save(out)
        now = trainer.progress
        questions = bars.add_task("questions", total=plan.steps, completed=now.step)
        saved = time.perf_counter()
        while trainer.share < 1:
            trainer.step()
            bars.update(questions, completed=now.step, description=_short(trainer))
            if now.step % LOG_EVERY == 0 or trainer.share >= 1:
                with (out / LOG).open("a") as log:
                    log.write(json.dumps(asdict(now)) + "\n")
                bars.console.print(_long(trainer), highlight=False, soft_wrap=True)
            if time.perf_counter() - saved > SAVE_EVERY_S:
                trainer.save(out)
                saved = time.perf_counter()
        trainer.save(out)
        exams = bars.add_task("examination", total=len(TASKS))
        scores = publish(
            trainer,
            out,
            samples,
            lambda task: bars.update(exams, advance=1, description=f"examination, {task}"),
        )
    (out / STATE).unlink()
    return scores


def _forget_after(log: Path, step: int) -> None:
    """Drop the lines of steps that the state on disk has not seen, or of another run."""
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with replacing(log) as path:
        path.write_text("".join(kept))


def _short(trainer: Trainer) -> str:
    return f"{trainer.progress.photos} photos, loss {trainer.progress.loss:.3f}"


def _long(trainer: Trainer) -> str:
    now = trainer.progress
    tasks = " ".join(f"{task} {exact:.2f}" for task, exact in now.exact.items())
    lse = "/".join(f"{value:.1f}" for value in now.lse)
    return (
        f"{now.step:5d} {now.seconds:6.0f} s  {now.photos:2d} photos  loss {now.loss:.3f}  lse {lse}  {tasks}"
    )
