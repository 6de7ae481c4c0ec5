"""The ``csp`` command: ``demo``, ``generate``, ``train-eval-model``, ``info``, and those of ``commands``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csp_ext.commands.bench import bench as bench_command
from csp_ext.commands.eval import evaluate as eval_command
from csp_ext.commands.paper import paper as paper_command
from csp_ext.commands.shared import Device, Dtype, Json, one_line_errors, parse_budget, progress_bars, quiet
from csp_ext.demo import progress
from csp_ext.demo.console import UserError, check_target, first_line, require, stdout

if TYPE_CHECKING:
    from csp_ext.demo.run import Run

main = typer.Typer(
    name="csp",
    help="Cross-Self Pruning of the KV cache of vision-language models (arXiv 2412.04652).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

Budgets = Annotated[
    list[str],
    typer.Option(
        "--budget",
        help="How much of the prompt's cache to keep: a share such as `0.2` or `20%`, or a number of tokens "
        "such as `300`. Give it several times to compare.",
        metavar="SHARE|TOKENS",
    ),
]

DEMO_REPEATS = 3
# On these samples the methods differ; the demo says so.
DEMO_SEED = 35
BASELINE = "snapkv"
EXAM_SAMPLES = 64


@main.command()
def demo(
    out: Annotated[Path, typer.Option(help="The picture of what is kept for the first question.")] = Path(
        "demo.png"
    ),
    budget: Budgets = ["0.2", "0.1"],  # noqa: B006 (typer's defaults are lists)
    task: Annotated[
        list[str],
        typer.Option(help="What to ask, such as `photo` or `triple`. Give it several times to ask more."),
    ] = ["photo_code", "link_photo"],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Seed of the questions.", min=0)] = DEMO_SEED,
    as_json: Json = False,
) -> None:
    """Ask a small trained LLaVA about many images: full cache, CSP and SnapKV, offline, in seconds.

    The model comes with the package and answers questions about a generated world: numbers in small images
    and in the words between them. A table shows who answers right over how small a cache, a picture which
    tokens stayed: at the first budget, for the first question.
    """
    with one_line_errors():
        budgets = _budgets(budget)
        require("demo", "transformers", "PIL", "matplotlib")
        from csp_ext.demo import evidence_picture, questions, scoreboard
        from csp_ext.demo.picture import SUFFIXES
        from csp_ext.evaluation import load_eval_model

        check_target(out, SUFFIXES)
        samples = [questions.draw_sample(name, seed) for name in dict.fromkeys(task)]
        quiet()
        with questions.one_thread(), progress_bars(as_json) as bars:
            steps = bars.add_task("loading the model", total=2 + len(samples))
            model, processor = load_eval_model()
            asked, notes = [], list(scoreboard.NOTES)
            for sample in samples:
                bars.update(steps, advance=1, description=f"asking, {sample.task}")
                question = questions.pose(model, processor, sample, questions.attempts(budgets, BASELINE))
                runs = [attempt.run for attempt in question.attempts]
                new_tokens = questions.NEW_TOKENS
                notes += progress.compare(bars, model, question.prompt, runs, new_tokens, DEMO_REPEATS, True)
                asked.append(question.answered(processor))
            bars.update(steps, advance=1, description="drawing the picture")
            # The full cache, and both methods at the first budget.
            evidence_picture.draw(processor, asked[0], [0, 1, 2], out)
            bars.update(steps, advance=1, description="done")
        facts = {"command": "demo", "seed": seed, "repeats": DEMO_REPEATS}
        notes = list(dict.fromkeys(notes))
        if as_json:
            scoreboard.print_json(asked, model, out, notes, facts)
        else:
            scoreboard.show(asked, out, notes)


@main.command()
def generate(
    model: Annotated[
        Path,
        typer.Option(help="Folder of a checkpoint with its processor; nothing is downloaded.", metavar="DIR"),
    ],
    prompt: Annotated[
        str,
        typer.Option(
            help="A question, which the images come before; or text with the model's image token where each "
            "image belongs, taken as it is; or a JSON list of chat messages."
        ),
    ],
    image: Annotated[
        list[Path] | None, typer.Option(help="An image; give it once per image.", metavar="FILE")
    ] = None,
    budget: Budgets = ["0.2"],  # noqa: B006
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate per run.", min=1)] = 64,
    no_compare: Annotated[
        bool, typer.Option("--no-compare", help="Skip the run over the full cache.")
    ] = False,
    picture_to: Annotated[
        Path | None,
        typer.Option("--picture", help="Draw what each layer keeps at the smallest budget.", metavar="FILE"),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    window: Annotated[
        str | None,
        typer.Option(help="Queries that observe: a number, question or half.", rich_help_panel="Method"),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="A kept set per KV head (kv) or for all (shared).", rich_help_panel="Method"),
    ] = None,
    combine: Annotated[
        str | None, typer.Option(help="intersection, union or calibrated.", rich_help_panel="Method")
    ] = None,
    cross_ratio: Annotated[
        float | None, typer.Option(help="Share of the cross scores, 0 to 1.", rich_help_panel="Method")
    ] = None,
    decode_interval: Annotated[
        int | None,
        typer.Option(
            help="Prune again whenever so many tokens have been added; default: once.",
            min=1,
            rich_help_panel="Method",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer a question about images with a local checkpoint, over the full and over pruned caches."""
    with one_line_errors():
        size = int(window) if window is not None and window.isdecimal() else window
        fields: dict[str, Any] = {"window": size, "heads": heads, "combine": combine}
        fields |= {"cross_ratio": cross_ratio, "decode_interval": decode_interval}
        configs = _configs(budget, {name: value for name, value in fields.items() if value is not None})
        require("hf", "transformers", "PIL")
        from csp_ext.demo import checkpoint, photographs, picture, prompts
        from csp_ext.demo.report import Outcome, decoded
        from csp_ext.demo.run import Run

        checkpoint.check_folder(model)
        if dtype not in checkpoint.DTYPES:
            raise UserError(f"dtype must be one of {', '.join(checkpoint.DTYPES)}, got {dtype!r}")
        place = checkpoint.device_of(device)
        if picture_to is not None:
            require("demo", "matplotlib")
            check_target(picture_to, picture.SUFFIXES)
        images = [photographs.read(path) for path in image or []]
        quiet()
        with progress_bars(as_json) as bars:
            steps = bars.add_task("loading the model", total=2)
            loaded, processor = checkpoint.load(model, place, dtype)
            bars.update(steps, advance=1, description="generating")
            text = prompts.written(processor, prompt, len(images))
            ready = prompts.assemble(processor, loaded, text, images)
            full = None if no_compare else Run("full")
            runs = configs if full is None else [full, *configs]
            # Only a comparison is worth one more prefill.
            notes = progress.compare(bars, loaded, ready, runs, max_new_tokens, 1, warm_up=not no_compare)
            drawn = min(configs, key=lambda run: run.kept_total(ready))
            reason = prompts.why_no_patches(ready) or ("" if drawn.layers else "nothing was pruned")
            if picture_to is not None and reason:
                notes.append(f"No picture: {reason}.")
                picture_to = None
            if picture_to is not None:
                picture.draw(processor, ready, drawn, picture_to, model.resolve().name)
            bars.update(steps, advance=1, description="done")
        extra = {
            "command": "generate",
            "device": str(place),
            "dtype": str(loaded.dtype).removeprefix("torch."),
        }
        outcome = Outcome(loaded, ready, runs, full, picture_to, notes, extra)
        outcome.texts = {run.name: decoded(processor, run.tokens) for run in runs}
        outcome.print_json() if as_json else outcome.show()


