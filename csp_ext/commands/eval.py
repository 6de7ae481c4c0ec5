"""``csp eval``: the quality of every method at every budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table

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
from csp_ext.demo.console import UserError, require, stdout

if TYPE_CHECKING:
    from csp_ext.evaluation.benchmark import Request
    from csp_ext.evaluation.store import Store
    from csp_ext.evaluation.tables import Row

QUICK_SAMPLES = 16
OURS = "csp"  # compared with all others
SHOWN_PROBLEMS = 20
LEFT_OUT = 3  # exit code


def evaluate(
    out: Annotated[
        Path, typer.Option(help="Folder of the results; the generated suite goes there, too.", metavar="DIR")
    ] = Path("eval"),
    data: Annotated[
        Path | None,
        typer.Option(help="A MileBench root; default: the generated suite.", metavar="DIR"),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="A data set, or a task of the suite; give it once per name.", metavar="NAME"),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a checkpoint with its processor; default: the model that comes with csp_ext.",
            metavar="DIR",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Give it once per method; default: all, and the oracle.", metavar="NAME"),
    ] = None,
    budget: Annotated[
        list[str],
        typer.Option(
            help="A share such as `0.2` or `20%`, or a number of tokens; give it once per budget.",
            metavar="SHARE|TOKENS",
        ),
    ] = ["0.1", "0.2", "0.4"],  # noqa: B006 (typer's defaults are lists)
    samples: Annotated[
        int | None, typer.Option(help="The first so many of each data set; 32 of the suite.", min=1)
    ] = None,
    seed: Annotated[
        list[int],
        typer.Option(help="Of the suite and of random choices; give it once per suite.", min=0),
    ] = [0],  # noqa: B006
    protocol: Protocol = "aware",
    template: Template = "plain",
    adversarial: Annotated[
        bool, typer.Option("--adversarial", help="Take MileBench's adversarial annotations.")
    ] = False,
    combined: Annotated[
        int, typer.Option(help="Take MileBench's images combined into so many; 0: one by one.", min=0)
    ] = 0,
    context_len: ContextLen = None,
    max_new_tokens: MaxNewTokens = 512,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", min=1)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="16 samples of each data set.")] = False,
    as_json: Json = False,
) -> None:
    """Measure what pruning costs: every method at every budget, on the same samples.

    Writes `table.md`, `table.csv`, `chart.png`, `records.jsonl`, `problems.jsonl` and `run.json`. Exit code
    3: some samples could not be used; the results are those of the others.
    """
    with one_line_errors():
        require("hf", "transformers", "PIL")
        require("eval", "matplotlib", "scipy")
        from csp_ext.evaluation.arms import METHOD_NAMES
        from csp_ext.evaluation.benchmark import BATCH_IMAGES, SUITE_BATCH_IMAGES, Request
        from csp_ext.evaluation.benchmark import evaluate as run
        from csp_ext.evaluation.runner import Settings

        try:
            settings = Settings(
                protocol=protocol,
                seeds=tuple(dict.fromkeys(seed)),
                batch_images=SUITE_BATCH_IMAGES if data is None else BATCH_IMAGES,
                max_new_tokens=max_new_tokens,
                template=template,
                context_len=context_len,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        request = Request(
            out=out,
            methods=tuple(method or METHOD_NAMES),
            budgets=tuple(parse_budget(text) for text in budget),
            settings=settings,
            data=data,
            datasets=tuple(dataset or ()),
            samples=QUICK_SAMPLES if quick and samples is None else samples,
            model=model,
            device=device,
            dtype=dtype,
            threads=threads,
            adversarial=adversarial,
            combined=combined,
            resume=resume,
        )
        quiet()
        with progress_bars(as_json) as bars:
            bar = bars.add_task("loading", total=None)

            def advance(done: int, total: int) -> None:
                bars.update(bar, completed=done, total=total, description="answers")

            store = run(request, advance)
        problems = store.problems()
        if store.rank == 0:
            _report(store, request, problems, as_json)
    if problems:
        raise typer.Exit(LEFT_OUT)


def _report(store: Store, request: Request, problems: list[dict[str, Any]], as_json: bool) -> None:
    """Write the tables and the picture, and show the results."""
    from csp_ext.evaluation import chart, tables
    from csp_ext.evaluation.rivals import rivalry

    records = store.records()
    if not records:
        raise UserError(f"no sample could be used; the first problem is {_line(problems[0])}")
    results, protocol = tables.rows(records), request.settings.protocol
    title, rivals = _title(request, records), rivalry(records, OURS)
    try:
        tables.write_markdown(store.folder / "table.md", results, title, protocol, rivals)
        tables.write_csv(store.folder / "table.csv", results)
        chart.draw(store.folder / "chart.png", results, title)
    except OSError as error:
        raise UserError(f"{store.folder} cannot be written: {error.strerror}") from error
    if as_json:
        typer.echo(json.dumps(_plain(store, results, protocol, problems), indent=2))
        return
    console = stdout()
    console.print(tables.terminal(results, title, protocol))
    if rivals is not None:
        console.print(rivals.terminal())
    if problems:
        console.print(_problem_table(problems))
    console.print(f"Results are in {store.folder}")


def _title(request: Request, records: list[dict[str, Any]]) -> str:
    data = "generated suite" if request.data is None else request.data.resolve().name
    model = "embedded model" if request.model is None else request.model.resolve().name
    samples = len({(record["seed"], record["dataset"], record["sample_id"]) for record in records})
    datasets = len({record["dataset"] for record in records})
    return f"{data}: {samples} samples of {datasets} data set{'s' if datasets > 1 else ''}, {model}"


def _plain(store: Store, results: list[Row], protocol: str, problems: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "command": "eval",
        "out": str(store.folder),
        "protocol": protocol,
        "rows": [row.plain() for row in results],
        "problems": problems,
    }


def _line(problem: dict[str, Any]) -> str:
    sample = "" if problem["sample_id"] is None else f", sample {problem['sample_id']}"
    return f"{problem['file']}{sample}: {problem['reason']}"


def _problem_table(problems: list[dict[str, Any]]) -> Table:
    """Return what was left out, file by file."""
    table = Table(
        title=f"Left out: {len(problems)}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption_justify="left",
    )
    for name in ("file", "sample", "reason"):
        table.add_column(name, overflow="fold")
    for problem in problems[:SHOWN_PROBLEMS]:
        table.add_row(problem["file"], problem["sample_id"] or "all", problem["reason"])
    if len(problems) > SHOWN_PROBLEMS:
        table.caption = f"and {len(problems) - SHOWN_PROBLEMS} more, see problems.jsonl"
    return table
