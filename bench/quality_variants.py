"""Which ideas beyond the default win on the evaluation model: every one of them on the same questions.

python bench/quality_variants.py [--samples 64] [--seed 500] [--only ac] [--quick]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from pages import Facts, keep
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from variants.catalogue import FULL, IDEAS, variants
from variants.report import Outcome, explanation, tables, write_csv
from variants.trial import Trial

import csp_ext
from csp_ext.evaluation import TASKS, load_eval_model, make_samples

HERE = Path(__file__).parent
BUDGETS = (0.05, 0.1, 0.2, 0.4)
QUICK_BUDGETS = (0.1, 0.2)
QUICK_SAMPLES = 8
BATCH = 16


def main(
    samples: Annotated[int, typer.Option(min=2, help="Questions per task.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of the questions.")] = 500,
    only: Annotated[str, typer.Option(help=f"Letters of ideas, out of {''.join(IDEAS)}; default all.")] = "",
    tasks: Annotated[str, typer.Option(help="Tasks, with commas between them; default all.")] = "",
    folder: Annotated[Path, typer.Option(help="The results folder.")] = HERE / "results",
    quick: Annotated[bool, typer.Option(help="Few questions, two budgets; nothing is kept.")] = False,
) -> None:
    letters = "".join(dict.fromkeys(only)) or "".join(IDEAS)
    if unknown := set(letters) - set(IDEAS):
        raise typer.BadParameter(f"no such idea: {', '.join(sorted(unknown))}")
    names = tasks.split(",") if tasks else list(TASKS)
    if missing := set(names) - set(TASKS):
        raise typer.BadParameter(f"no such task: {', '.join(sorted(missing))}")
    if quick:
        samples = min(samples, QUICK_SAMPLES)
    budgets = QUICK_BUDGETS if quick else BUDGETS
    torch.set_num_threads(1)
    facts = Facts()
    outcome, ran = Outcome(), variants(letters)
    measure(outcome, letters, names, samples, seed, budgets)
    about = facts.lines(
        __file__,
        model="csp_ext.evaluation.load_eval_model(), float32, greedy",
        default=csp_ext.CSPConfig(),
        samples=f"{samples} per task, {len(names)} tasks: {', '.join(names)}",
        seed=f"{seed} of the questions, 0 of the random choice",
    )
    text = explanation(outcome, about) + "\n" + tables(outcome, ran, budgets, letters)
    if quick:
        print(text)
        return
    keep(text, __file__, folder)
    letters_of = {variant.name: variant.letters for variant in (FULL, *ran)}
    write_csv(folder / "quality_variants.csv", outcome, letters_of)
    print(f"kept in {folder / 'quality_variants'}.md and .csv")


def measure(
    outcome: Outcome, letters: str, names: list[str], samples: int, seed: int, budgets: tuple[float, ...]
) -> None:
    """Ask every question once, and answer it over every pruned cache."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    jobs = [(variant, budget) for variant in variants(letters) for budget in budgets]
    model, processor = load_eval_model()
    with (
        csp_ext.apply(model, method="full") as handle,
        Progress(*columns, console=console, disable=not console.is_terminal) as bars,
    ):
        bar = bars.add_task("", total=len(names) * -(-samples // BATCH) * len(jobs))
        for task in names:
            drawn = make_samples(task, samples, seed, mode="S")
            for at in range(0, samples, BATCH):
                trial = Trial(handle, processor, drawn[at : at + BATCH])
                outcome.add(FULL.name, 1.0, task, *trial.score(FULL, 1.0))
                for variant, budget in jobs:
                    outcome.add(variant.name, budget, task, *trial.score(variant, budget))
                    bars.update(bar, advance=1, description=f"{task}, {variant.name}")


if __name__ == "__main__":
    typer.run(main)