@main.command()
def train_eval_model(
    out: Annotated[Path, typer.Option(help="Folder that gets the model.", metavar="DIR")] = Path(
        "eval-model"
    ),
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Squeeze the run into this wall-clock time; the result then depends on the machine."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in DIR.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.", min=0)] = 0,
    threads: Annotated[
        int, typer.Option(help="Threads of torch; more only on cores that are free.", min=1)
    ] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps, to see that it works.")] = False,
    num_kv_heads: Annotated[int, typer.Option(help="4, or 2 for grouped-query attention.")] = 4,
    as_json: Json = False,
) -> None:
    """Train the small model that the quality measurements use, from scratch, offline.

    A LLaVA of 0.8 M parameters learns to find numbers in many small images and in the words between them.
    """
    with one_line_errors():
        require("hf", "transformers", "PIL")
        from dataclasses import replace

        from csp_ext.evaluation.session import train
        from csp_ext.evaluation.train import QUICK, Plan

        if num_kv_heads not in (2, 4):
            raise UserError(f"num-kv-heads must be 2 or 4, got {num_kv_heads}")
        if minutes is not None and not minutes > 0:
            raise UserError(f"minutes must be positive, got {minutes}")
        quiet()
        plan = replace(QUICK if quick else Plan(), seed=seed, num_kv_heads=num_kv_heads)
        scores = train(
            plan, out, minutes=minutes, resume=resume, threads=threads, samples=1 if quick else EXAM_SAMPLES
        )
    if as_json:
        typer.echo(
            json.dumps({"command": "train-eval-model", "out": str(out), "exact_match": scores}, indent=2)
        )
    else:
        console = stdout()
        for task, modes in scores.items():
            console.print(f"{task:12} " + "  ".join(f"{mode} {score:.3f}" for mode, score in modes.items()))
        console.print(f"written to {out}")


@main.command()
def info(as_json: Json = False) -> None:
    """Print versions, the libraries that are loaded, CPU capability, CUDA status and the build."""
    from csp_ext.info import collect, render

    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        stdout().print(render(facts))


def _budgets(texts: list[str]) -> dict[str, int | float]:
    """Return the budgets by what people call them, each one once."""
    from csp_ext.config import CSPConfig

    budgets: dict[str, int | float] = {}
    for text in texts:
        budget = parse_budget(text)
        try:
            CSPConfig(budget=budget)
        except (TypeError, ValueError) as error:
            raise UserError(first_line(error)) from None
        budgets[f"{100 * budget:.4g} %" if isinstance(budget, float) else f"{budget} tok"] = budget
    return budgets


def _configs(budgets: list[str], fields: dict[str, Any]) -> list[Run]:
    """Return one run of CSP per budget, without results yet."""
    from csp_ext.demo.run import Run
    from csp_ext.methods import make_method

    try:
        return [
            Run(name, make_method("csp", budget=budget, **fields))
            for name, budget in _budgets(budgets).items()
        ]
    except (TypeError, ValueError) as error:
        raise UserError(first_line(error)) from None


# Commands with modules of their own.
main.command(name="eval")(eval_command)
main.command(name="paper")(paper_command)
main.command(name="bench")(bench_command)
