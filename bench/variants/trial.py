"""One batch of questions: its full cache, and whether the answers come out right over a pruned one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from csp_ext.config import slots_of
from csp_ext.evaluation.tasks import Sample
from csp_ext.evaluation.vocabulary import DIGITS, EOS, encode, first
from csp_ext.integration.handle import Handle
from csp_ext.integration.recording import Recording
from variants.catalogue import Variant
from variants.slots import with_slot

Floats = NDArray[np.float64]


class Trial:
    """Samples of one task, whose prompts and answers have one length.

    Every token of an answer is asked for with the true ones before it, so that all are right where greedy
    decoding gives the answer.

    Parameters
    ----------
    handle : Handle
        Of the model.
    processor : LlavaProcessor
        Of the model.
    samples : sequence of Sample
    """

    def __init__(self, handle: Handle, processor: Any, samples: Sequence[Sample]) -> None:
        self._model = handle.model
        inputs = processor(
            text=[sample.prompt for sample in samples],
            images=[image for sample in samples for image in sample.images],
            return_tensors="pt",
        )
        self.answers = torch.tensor([[*encode(sample.answer), EOS] for sample in samples])
        digit = self.answers - first(DIGITS)
        self._needed = (digit >= 0) & (digit < len(DIGITS))
        self.recording = Recording.of(handle, inputs)
        self.length = self.recording.modality.shape[1]
        # What the full cache says: the tokens that come before a prune that is put off.
        self._said = [self.recording.logits.argmax(-1)]

    def wait(self, delay: int) -> None:
        """Let the full cache generate so many tokens; it cannot go back."""
        for at in range(len(self._said) - 1, delay):
            self.recording.extend(self.answers[:, at : at + 1])
            self._said.append(self.recording.logits.argmax(-1))

    def score(self, variant: Variant, budget: float) -> tuple[Floats, Floats]:
        """Return per sample whether the answer is right [B], and the share of its digits that are [B]."""
        self.wait(variant.delay)
        cache, stats = self.recording.pruned(variant.method(slots_of(budget, self.length)))
        if variant.slot:
            cache = with_slot(self.recording, cache, stats, variant.slot)
        right = self._right(cache)
        digits = (right & self._needed).sum(1) / self._needed.sum(1)
        return right.all(1).double().numpy(), digits.double().numpy()

    @torch.inference_mode()
    def _right(self, cache: DynamicCache) -> Tensor:
        delay = len(self._said) - 1
        given = self.answers[:, delay:-1]
        seen = torch.ones(given.shape[0], self.length + delay + given.shape[1], dtype=torch.int64)
        logits = self._model(input_ids=given, past_key_values=cache, attention_mask=seen).logits
        return torch.cat([torch.stack(self._said, 1), logits.argmax(-1)], 1) == self.answers
