"""``csp bench``: what pruning saves in milliseconds and bytes, in whole models."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from csp_ext.commands.shared import Device, Dtype, Json, one_line_errors, parse_budget, progress_bars, quiet
from csp_ext.demo.console import UserError, require

if TYPE_CHECKING:
    import torch

BATCHES, QUICK_BATCHES = (1, 8, 24), (1, 2)
BUDGETS, QUICK_BUDGETS = ("100%", "60%", "30%", "20%", "10%"), ("100%", "20%")
PROMPT_TOKENS, QUICK_PROMPT_TOKENS = 3100, 240
NEW_TOKENS, QUICK_NEW_TOKENS = 128, 20
GPU_ROUNDS, CPU_ROUNDS, QUICK_ROUNDS = 3, 2, 1


@dataclass(frozen=True)
class _Options:
    """What the user wrote, defaults filled in."""

    model: str
    device: torch.device
    dtype: str
    batches: tuple[int, ...]
    budgets: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    rounds: int
    compiled: bool
    quick: bool
    out: Path

    def command(self) -> str:
        """Return the command that asks for the same."""
        words = ["csp", "bench", "--model", self.model, "--device", str(self.device), "--dtype", self.dtype]
        words += [word for batch in self.batches for word in ("--batch", str(batch))]
        words += [word for budget in self.budgets for word in ("--budget", budget)]
        words += ["--prompt-tokens", str(self.prompt_tokens), "--new-tokens", str(self.new_tokens)]
        words += ["--rounds", str(self.rounds), "--compile" if self.compiled else "--no-compile"]
        words += ["--out", str(self.out), *(["--quick"] if self.quick else [])]
        return shlex.join(words)


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            help="`llava-7b`, `llava-13b` or `scaled`, with random weights, or the folder of a LLaVA; "
            "default: llava-7b on a GPU, scaled on a CPU.",
            metavar="NAME|DIR",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Rows; give it once per batch. Default: 1, 8, 24.", min=1, metavar="ROWS"),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="A share of the prompt; give it once per budget. Default: 100, 60, 30, 20 and 10 %.",
            metavar="SHARE",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Of each row, its images among them; default: 3100.", min=1)
    ] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Generated per row; default: 128.", min=1)] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Turns of every arm; default: 3 on a GPU, 2 on a CPU.", min=1)
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Compile the steps of static caches as `generate` does; default: on a GPU.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.", metavar="DIR")] = Path("bench-results"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny model and prompt, to see that it works.")
    ] = False,
    only_estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Run nothing: print the bytes that a step reads, and the most that pruning can gain by them "
            "(default: llava-7b in bfloat16).",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure what pruning saves: time per token and to the first one, throughput, cache and peak memory.

    csp over caches of fixed capacity at every budget and batch, beside the untouched model over a static
    and a dynamic cache and a naive gather, all in turns. Writes `bench.md`, `bench.csv`, `bench.json` and
    `bench.png`.
    """
    with one_line_errors():
        require("hf", "transformers", "PIL")
        if not only_estimate:
            require("demo", "matplotlib")
        from csp_ext.demo import checkpoint

        place = checkpoint.device_of(device)
        on_gpu = place.type == "cuda"
        if dtype not in checkpoint.DTYPES:
            raise UserError(f"dtype must be one of {', '.join(checkpoint.DTYPES)}, got {dtype!r}")
        options = _Options(
            model=model or ("quick" if quick else "llava-7b" if on_gpu or only_estimate else "scaled"),
            device=place,
            dtype=dtype,
            batches=tuple(dict.fromkeys(batch or (QUICK_BATCHES if quick else BATCHES))),
            budgets=tuple(dict.fromkeys(budget or (QUICK_BUDGETS if quick else BUDGETS))),
            prompt_tokens=prompt_tokens or (QUICK_PROMPT_TOKENS if quick else PROMPT_TOKENS),
            new_tokens=new_tokens or (QUICK_NEW_TOKENS if quick else NEW_TOKENS),
            rounds=rounds or (QUICK_ROUNDS if quick else GPU_ROUNDS if on_gpu else CPU_ROUNDS),
            compiled=on_gpu if compiled is None else compiled,
            quick=quick,
            out=out,
        )
        if only_estimate:
            _estimate(options, as_json)
        else:
            _run(options, as_json)


