"""``csp paper``: the paper's tables and figures, measured again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from csp_ext.commands.shared import (
    ContextLen,
    Device,
    Dtype,
    Json,
    MaxNewTokens,
    Protocol,
    Template,
    one_line_errors,
    parse_budget,
    progress_bars,
    quiet,
)
from csp_ext.demo.console import UserError, first_line, require

if TYPE_CHECKING:
    from csp_ext.paper.request import Request, Subject
    from csp_ext.paper.studies import Study

NAMES = ("table1", "table2", "table3", "fig1", "fig3", "fig4", "fig5", "fig6", "fig7")
# The paper observes with the last tenth of the prompt.
WINDOW = "10%"
QUICK_SAMPLES = 4


@dataclass(frozen=True)
class _Options:
    """What the user wrote, defaults filled in."""

    name: str
    out: Path
    models: list[Path]
    data: Path | None
    datasets: list[str]
    samples: int | None
    seeds: list[int]
    budgets: list[str]
    window: str | None
    protocol: str
    template: str
    context_len: int | None
    max_new_tokens: int
    device: str
    dtype: str
    quick: bool

    def command(self) -> tuple[str, ...]:
        """Return the command that asks for the same."""
        words = ["csp", "paper", self.name, "--out", str(self.out)]
        options: list[tuple[str, object]] = [("model", folder) for folder in self.models]
        options += [("dataset", name) for name in self.datasets]
        options += [("budget", budget) for budget in self.budgets]
        options += [("data", self.data), ("samples", self.samples), ("window", self.window)]
        if self.name not in ("table2", "fig1", "fig3", "fig4"):
            options.append(("protocol", self.protocol))
        if self.data is None:
            options += [("seed", seed) for seed in self.seeds]
        else:
            options += [("template", self.template), ("max-new-tokens", self.max_new_tokens)]
            options.append(("context-len", self.context_len))
        if self.models:
            options += [("device", self.device), ("dtype", self.dtype)]
        for option, value in options:
            words += [f"--{option}", str(value)] if value is not None else []
        return (*words, *(["--quick"] if self.quick else []))


def paper(
    name: Annotated[str, typer.Argument(help=f"{', '.join(NAMES)}.", metavar="NAME", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; default: `paper/NAME`.", metavar="DIR")
    ] = None,
    model: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a checkpoint with its processor; default: the model that comes with csp_ext. "
            "Give it several times for table3.",
            metavar="DIR",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A MileBench root; default: generated data.", metavar="DIR")
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="A data set, or a task of the generated suite; default: all.", metavar="NAME"),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="The first so many of each data set; default: all of a root.", min=1)
    ] = None,
    seed: Annotated[list[int], typer.Option(help="Of the generated data.", min=0)] = [0],  # noqa: B006
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="A share of the prompt such as `20%`; give it several times for table2 and fig7.",
            metavar="SHARE",
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            help="fig1, fig3, fig4: the last queries of a prompt, as a share or a number; or `question`. "
            f"Default: {WINDOW}, the paper's."
        ),
    ] = None,
    protocol: Protocol = "aware",
    template: Template = "plain",
    context_len: ContextLen = None,
    max_new_tokens: MaxNewTokens = 512,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples, steps and points.")] = False,
    as_json: Json = False,
) -> None:
    """Measure one of the paper's tables or figures: `NAME.md`, `NAME.csv` and `NAME.png`.

    table1: methods per group of tasks. table2: time per token and cache by budget. table3: methods on two
    architectures. fig1: density of attention weights. fig3, fig4: divergence of self and cross attention, by
    layer and by data set. fig5: share of the cross list. fig6: constants of the n-softmax. fig7: budgets.
    """
    with one_line_errors():
        if name not in NAMES:
            raise UserError(f"there is no {name!r} in the paper to measure; there are {', '.join(NAMES)}")
        require("hf", "transformers", "PIL")
        require("eval", "matplotlib", "scipy")
        from csp_ext.evaluation.checkpoint import require_room
        from csp_ext.evaluation.runner import check
        from csp_ext.paper import report
        from csp_ext.paper.studies import STUDIES

        study = STUDIES[name]
        if window is not None and not study.watches:
            raise UserError(f"{name} has no window of its own; --window is for fig1, fig3 and fig4")
        options = _Options(
            name=name,
            out=Path("paper") / name if out is None else out,
            models=model or [],
            data=data,
            datasets=dataset or [],
            samples=_samples(study, samples, data is None, quick),
            seeds=list(dict.fromkeys(seed)),
            budgets=budget or [f"{100 * share:g}%" for share in study.budgets],
            window=(window or WINDOW) if study.watches else None,
            protocol=protocol,
            template=template,
            context_len=context_len,
            max_new_tokens=max_new_tokens,
            device=device,
            dtype=dtype,
            quick=quick,
        )
        shares = _shares(options, study)
        quiet()
        with progress_bars(as_json) as bars:
            bar = bars.add_task("loading", total=None)
            with _request(options, study, shares) as request:
                for subject in request.subjects:
                    check(subject.model, subject.processor, request.settings)
                require_room(options.out)
                finding = study.run(
                    request,
                    lambda done, total: bars.update(bar, completed=done, total=total, description=name),
                )
                bars.update(bar, description="drawing")
                notes = [*finding.notes, *request.repeated()]
                files = report.write(finding, options.out, name, notes)
        if as_json:
            plain = {"command": "paper", "name": name, "title": finding.title}
            numbers = {
                "records": list(finding.records),
                "notes": notes,
                "files": [str(file) for file in files],
            }
            typer.echo(json.dumps(plain | numbers, indent=2))
        else:
            report.show(finding, files, notes)


def _samples(study: Study, wanted: int | None, is_generated: bool, quick: bool) -> int | None:
    if wanted is not None:
        return wanted
    if is_generated:
        return study.samples[quick]
    return QUICK_SAMPLES if quick else None


def _shares(options: _Options, study: Study) -> tuple[float, ...]:
    """Return the budgets, which must be shares, and as many as the study takes."""
    if options.budgets and study.watches:
        raise UserError(f"{options.name} prunes nothing; it takes no --budget")
    shares = [parse_budget(text) for text in options.budgets]
    for text, share in zip(options.budgets, shares, strict=True):
        if not isinstance(share, float) or not 0 < share <= 1:
            raise UserError(f"budget must be a share of the prompt such as 20%, got {text!r}")
    if len(study.budgets) == 1 and len(shares) > 1:
        raise UserError(f"{options.name} takes one budget, got {len(shares)}")
    return tuple(float(share) for share in dict.fromkeys(shares))


@contextmanager
def _request(options: _Options, study: Study, shares: tuple[float, ...]) -> Iterator[Request]:
    """Load the models and the data."""
    from csp_ext.evaluation.benchmark import BATCH_IMAGES, SUITE_BATCH_IMAGES
    from csp_ext.evaluation.settings import Settings
    from csp_ext.evaluation.sources import with_room
    from csp_ext.paper.request import Request
    from csp_ext.paper.subject import asked

    if options.models and (len(options.models) > 1) != (study.models > 1):
        wanted = "one --model" if study.models == 1 else "several --model"
        raise UserError(f"{options.name} takes {wanted}, got {len(options.models)}")
    if options.data is not None and len(options.seeds) > 1:
        raise UserError("several seeds draw several suites, but the data are given; name one seed")
    try:
        settings = Settings(
            protocol=options.protocol,
            seeds=tuple(options.seeds),
            batch_images=SUITE_BATCH_IMAGES if options.data is None else BATCH_IMAGES,
            max_new_tokens=options.max_new_tokens,
            template=options.template,
            context_len=options.context_len,
        )
    except ValueError as error:
        raise UserError(first_line(error)) from None
    window = _window(options.window)
    subjects = _subjects(options, study)
    if options.data is not None:
        settings = with_room(settings, [subject.model for subject in subjects])
    with asked(options.data, options.datasets, options.samples, options.seeds) as (
        datasets,
        problems,
    ):
        yield Request(
            name=options.name,
            subjects=subjects,
            datasets=datasets,
            problems=tuple(problems),
            settings=settings,
            real=options.data is not None,
            budgets=shares,
            window=window,
            quick=options.quick,
            out=options.out,
            command=options.command(),
        )


def _subjects(options: _Options, study: Study) -> tuple[Subject, ...]:
    from csp_ext.demo import checkpoint
    from csp_ext.paper.subject import embedded, opened

    if not options.models:
        return tuple(embedded(heads) for heads in (4, 2)[: study.models])
    if options.dtype not in checkpoint.DTYPES:
        raise UserError(f"dtype must be one of {', '.join(checkpoint.DTYPES)}, got {options.dtype!r}")
    return tuple(opened(folder, options.device, options.dtype) for folder in options.models)


def _window(text: str | None) -> float | int | str:
    if text is None or text == "question":
        return "question"
    try:
        size = parse_budget(text)
    except UserError:
        size = 0
    if (isinstance(size, float) and not 0 < size <= 1) or size <= 0:
        raise UserError(f"window must be question, a share such as 10% or a number of tokens, got {text!r}")
    return size
