"""Trains the evaluation model from scratch: captions, then questions in ever larger contexts."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from csp_ext.demo.console import UserError, replacing
from csp_ext.evaluation.align import align, image_tokens
from csp_ext.evaluation.architecture import HEADS, build_model
from csp_ext.evaluation.forward import Blocks, decode
from csp_ext.evaluation.muon import Muon
from csp_ext.evaluation.tasks import TASKS, Questions, ask
from csp_ext.evaluation.vocabulary import IMAGE
from csp_ext.evaluation.world import Contexts, Layout, sample_contexts

# From which share of the run on: fewest and most photos of a context, and the share of the tokens of a batch.
CURRICULUM = (
    (0.0, 2, 2, 0.35),
    (0.1, 2, 4, 0.5),
    (0.25, 4, 8, 0.7),
    (0.45, 6, 12, 1.0),
    (0.7, 8, 16, 1.0),
)
# Every task keeps this chance of being drawn, however well it goes.
FLOOR = 0.1
MEMORY = 0.9
DECAY_FROM = 0.55
CLIP = 1.0
STATE = "training.pt"


@dataclass(frozen=True)
class Plan:
    """What a run does; part of its state, so that it cannot be resumed as another.

    Attributes
    ----------
    seed : int
        Of weights, data and everything else.
    num_kv_heads : int
        4, or 2 for grouped-query attention.
    steps, caption_steps : int
        Batches of questions; batches of images before them.
    tokens : int
        Most tokens of a batch.
    slots : int
        Questions per context.
    matrix_lr, attention_lr, vector_lr, embedding_lr : float
        Of Muon for the decoder's matrices, for queries and keys; of AdamW for norms and head, and for the
        embeddings, which must stay what the images were aligned with.
    lse, lse_weight : float
        A row of attention logits costs ``lse_weight * (its log-sum-exp - lse) ** 2``.
    lse_rows : int
        Rows of a batch that are looked at for it.
    """

    seed: int = 0
    num_kv_heads: int = HEADS
    steps: int = 650
    caption_steps: int = 700
    tokens: int = 8000
    slots: int = 12
    matrix_lr: float = 0.02
    attention_lr: float = 0.01
    vector_lr: float = 2e-3
    embedding_lr: float = 2e-4
    lse: float = 4.0
    lse_weight: float = 1e-3
    lse_rows: int = 48


QUICK = Plan(steps=6, caption_steps=4, tokens=1500, slots=8)


@dataclass
class Progress:
    """Where a run stands.

    Attributes
    ----------
    step : int
        Steps done.
    seconds, cpu_seconds : float
        Time spent, over all sittings: on the wall and by the processor.
    caption_accuracy : float
        Share of cells the vision tower names rightly.
    loss : float
        Cross entropy per answer token, of the last batch.
    lse : list of float
        Mean log-sum-exp of the attention logits per layer, of the last batch.
    exact : dict of float
        Running exact match per task, on fresh samples and with the true answer as input.
    photos : int
        Images per context of the last batch.
    """

    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    caption_accuracy: float = 0.0
    loss: float = math.nan
    lse: list[float] = field(default_factory=list)
    exact: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TASKS, 0.0))
    photos: int = 0


class Trainer:
    """A run that can stop after any step and go on from there.

    Parameters
    ----------
    plan : Plan
        What to do.
    minutes : float, optional
        Wall-clock time to squeeze the run into: the curriculum and the learning rates follow the clock where
        it is ahead of the steps. Without it the result depends on the plan alone.
    """

    def __init__(self, plan: Plan, minutes: float | None = None) -> None:
        self.plan = plan
        self.limit = None if minutes is None else 60 * minutes
        self.progress = Progress()
        self.rng = np.random.default_rng([plan.seed, 2])
        self.model: Any = build_model(plan.seed, plan.num_kv_heads)
        self.decoder = self.model.model.language_model
        matrices: dict[bool, list[Tensor]] = {True: [], False: []}
        vectors: list[Tensor] = [self.model.lm_head.weight]
        for name, parameter in self.decoder.named_parameters():
            if "embed_tokens" in name:
                continue
            if parameter.ndim == 2:
                matrices["q_proj" in name or "k_proj" in name].append(parameter)
            else:
                vectors.append(parameter)
        embedding = [self.decoder.embed_tokens.weight]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(
                [
                    {"params": matrices[False], "lr": plan.matrix_lr},
                    {"params": matrices[True], "lr": plan.attention_lr},
                ]
            ),
            torch.optim.AdamW(
                [{"params": vectors, "lr": plan.vector_lr}, {"params": embedding, "lr": plan.embedding_lr}],
                betas=(0.9, 0.98),
                weight_decay=0.0,
            ),
        ]
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    @property
    def share(self) -> float:
        """How much of the run is done, 0 to 1."""
        by_clock = 0.0 if self.limit is None else self.progress.seconds / self.limit
        return min(1.0, max(self.progress.step / self.plan.steps, by_clock))

    def align(self, report: Callable[[float], None]) -> None:
        """Teach the vision tower; it stays as it is from then on."""
        with self._clock():
            self.progress.caption_accuracy = align(
                self.model, self.plan.seed, self.plan.caption_steps, report
            )

    @contextmanager
    def _clock(self) -> Iterator[None]:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        yield
        self.progress.seconds += time.perf_counter() - begin
        self.progress.cpu_seconds += time.process_time() - begin_cpu

    def step(self) -> None:
        """Learn from one batch."""
        with self._clock():
            self._step()

    def _step(self) -> None:
        contexts, questions = self._draw()
        blocks = Blocks(contexts.layout.length, tuple(q.tokens.shape[1] for q in questions))
        rows = np.sort(self.rng.choice(blocks.length, self.plan.lse_rows, replace=False))
        hidden, lse = decode(self.decoder, self._embed(contexts, questions), blocks, torch.from_numpy(rows))
        loss, exact = self._loss(hidden, questions)
        stray = torch.stack([(layer - self.plan.lse).square().mean() for layer in lse]).sum()
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, (1 - self.share) / (1 - DECAY_FROM))
            optimizer.zero_grad()
        (loss + self.plan.lse_weight * stray).backward()
        torch.nn.utils.clip_grad_norm_(self.optimizers[1].param_groups[0]["params"], CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
        now = self.progress
        for task, hit in exact.items():
            now.exact[task] = MEMORY * now.exact[task] + (1 - MEMORY) * hit
        now.loss, now.lse = float(loss.detach()), [float(layer.detach().mean()) for layer in lse]
        now.photos = contexts.layout.photos
        now.step += 1

    def _draw(self) -> tuple[Contexts, list[Questions]]:
        _, low, high, part = [stage for stage in CURRICULUM if stage[0] <= self.share][-1]
        photos = int(self.rng.integers(low, high + 1))
        layout = Layout(
            photos,
            codes=max(2, photos // 2),
            pins=max(2, photos // 3),
            links=max(2, photos // 2),
            fillers=int(self.rng.integers(0, 2 * photos + 1)),
        )
        chance = np.array([FLOOR + 1 - self.progress.exact[task] for task in TASKS])
        tasks = self.rng.choice(list(TASKS), self.plan.slots, p=chance / chance.sum())
        # An answer and its question have 20 tokens or so.
        batch = int(part * self.plan.tokens) // (layout.length + 20 * len(tasks))
        contexts = sample_contexts(self.rng, layout, max(1, batch))
        return contexts, [ask(self.rng, contexts, str(task)) for task in tasks]

    def _embed(self, contexts: Contexts, questions: list[Questions]) -> Tensor:
        tokens = torch.from_numpy(np.concatenate([contexts.tokens, *(q.tokens for q in questions)], 1))
        embedded = self.decoder.embed_tokens(tokens)
        with torch.no_grad():
            images = image_tokens(self.model.model, contexts.pixels.reshape(-1, *contexts.pixels.shape[2:]))
        shown = images.reshape(len(tokens), contexts.layout.photos, *images.shape[1:])
        # The images stand in the order of the text.
        return embedded.masked_scatter((tokens == IMAGE)[..., None], shown)

    def _loss(self, hidden: Tensor, questions: list[Questions]) -> tuple[Tensor, dict[str, float]]:
        predictions, targets, offset = [], [], 0
        for q in questions:
            predictions.append(hidden[:, offset + q.answer - 1 : offset + q.tokens.shape[1] - 1])
            targets.append(torch.from_numpy(q.tokens[:, q.answer :]))
            offset += q.tokens.shape[1]
        logits, target = self.model.lm_head(torch.cat(predictions, 1)), torch.cat(targets, 1)
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        right = logits.argmax(-1) == target
        hits: dict[str, list[float]] = {}
        for q, part in zip(questions, right.split([t.shape[1] for t in targets], 1), strict=True):
            hits.setdefault(q.task, []).append(float(part.all(1).float().mean()))
        return loss, {task: float(np.mean(values)) for task, values in hits.items()}

    def save(self, folder: Path) -> None:
        """Write everything that the next step depends on, atomically."""
        state = {
            "plan": asdict(self.plan),
            "progress": asdict(self.progress),
            "rng": json.dumps(self.rng.bit_generator.state),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        with replacing(folder / STATE) as path:
            torch.save(state, path)

    def load(self, folder: Path) -> None:
        """Go on from where :meth:`save` was called.

        Raises
        ------
        UserError
            If the folder holds no run, or one with another plan.
        """
        path = folder / STATE
        if not path.is_file():
            raise UserError(f"{folder} holds no interrupted training ({STATE})")
        try:
            state = torch.load(path, weights_only=True)
        except Exception as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if state["plan"] != asdict(self.plan):
            differ = [name for name, value in asdict(self.plan).items() if state["plan"].get(name) != value]
            raise UserError(f"{path} belongs to a run with another {', '.join(differ)}")
        self.progress = Progress(**state["progress"])
        self.rng.bit_generator.state = json.loads(state["rng"])
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
