"""Questions of the generated world to the evaluation model, over the full and over pruned caches."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from csp_ext.demo.console import UserError, first_line
from csp_ext.demo.photographs import Photograph
from csp_ext.demo.prompts import Prompt, assemble
from csp_ext.demo.report import decoded
from csp_ext.demo.run import Run
from csp_ext.evaluation.tasks import Sample, make_samples
from csp_ext.methods import make_method

# Longer than any answer; the model ends its answer itself.
NEW_TOKENS = 24
NAMED_IMAGE = re.compile(r"(\w+) <image>")


@dataclass(frozen=True)
class Attempt:
    """One way to keep the prompt's cache, and what came of it.

    Attributes
    ----------
    method : str
        Key of ``csp_ext.methods.METHODS``.
    budget : str
        As people read it.
    run : Run
        Its name is unique among the attempts.
    """

    method: str
    budget: str
    run: Run


@dataclass(frozen=True)
class Question:
    """A sample with the attempts to answer it; the first one has the full cache.

    Attributes
    ----------
    sample : Sample
    prompt : Prompt
        The sample, tokenised.
    words : list of str
        One per token of the prompt.
    attempts : list of Attempt
    answers : tuple of str
        One per attempt once they have run, see :meth:`answered`; before that empty.
    """

    sample: Sample
    prompt: Prompt
    words: list[str]
    attempts: list[Attempt]
    answers: tuple[str, ...] = ()

    def answered(self, processor: Any) -> Question:
        """Return the question with what its attempts generated as `answers`."""
        return replace(
            self, answers=tuple(decoded(processor, attempt.run.tokens) for attempt in self.attempts)
        )

    def shortened(self, answer: str) -> str:
        """Cut off what goes on after the right answer would have ended."""
        said, words = answer.split(), len(self.sample.answer.split())
        return answer if len(said) <= words else " ".join([*said[:words], "..."])


def attempts(budgets: dict[str, int | float], baseline: str) -> list[Attempt]:
    """Return the full cache, then CSP and a baseline at each budget, none of them run yet."""
    tried = [Attempt("full", "100 %", Run("full"))]
    for label, budget in budgets.items():
        for method in ("csp", baseline):
            tried.append(Attempt(method, label, Run(f"{method} {label}", make_method(method, budget=budget))))
    return tried


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: for a model this small, waiting for a second one costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw_sample(task: str, seed: int) -> Sample:
    """Draw one sample of a task.

    Raises
    ------
    UserError
        If there is no such task.
    """
    try:
        return make_samples(task, 1, seed)[0]
    except ValueError as error:
        raise UserError(first_line(error)) from None


def pose(model: Any, processor: Any, sample: Sample, attempts: list[Attempt]) -> Question:
    """Tokenise a sample; its images are called what the prompt calls them."""
    names = NAMED_IMAGE.findall(sample.prompt)
    images = [Photograph(name, image) for name, image in zip(names, sample.images, strict=True)]
    prompt = assemble(processor, model, sample.prompt, images)
    words = processor.tokenizer.convert_ids_to_tokens(prompt.inputs["input_ids"][0].tolist())
    return Question(sample, prompt, words, attempts)
