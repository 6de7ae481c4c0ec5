"""Runs an evaluation: a batch of prompts once over the full cache, then every arm from its pruned cache."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import csp_ext
from csp_ext.demo.console import UserError, first_line
from csp_ext.evaluation.arms import FULL, ORACLE, Arm
from csp_ext.evaluation.batches import batches
from csp_ext.evaluation.checkpoint import NEW_TOKENS
from csp_ext.evaluation.encoding import Encoder, Ready, annotation
from csp_ext.evaluation.items import Dataset, Item, Problem
from csp_ext.evaluation.memory import give_back
from csp_ext.evaluation.metrics import METRICS
from csp_ext.evaluation.settings import PROTOCOLS, Settings
from csp_ext.evaluation.store import Key, Store
from csp_ext.evaluation.tasks import TASKS
from csp_ext.integration.modality import modality_of_ids, placeholder_ids
from csp_ext.integration.recording import Recording
from csp_ext.integration.stats import PruneStats

# Greedy in every respect, whatever the checkpoint's generation config says.
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}


Datasets = Mapping[int, Sequence[Dataset]]


def keys(datasets: Datasets, arms: Sequence[Arm]) -> list[Key]:
    """Return the keys of all records, in the order that a finished run has them in."""
    return [
        (seed, dataset.name, item.sample_id, arm.label)
        for seed, of_seed in datasets.items()
        for dataset in of_seed
        for item in dataset.samples
        for arm in arms
    ]


def run(
    model: Any,
    processor: Any,
    datasets: Datasets,
    arms: Sequence[Arm],
    settings: Settings,
    store: Store,
    progress: Callable[[int, int], None],
) -> None:
    """Evaluate all arms on all samples that the store does not have yet.

    Parameters
    ----------
    model : PreTrainedModel
        On its device, in evaluation mode; the pruning is undone at the end.
    processor : ProcessorMixin
        Its processor.
    datasets : mapping
        The data sets of each seed, in the order of the tables.
    arms : sequence of Arm
        Their labels must differ.
    settings : Settings
        How.
    store : Store
        Gets one record per sample and arm, batch by batch, and what was left out. Of several processes each
        takes every n-th batch.
    progress : callable
        Told how many records of this process are there, and how many there will be.

    Raises
    ------
    UserError
        If the model cannot be pruned, or an arm cannot prune a prompt.
    """
    labels = [arm.label for arm in arms]
    if not arms or len(set(labels)) < len(labels):
        raise ValueError(f"arms must have different labels, got {', '.join(labels) or 'none'}")
    encoder, handle = _start(model, processor, settings)
    work = [
        (seed, dataset, batch)
        for seed in settings.seeds
        for dataset in datasets[seed]
        for batch in batches(dataset, settings.batch_images)
    ][store.rank :: store.count]
    total, done = sum(len(batch) for _, _, batch in work) * len(arms), 0
    with handle:
        progress(done, total)
        for seed, dataset, batch in work:
            if not all(store.has(seed, item, labels) for item in batch):
                rows = _Batch(encoder, handle, settings, seed, dataset)
                records = list(rows.records(batch, arms))
                store.add(records, seed, dataset.name, rows.problems)
                give_back()
            done += len(batch) * len(arms)
            progress(done, total)


def check(model: Any, processor: Any, settings: Settings) -> None:
    """Find out whether a model can be evaluated, before anything is written; raise UserError if not."""
    _start(model, processor, settings)[1].restore()


def _start(model: Any, processor: Any, settings: Settings) -> tuple[Encoder, csp_ext.Handle]:
    encoder = Encoder(model, processor, settings.template, settings.context_len)
    try:
        return encoder, csp_ext.apply(model, method=FULL)
    except ValueError as error:
        raise UserError(first_line(error)) from error


class _Batch:
    """One batch of samples of a data set."""

    def __init__(
        self, encoder: Encoder, handle: csp_ext.Handle, settings: Settings, seed: int, dataset: Dataset
    ) -> None:
        self.encoder, self.handle, self.settings = encoder, handle, settings
        self.seed, self.dataset = seed, dataset
        self.problems: list[Problem] = []
        short = dataset.name in TASKS and dataset.metric == "exact_match"
        self.new_tokens = min(settings.max_new_tokens, NEW_TOKENS) if short else settings.max_new_tokens

    def records(self, items: Sequence[Item], arms: Sequence[Arm]) -> Iterator[dict[str, Any]]:
        """Generate with every arm; samples that cannot be used go to the problems."""
        prepared = [self.encoder.prepare(item) for item in items]
        self.problems += [problem for problem in prepared if isinstance(problem, Problem)]
        ready, inputs, problems = self.encoder.encode([one for one in prepared if isinstance(one, Ready)])
        self.problems += problems
        if not ready:
            return
        if self.settings.protocol == "aware":
            yield from self._arms(ready, inputs, 0, arms)
            return
        for length, group in self._by_question(ready, inputs).items():
            if len(group) < len(ready):
                _, inputs, _ = self.encoder.encode(group)
            yield from self._arms(group, inputs, length, arms)

    def _by_question(self, ready: list[Ready], inputs: dict[str, Any]) -> dict[int, list[Ready]]:
        """Group samples by the tokens of their question, so that nothing has to be padded inside a row."""
        groups: dict[int, list[Ready]] = {}
        model: Any = self.handle.model
        modality = modality_of_ids(inputs["input_ids"], placeholder_ids(model.config))
        for row, one in enumerate(ready):
            own = modality[row][inputs["attention_mask"][row] != 0]
            length = self.encoder.question_length(one, own)
            if length < len(own):
                groups.setdefault(length, []).append(one)
            else:
                reason = "nothing stands before the question, so there is nothing to prune"
                self.problems.append(Problem(annotation(one.item), one.item.sample_id, reason))
        return groups

    def _arms(
        self, ready: list[Ready], inputs: dict[str, Any], question: int, arms: Sequence[Arm]
    ) -> Iterator[dict[str, Any]]:
        """Prune all but the last `question` tokens with every arm and generate."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        length = ids.shape[1] - question
        recorded = {
            name: value[:, :length] if isinstance(value, Tensor) and value.shape == ids.shape else value
            for name, value in inputs.items()
        }
        recording = Recording.of(self.handle, recorded)
        logits = recording.logits
        longest = int(mask[:, :length].sum(-1).max())
        draw = zlib.crc32(f"{self.seed} {self.dataset.name} {ready[0].item.sample_id}".encode())
        answer: Tensor | None = None
        # The oracle's queries come after the prompt, where no other method may see them: it goes last.
        for arm in sorted(arms, key=lambda arm: arm.method == ORACLE):
            begin = time.perf_counter()
            try:
                method = arm.make(longest, draw=draw)
                if arm.method == ORACLE:
                    if answer is None:
                        answer = self._answer(recording, ready, ids[:, length:])
                    method = replace(method, answer=answer)  # type: ignore[type-var]
                cache, stats = recording.pruned(method, length=length)
            except ValueError as error:
                raise UserError(f"{arm.label} cannot prune {longest} tokens: {first_line(error)}") from error
            if question:
                tokens = self._generate(ids, mask, cache, self.new_tokens)
            else:
                # The prompt's own last row gives the first token: it never sees a pruned cache.
                tokens = self._continue(ids, mask, cache, logits.argmax(-1, keepdim=True))
            seconds = (time.perf_counter() - begin) / len(ready)
            kept = _kept(stats, recording.modality[:, :length])
            texts = self._texts(tokens)
            for row, (one, text) in enumerate(zip(ready, texts, strict=True)):
                yield self._record(one.item, arm, text) | {
                    "tokens": arm.tokens(longest),
                    "prompt_tokens": int(mask[row].sum()),
                    "context_tokens": int(mask[row, :length].sum()),
                    **{name: value[row] for name, value in kept.items()},
                    "seconds": round(seconds, 6),
                }

    def _record(self, item: Item, arm: Arm, text: str) -> dict[str, Any]:
        metric = self.dataset.metric
        return {
            "dataset": self.dataset.name,
            "group": self.dataset.group,
            "level": item.level,
            "sample_id": item.sample_id,
            "seed": self.seed,
            "arm": arm.label,
            "name": arm.name,
            "method": arm.method,
            "budget": arm.budget,
            "protocol": self.settings.protocol,
            "prediction": text,
            "reference": item.response,
            "metric": metric,
            "score": METRICS[metric](text, item.response, item.choices),
        }

    def _answer(self, recording: Recording, ready: list[Ready], question: Tensor) -> Tensor:
        """Run question and right answer over the full cache; say which of these queries are the answer's."""
        tokens, real = self.encoder.answers(ready)
        recording.extend(torch.cat([question, tokens], dim=1))
        return real

    def _continue(self, ids: Tensor, mask: Tensor, cache: Any, first: Tensor) -> Tensor:
        if self.new_tokens == 1 or all(int(token) in self._ends() for token in first):
            return first
        mask = torch.cat([mask, torch.ones_like(first)], dim=1)
        more = self._generate(torch.cat([ids, first], dim=1), mask, cache, self.new_tokens - 1)
        return torch.cat([first, more], dim=1)

    def _generate(self, ids: Tensor, mask: Tensor, cache: Any, room: int) -> Tensor:
        output = self.handle.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=room,
            pad_token_id=self.encoder.tokenizer.pad_token_id,
            **GREEDY,
        )
        return output[:, ids.shape[1] :]

    def _ends(self) -> set[int]:
        model: Any = self.handle.model
        end = model.generation_config.eos_token_id
        return set() if end is None else {end} if isinstance(end, int) else set(end)

    def _texts(self, tokens: Tensor) -> list[str]:
        """Return the answers up to their end of sequence."""
        ends = self._ends()
        rows = []
        for row in tokens.tolist():
            stop = next((at for at, token in enumerate(row) if token in ends), len(row))
            rows.append(self.encoder.tokenizer.decode(row[:stop], skip_special_tokens=True).strip())
        return rows


def _kept(stats: PruneStats, modality: Tensor) -> dict[str, list[float | None]]:
    """Return per row the tokens kept and the shares of text and image kept: means over layers and heads."""
    modality = modality.cpu()
    classes = {"kept": modality >= 0, "text_kept": modality == 0, "image_kept": modality > 0}
    sums = {name: torch.zeros(len(modality), dtype=torch.float64) for name in classes}
    for layer in stats.layers:
        indices = layer.indices
        for name, of_class in classes.items():
            rows = of_class[:, None].expand(-1, indices.shape[1], -1)
            hits = rows.gather(-1, indices.clamp_min(0).long()) & (indices >= 0)
            sums[name] += hits.sum(-1).double().mean(-1) / len(stats.layers)
    result: dict[str, list[float | None]] = {"kept": [round(value, 4) for value in sums["kept"].tolist()]}
    for name in ("text_kept", "image_kept"):
        counts = classes[name].sum(-1).tolist()
        result[name] = [
            round(value / count, 6) if count else None
            for value, count in zip(sums[name].tolist(), counts, strict=True)
        ]
    return result


__all__ = ["PROTOCOLS", "Datasets", "Settings", "check", "keys", "run"]