def _estimate(options: _Options, as_json: bool) -> None:
    from csp_ext.demo.console import stdout
    from csp_ext.evaluation import sheets
    from csp_ext.speed import estimate, loading
    from csp_ext.speed.shapes import SHAPES

    known = options.model in SHAPES and options.dtype == "auto"
    source = loading.find(options.model, options.device, "bfloat16" if known else options.dtype)
    sizes = options.prompt_tokens, options.new_tokens
    found = estimate.estimate(source, options.batches, _shares(options.budgets), *sizes)
    dtype = str(source.dtype).removeprefix("torch.")
    if as_json:
        plain = {"command": "bench", "estimate": found, "model": source.name, "dtype": dtype}
        typer.echo(json.dumps(plain | {"prompt_tokens": sizes[0], "new_tokens": sizes[1]}, indent=2))
        return
    title = f"{source.name}, {dtype}: computed, not measured"
    caption = (
        f"A step half-way through {sizes[1]} new tokens behind {sizes[0]} of the prompt: weights of the "
        "decoder and the output layer, keys and values."
    )
    stdout().print(sheets.terminal(estimate.HEAD, list(map(estimate.cells, found)), title, caption))


def _run(options: _Options, as_json: bool) -> None:
    from csp_ext.evaluation.checkpoint import require_room
    from csp_ext.speed import files, loading
    from csp_ext.speed.measure import FEWEST_TOKENS, Settings, measure
    from csp_ext.speed.targets import Setting, verdicts
    from csp_ext.speed.workload import Workload, check_room

    settings = Settings(
        batches=options.batches,
        budgets=_shares(options.budgets),
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        compiled=options.compiled,
        quick=options.quick,
    )
    if options.new_tokens < FEWEST_TOKENS:
        raise UserError(f"new-tokens must be at least {FEWEST_TOKENS}, got {options.new_tokens}")
    # Kineto's messages about each start and stop of a profile would stand between the progress bars.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    quiet()
    with progress_bars(as_json) as bars:
        bar = bars.add_task("building the model", total=None)
        source = loading.find(options.model, options.device, options.dtype)
        workload = Workload.of(source.config, options.prompt_tokens)
        check_room(
            source.config,
            source.dtype,
            options.device,
            source.bytes,
            options.prompt_tokens + options.new_tokens,
            options.batches,
        )
        require_room(options.out)
        model = source.load()

        def advance(done: int, total: int, what: str) -> None:
            bars.update(bar, completed=done, total=total, description=what)

        measured = measure(model, workload, settings, advance)
        layers = source.config.get_text_config(decoder=True).num_hidden_layers
        setting = Setting(source.name, layers, options.device.type == "cuda", options.compiled)
        outcome = files.Outcome(
            measured=measured,
            verdicts=verdicts(measured, setting),
            title=f"What pruning saves: {source.name}",
            **_about(options, model, source.name, workload, measured.bandwidth),
        )
        bars.update(bar, description="drawing")
        written = files.write(outcome, options.out)
    if as_json:
        typer.echo(json.dumps(outcome.plain() | {"files": [str(file) for file in written]}, indent=2))
    else:
        files.show(outcome, written)


def _shares(texts: tuple[str, ...]) -> tuple[float, ...]:
    shares = [parse_budget(text) for text in texts]
    for text, share in zip(texts, shares, strict=True):
        if not isinstance(share, float) or not 0 < share <= 1:
            raise UserError(f"budget must be a share of the prompt such as 20%, got {text!r}")
    return tuple(float(share) for share in dict.fromkeys(shares))


def _about(options: _Options, model: Any, name: str, workload: Any, bandwidth: float) -> dict[str, Any]:
    """Return what must be known of a measurement, as sentences and as plain values."""
    from csp_ext.config import CSPConfig
    from csp_ext.paper.request import Subject, versions
    from csp_ext.speed.files import machine

    computes, config = machine(options.device), CSPConfig()
    prompt = (
        f"{workload.tokens} tokens per row, {workload.images} image{'s' if workload.images > 1 else ''} of "
        f"{workload.per_image} among them, {options.new_tokens} new tokens"
    )
    steps = "static caches compiled" if options.compiled else "all steps eager"
    facts = [
        f"{name}, {str(model.dtype).removeprefix('torch.')}, {computes['device']}; {prompt}; {steps}; "
        f"medians of {options.rounds} round{'s' if options.rounds > 1 else ''}.",
        f"Model: {Subject(name, model, None).described()}.",
        f"csp: the defaults of CSPConfig, window {config.window}, hop {config.hop}, heads {config.heads!r}, "
        f"combine {config.combine!r}.",
        f"Machine: {', '.join(f'{key} {value}' for key, value in computes.items())}; it reads "
        f"{bandwidth / 1e9:.1f} GB/s.",
        f"Versions: {versions()}.",
        f"Repeat with: {options.command()}",
    ]
    settings = {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "machine": computes,
        "versions": versions(),
        "prompt": {"tokens": workload.tokens, "images": workload.images, "per_image": workload.per_image},
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "compiled": options.compiled,
        "csp": config.to_dict() | {"budget": None},
        "repeat": options.command(),
    }
    return {"facts": facts, "settings": settings}
