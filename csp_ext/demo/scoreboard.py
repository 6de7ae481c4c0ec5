"""What the demo prints: per question a table of the attempts, and the right answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from csp_ext.demo.console import stdout
from csp_ext.demo.questions import Question
from csp_ext.demo.report import numbers, size, time
from csp_ext.evaluation.tasks import ABOUT

CAPTION = (
    "tokens: kept of the prompt, the mean over layers and heads. cache: keys and values when the first token "
    "comes out. time: per further token, the median."
)
NOTES = (
    "The model is small and knows only its generated world: its times say little about large models.",
    "SnapKV has its published settings: a window and recent tokens of 32, scores averaged over 5 neighbours.",
    "One sample proves nothing, and the default seed was chosen as one on which the methods differ; "
    "docs/quality.md has the rates.",
)


def show(questions: list[Question], picture: Path, notes: list[str]) -> None:
    """Print the tables and the notes on stdout."""
    console = stdout()
    for question in questions:
        console.print(table(question))
        console.print(Text.assemble("question      ", (question.sample.question, "bold")))
        console.print(Text.assemble("right answer  ", (question.sample.answer, "bold")), end="\n\n")
    console.print(Text(CAPTION, style="dim"))
    for note in notes:
        console.print(Text(note, style="yellow"))
    console.print(Text(f"The picture is in {picture}"))


def table(question: Question) -> Table:
    """Return the attempts as a table."""
    prompt = question.prompt
    result = Table(
        title=f"{question.sample.task}: {ABOUT[question.sample.task]}. {len(prompt.photographs)} images, "
        f"{prompt.length} prompt tokens: {prompt.text_tokens} text, {prompt.image_tokens} image",
        title_justify="left",
        pad_edge=False,
        padding=(0, 0, 0, 1),
        box=box.SIMPLE_HEAD,
    )
    result.add_column("method", no_wrap=True)
    for name in ("budget", "tokens", "cache", "time"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("answer")
    result.add_column("", no_wrap=True)
    for row in rows(question):
        result.add_row(
            row["method"],
            row["budget"],
            f"{row['kept']['total']:.0f}/{prompt.length}",
            size(row["cache_bytes"]),
            time(row["ms_per_token"]),
            question.shortened(row["answer"]),
            Text("right", style="green") if row["right"] else Text("WRONG", style="bold red"),
        )
    return result


def rows(question: Question) -> list[dict[str, Any]]:
    """Return the attempts as plain numbers, ready for JSON; times are medians."""
    full = question.attempts[0].run
    return [
        {
            "method": attempt.method,
            "budget": attempt.budget,
            "answer": answer,
            "right": answer == question.sample.answer,
            **numbers(attempt.run, question.prompt, full),
        }
        for attempt, answer in zip(question.attempts, question.answers, strict=True)
    ]


def print_json(
    questions: list[Question], model: Any, picture: Path, notes: list[str], facts: dict[str, Any]
) -> None:
    """Print one JSON object on stdout; `facts` are further entries of it."""
    result = {
        **facts,
        "model": {
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "questions": [
            {
                "task": question.sample.task,
                "question": question.sample.question,
                "answer": question.sample.answer,
                "evidence": question.sample.evidence,
                "prompt": {
                    "tokens": question.prompt.length,
                    "text": question.prompt.text_tokens,
                    "image": question.prompt.image_tokens,
                    "images": [photograph.name for photograph in question.prompt.photographs],
                },
                "runs": rows(question),
            }
            for question in questions
        ],
        "picture": str(picture),
        "notes": notes,
    }
    print(json.dumps(result, indent=2))
