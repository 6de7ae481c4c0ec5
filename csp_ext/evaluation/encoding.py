"""From samples to the inputs of a model: text, pictures, padding, and where the question begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csp_ext.demo.console import UserError, first_line
from csp_ext.demo.photographs import read
from csp_ext.evaluation.items import Item, Problem
from csp_ext.evaluation.prompts import Prompt, assemble
from csp_ext.evaluation.truncation import Limit, token_ids

PROBE_SIZE = 336


@dataclass(frozen=True)
class Ready:
    """A sample with its prompt and its pictures in memory."""

    item: Item
    prompt: Prompt
    pictures: tuple[Any, ...]


class Encoder:
    """What turns samples into inputs of one model.

    Parameters
    ----------
    model : PreTrainedModel
        Its device and data type are those of the inputs.
    processor : ProcessorMixin
        Of the model; rows are padded on the left.
    template : str
        See :func:`csp_ext.evaluation.prompts.assemble`.
    context_len : int or None
        What longer prompts are cut to.

    Raises
    ------
    UserError
        If the processor has no image token, or no chat template where the template is "chat".
    """

    def __init__(self, model: Any, processor: Any, template: str, context_len: int | None) -> None:
        self.model, self.processor, self.template = model, processor, template
        self.tokenizer = processor.tokenizer
        token = getattr(processor, "image_token", None) or getattr(self.tokenizer, "image_token", None)
        if not token:
            raise UserError(f"the processor ({type(processor).__name__}) has no image token")
        self.image_token = str(token)
        if template == "chat" and not getattr(processor, "chat_template", None):
            raise UserError("the processor has no chat template; choose the template plain or milebench")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        text = model.config.get_text_config(decoder=True)
        self.most: int | None = getattr(text, "max_position_embeddings", None)
        self.limit = None
        if context_len is not None:
            self.limit = Limit(context_len, self._tokens_per_image(), self.tokenizer)

    def _tokens_per_image(self) -> int:
        from PIL import Image

        probe = Image.new("RGB", (PROBE_SIZE, PROBE_SIZE))
        ids = self.processor(text=self.image_token, images=[probe], return_tensors="pt")["input_ids"]
        wanted = self.tokenizer.convert_tokens_to_ids(self.image_token)
        return max(int((ids == wanted).sum()), 1)

    def prepare(self, item: Item) -> Ready | Problem:
        """Assemble a sample's prompt and load its pictures; say what prevents it."""
        try:
            prompt = assemble(
                item, self.image_token, template=self.template, limit=self.limit, processor=self.processor
            )
        except UserError as error:
            return Problem(annotation(item), item.sample_id, str(error))
        pictures = []
        for path in prompt.images:
            try:
                pictures.append(read(path).image)
            except UserError as error:
                return Problem(path, item.sample_id, str(error))
        return Ready(item, prompt, tuple(pictures))

    def encode(self, batch: Sequence[Ready]) -> tuple[list[Ready], dict[str, Any], list[Problem]]:
        """Return those samples that the model can take, their inputs (empty without any), and the problems.

        The inputs have `input_ids` and `attention_mask` [B, L] int64, padded on the left.
        """
        left, problems = list(batch), []
        while left:
            try:
                inputs = self._process(left)
            except Exception as error:  # processors raise whatever their libraries do
                if len(left) == 1:
                    problems.append(_problem(left[0], f"the processor refuses it: {first_line(error)}"))
                    return [], {}, problems
                refused = [problem for ready in left for problem in self.encode([ready])[2]]
                if not refused:
                    raise
                problems += refused
                ids = {problem.sample_id for problem in refused}
                left = [ready for ready in left if ready.item.sample_id not in ids]
                continue
            lengths = inputs["attention_mask"].sum(-1).tolist()
            long = [self.most is not None and length > self.most for length in lengths]
            if not any(long):
                return left, inputs, problems
            for ready, length, over in zip(left, lengths, long, strict=True):
                if over:
                    problems.append(_problem(ready, f"{length} tokens, but the model takes {self.most}"))
            left = [ready for ready, over in zip(left, long, strict=True) if not over]
        return [], {}, problems

    def _process(self, batch: Sequence[Ready]) -> dict[str, Any]:
        pictures = [picture for ready in batch for picture in ready.pictures]
        output = self.processor(
            text=[ready.prompt.text for ready in batch],
            images=pictures or None,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        inputs = {}
        for name, value in output.items():
            if isinstance(value, Tensor):
                dtype = self.model.dtype if value.is_floating_point() else value.dtype
                value = value.to(self.model.device, dtype)
            inputs[name] = value
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        return inputs

    def question_length(self, ready: Ready, modality: Tensor) -> int:
        """Return how many of a prompt's last tokens are the question: at least 1, and no image.

        Parameters
        ----------
        ready : Ready
            If its question is not known, it is all that follows the last image.
        modality : Tensor
            [L], of its tokens.
        """
        images = (modality > 0).nonzero()
        after_image = len(modality) - (int(images[-1]) + 1 if len(images) else 0)
        start = ready.prompt.question_start
        if start is None:
            return max(after_image, 1)
        # A token that crosses the border belongs to the question.
        whole = token_ids(self.tokenizer, ready.prompt.text)
        front = token_ids(self.tokenizer, ready.prompt.text[:start])
        shared = 0
        for one, other in zip(whole, front, strict=False):
            if one != other:
                break
            shared += 1
        return max(min(len(whole) - shared, after_image), 1)

    def answers(self, batch: Sequence[Ready]) -> tuple[Tensor, Tensor]:
        """Return the right answers' tokens [B, m] int64, padded on the right, and which of them are real."""
        rows = [token_ids(self.tokenizer, ready.item.response) for ready in batch]
        width = max(1, *map(len, rows))
        tokens = torch.full((len(rows), width), self.tokenizer.pad_token_id or 0)
        real = torch.zeros(len(rows), width, dtype=torch.bool)
        for at, row in enumerate(rows):
            tokens[at, : len(row)] = torch.tensor(row, dtype=torch.int64)
            real[at, : len(row)] = True
        return tokens.to(self.model.device), real.to(self.model.device)


def annotation(item: Item) -> Path:
    """Return how a problem calls a sample's annotation."""
    return Path(item.dataset) / f"{item.dataset}.json"


def _problem(ready: Ready, reason: str) -> Problem:
    return Problem(annotation(ready.item), ready.item.sample_id, reason)
