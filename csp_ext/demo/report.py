"""The runs as a table for people and as plain numbers for machines."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rich import box
from rich.table import Table
from rich.text import Text

from csp_ext.demo.console import stdout
from csp_ext.demo.prompts import Prompt
from csp_ext.demo.run import Run
from csp_ext.methods import CSP, Method

TEXT, IMAGE = 0, 1


def _median_ms(seconds: list[float]) -> float | None:
    return statistics.median(seconds) * 1e3 if seconds else None


def same_start(tokens: list[int], reference: list[int]) -> int:
    """Return how many tokens two answers share from their start."""
    count = 0
    for one, other in zip(tokens, reference, strict=False):
        if one != other:
            break
        count += 1
    return count


def settings(method: Method | None) -> dict[str, Any] | None:
    """Return a method's settings in plain values: the CSPConfig of CSP; None for the full cache."""
    if method is None:
        return None
    return method.config.to_dict() if isinstance(method, CSP) else dataclasses.asdict(cast(Any, method))


def numbers(run: Run, prompt: Prompt, full: Run | None) -> dict[str, Any]:
    """Return one run as plain numbers, ready for JSON; times are medians."""
    kept = run.kept_total(prompt)
    result: dict[str, Any] = {
        "name": run.name,
        "config": settings(run.method),
        "kept": {
            "total": kept,
            "text": run.kept(prompt, TEXT),
            "image": run.kept(prompt, IMAGE),
            "share": kept / prompt.length,
        },
        "cache_bytes": run.cache_bytes,
        "ms_per_token": _median_ms(run.token_s),
        "ms_to_first_token": _median_ms(run.first_token_s),
        "tokens": run.tokens,
        "stats": run.stats,
    }
    if full is not None:
        result["equals_full"] = run.tokens == full.tokens
        result["same_start"] = same_start(run.tokens, full.tokens)
    return result


@dataclass
class Outcome:
    """All that a command found out, for people (:meth:`show`) and for machines (:meth:`print_json`).

    Attributes
    ----------
    model : PreTrainedModel
    prompt : Prompt
    runs : list of Run
    full : Run or None
        The run over the full cache, where there is one.
    picture : Path or None
        Where the picture is.
    notes : list of str
        What the reader must know.
    facts : dict
        Further entries of the JSON object.
    texts : dict
        The answers by run, where they mean something.
    """

    model: Any
    prompt: Prompt
    runs: list[Run]
    full: Run | None
    picture: Path | None
    notes: list[str]
    facts: dict[str, Any]
    texts: dict[str, str] = field(default_factory=dict)

    def print_json(self) -> None:
        """Print one JSON object on stdout."""
        prompt = self.prompt
        result = {
            **self.facts,
            "model": {
                "class": type(self.model).__name__,
                "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            },
            "prompt": {
                "tokens": prompt.length,
                "text": prompt.text_tokens,
                "image": prompt.image_tokens,
                "images": [photograph.name for photograph in prompt.photographs],
            },
            "runs": [numbers(run, prompt, self.full) for run in self.runs],
            "texts": self.texts,
            "picture": None if self.picture is None else str(self.picture),
            "notes": self.notes,
        }
        print(json.dumps(result, indent=2))

    def show(self) -> None:
        """Print the answers, the table and the notes on stdout."""
        console = stdout()
        for name, text in self.texts.items():
            console.print(Text(name, style="bold cyan"), Text(text))
        console.print(table(self.runs, self.prompt, self.full))
        for note in self.notes:
            console.print(Text(note, style="yellow"))
        if self.picture is not None:
            console.print(Text(f"The picture is in {self.picture}"))


def decoded(processor: Any, tokens: list[int]) -> str:
    """Return generated tokens as text."""
    return str(processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def table(runs: list[Run], prompt: Prompt, full: Run | None) -> Table:
    """Return the comparison of the runs as a table, narrow enough for 80 columns."""
    images = len(prompt.photographs)
    result = Table(
        title=f"{images} image{'' if images == 1 else 's'}, {prompt.length} prompt tokens: "
        f"{prompt.text_tokens} text, {prompt.image_tokens} image",
        caption="text, image: tokens kept, the mean over layers and heads. first: time to the first token, "
        "prefill included. token: time per further token, the median."
        + (" same: tokens equal to the full cache's answer, from its start." if full is not None else ""),
        pad_edge=False,
        padding=(0, 0, 0, 1),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    result.add_column("cache", no_wrap=True)
    for name in ("text", "image", "share", "bytes", "first", "token"):
        result.add_column(name, justify="right", no_wrap=True)
    if full is not None:
        result.add_column("same", justify="right", no_wrap=True)
    for run in runs:
        row = numbers(run, prompt, full)
        kept = row["kept"]
        cells: list[str | Text] = [
            run.name,
            f"{kept['text']:.0f}/{prompt.text_tokens}",
            f"{kept['image']:.0f}/{prompt.image_tokens}",
            f"{kept['share']:.1%}",
            size(run.cache_bytes),
            time(row["ms_to_first_token"]),
            time(row["ms_per_token"]),
        ]
        if full is not None:
            same = f"{row['same_start']}/{len(full.tokens)}"
            cells.append(Text(same, style="green" if row["equals_full"] else "yellow"))
        result.add_row(*cells)
    return result


def time(milliseconds: float | None) -> str:
    """Return a duration as people read it; a dash where there is none."""
    if milliseconds is None:
        return "-"
    return f"{milliseconds:.1f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.2f} s"


def size(count: float) -> str:
    """Return a number of bytes as people read it."""
    for digits, unit in enumerate(("B", "KiB", "MiB")):
        if count < 1024:
            return f"{count:.{digits}f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
