"""What pruning again does for long answers: slots, bytes and time per token while the answer grows.

python bench/long_answers.py [--batch 8] [--new-tokens 2048] [--interval 128] [--folder bench/results]
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pages import Facts, keep
from rich.progress import track

import csp_ext
from csp_ext.demo.report import size
from csp_ext.demo.run import stored_bytes
from csp_ext.evaluation.sheets import markdown
from csp_ext.speed.shapes import SHAPES, fill, skeleton
from csp_ext.speed.turn import Decoder
from csp_ext.speed.workload import Workload

HERE = Path(__file__).parent
PROMPT, BUDGET = 3100, 0.1
PARTS = 4  # of the answer, whose times are shown apart
HEAD = (
    "cache",
    "prunes",
    "slots",
    "bytes at the end",
    *(f"ms/token, quarter {part}" for part in range(1, PARTS + 1)),
    "ms of a step that prunes",
)


@dataclass
class Answer:
    """One cache and what its steps took, in seconds; those that pruned apart."""

    name: str
    interval: int | None
    static: bool
    cache: Any = None
    decoder: Any = None
    steps: list[float] = field(default_factory=list)
    pruning: list[float] = field(default_factory=list)

    def cells(self) -> list[str]:
        """Return a row of the table."""
        layer, part = self.cache.layers[0], len(self.steps) // PARTS
        quarters = [statistics.median(self.steps[at * part : (at + 1) * part]) for at in range(PARTS)]
        return [
            self.name,
            str(len(self.pruning)),
            str(layer.keys.shape[2]),
            size(stored_bytes(self.cache)),
            *(f"{1e3 * seconds:.2f}" for seconds in quarters),
            f"{1e3 * statistics.median(self.pruning):.1f}" if self.pruning else "-",
        ]


@torch.no_grad()
def measure(batch: int, new_tokens: int, interval: int) -> list[Answer]:
    """Generate from the same prompts over every cache, token by token in turns."""
    model = skeleton(SHAPES["scaled"].config(), torch.float32)
    fill(model, torch.device("cpu"))
    inputs = Workload.of(model.config, PROMPT).inputs(model, batch)
    answers = [
        Answer("growing, pruned once", None, False),
        Answer("growing, pruned again", interval, False),
        Answer("fixed, pruned once", None, True),
        Answer("fixed, pruned again", interval, True),
    ]
    with csp_ext.apply(model, budget=int(BUDGET * PROMPT), attention="csp") as handle:
        for answer in answers:
            handle.config = handle.config.replace(decode_interval=answer.interval)
            if answer.static:
                answer.cache = csp_ext.integration.CSPStaticCache(model.config, max_new_tokens=new_tokens)
            output = model(**inputs, past_key_values=answer.cache, use_cache=True, logits_to_keep=1)
            answer.cache = output.past_key_values
            answer.decoder = Decoder(output.logits, answer.cache, PROMPT)
        for _ in track(range(new_tokens - 1), "tokens", transient=True):
            for answer in answers:
                before, begin = handle.stats.renewals, time.perf_counter()
                answer.decoder.step(model)
                seconds = time.perf_counter() - begin
                (answer.steps if handle.stats.renewals == before else answer.pruning).append(seconds)
    return answers


PREFACE = """\
The scaled LLaVA of `csp bench`, fp32, eager, the caches taking turns token by token. 10 % of the prompt are
kept; with `decode_interval` a cache is pruned back to that before it holds more than the interval beside it.
Medians of each quarter of the answer, steps that prune left out: their time is the last column."""


def main(
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 8,
    new_tokens: Annotated[int, typer.Option(min=PARTS + 1, help="Generated per row.")] = 2048,
    interval: Annotated[int, typer.Option(min=1, help="decode_interval.")] = 128,
    folder: Annotated[Path, typer.Option(help="The results folder.")] = HERE / "results",
) -> None:
    facts = Facts()
    answers = measure(batch, new_tokens, interval)
    prompts = f"{batch} rows of {PROMPT} tokens, {new_tokens} new ones, decode_interval {interval}"
    keep(report(facts.lines(__file__, prompts=prompts), answers), __file__, folder)


def report(head: str, answers: Sequence[Answer]) -> str:
    """Return the page."""
    table = "\n".join(markdown(HEAD, [answer.cells() for answer in answers]))
    return "\n\n".join(["# Long answers over a cache that is pruned again", head, PREFACE, table]) + "\n"


if __name__ == "__main__":
    typer.run(main)
