"""All arms at all batches, taking turns in rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from csp_ext.speed.arms import Arm, make_arms
from csp_ext.speed.bandwidth import measure_bandwidth
from csp_ext.speed.clock import paired, quartiles
from csp_ext.speed.memory import settle
from csp_ext.speed.shapes import step_weight_bytes
from csp_ext.speed.turn import PROFILED, WARM_STEPS, Forward, Turn, prune_share, take_turn
from csp_ext.speed.workload import Workload, slot_bytes

Tell = Callable[[int, int, str], None]
# Warm-up, profile, and steps enough between them for a median.
FEWEST_TOKENS = 1 + WARM_STEPS + PROFILED + 3


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes
    ----------
    batches : tuple of int
        Rows.
    budgets : tuple of float
        Shares of the prompt.
    new_tokens : int
        Per row.
    rounds : int
        Turns of every arm.
    compiled : bool
        Whether steps of static caches go through ``torch.compile``.
    backend : str
        Of ``torch.compile``.
    quick : bool
        Whether rough numbers will do.
    """

    batches: tuple[int, ...]
    budgets: tuple[float, ...]
    new_tokens: int
    rounds: int
    compiled: bool
    backend: str = "inductor"
    quick: bool = False


@dataclass
class Row:
    """What was measured of one arm at one batch.

    Attributes
    ----------
    arm : Arm
        Which one.
    batch : int
        Rows of the prompt.
    turns : list of Turn
        One per round.
    prune : float or None
        Part of the prefill that goes into scoring, selecting and compacting; None: nothing is pruned.
    failure : str
        Why there are no turns.
    """

    arm: Arm
    batch: int
    turns: list[Turn] = field(default_factory=list)
    prune: float | None = None
    failure: str = ""

    @property
    def step_s(self) -> float:
        """Seconds of the middle step."""
        return statistics.median(self._steps)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """Seconds of a fast and of a slow step."""
        return quartiles(self._steps)

    @property
    def _steps(self) -> list[float]:
        return [seconds for turn in self.turns for seconds in turn.step_s]

    @property
    def first_s(self) -> float:
        """Seconds from the prompt to its first new token."""
        return statistics.median(turn.first_s for turn in self.turns)

    @property
    def peak(self) -> int | None:
        """Most bytes held beside the model."""
        known = [turn.peak for turn in self.turns if turn.peak is not None]
        return int(statistics.median(known)) if known else None

    def relative_to(self, other: Row) -> float:
        """Return the time of a step as a share of another arm's, round by round."""
        ours, theirs = ([statistics.median(turn.step_s) for turn in row.turns] for row in (self, other))
        return paired(ours, theirs)


@dataclass(frozen=True)
class Measured:
    """All that was measured of one model.

    Attributes
    ----------
    rows : list of Row
        Batch by batch, in the order of the arms.
    bandwidth : float
        Bytes a second that this machine reads.
    weights : int
        Bytes of weights that a step reads.
    slot : int
        Bytes of one token's keys and values in all layers.
    tokens : int
        Of the prompt, per row.
    """

    rows: list[Row]
    bandwidth: float
    weights: int
    slot: int
    tokens: int

    def find(self, batch: int, kind: str, budget: float | None = 1.0) -> Row | None:
        """Return the row of an arm if it was measured."""
        for row in self.rows:
            arm = row.arm
            if (row.batch, arm.kind, arm.budget) == (batch, kind, budget) and row.turns:
                return row
        return None

    def of_batch(self, batch: int) -> list[Row]:
        """Return the rows of a batch."""
        return [row for row in self.rows if row.batch == batch]

    @property
    def batches(self) -> list[int]:
        """The batches, each one once."""
        return list(dict.fromkeys(row.batch for row in self.rows))


def measure(model: Any, workload: Workload, settings: Settings, tell: Tell) -> Measured:
    """Measure every arm at every batch.

    Parameters
    ----------
    model : PreTrainedModel
        A LLaVA; left as it was.
    workload : Workload
        Its prompts.
    settings : Settings
        What to measure.
    tell : callable
        Told how many turns are done, of how many, and at which batch.

    Returns
    -------
    Measured
        An arm that ran out of memory has a row that says so.
    """
    bandwidth = measure_bandwidth(model.device, settings.quick)
    arms = make_arms(settings.budgets, workload.tokens)
    plan = [(batch, _warm_rounds(model, batch, settings)) for batch in settings.batches]
    done, total = 0, sum(len(arms) * (warm + settings.rounds) for _, warm in plan)
    rows: list[Row] = []
    with _compiled(model, settings) as compiled:
        for batch, warm in plan:
            inputs = workload.inputs(model, batch)
            of_batch = [Row(arm, batch) for arm in arms]
            for round_ in range(-warm, settings.rounds):
                for row in of_batch:
                    tell(done, total, f"batch {batch}")
                    _add_turn(model, inputs, row, settings, compiled, round_)
                    done += 1
            rows += of_batch
    tell(total, total, "done")
    weights = step_weight_bytes(model)
    return Measured(rows, bandwidth, weights, slot_bytes(model.config, model.dtype), workload.tokens)


def _warm_rounds(model: Any, batch: int, settings: Settings) -> int:
    """Return how many rounds come before the clock starts.

    On a GPU one at every batch, which compiles; a CPU needs to have run everything once, at any batch.
    """
    first = batch == min(settings.batches) == settings.batches[0]
    return 1 if first or settings.compiled or model.device.type == "cuda" else 0


def _add_turn(
    model: Any,
    inputs: Mapping[str, Tensor],
    row: Row,
    settings: Settings,
    compiled: Forward | None,
    round_: int,
) -> None:
    """Add one turn to a row, or the reason why it can have none; rounds below 0 warm up."""
    if row.failure:
        return
    last = round_ == settings.rounds - 1
    try:
        turn = take_turn(model, inputs, row.arm, settings.new_tokens, compiled, profiled=last)
        if last and row.arm.kind == "csp" and row.arm.budget not in (None, 1.0):
            row.prune = prune_share(model, inputs, row.arm)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        row.failure = "out of memory"
    else:
        if round_ >= 0:
            row.turns.append(turn)
    if row.failure:  # outside of the handler, whose error holds the tensors
        row.turns.clear()
        settle(model.device)


def _is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory ran out: torch has no error of its own for that on a CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def _compiled(model: Any, settings: Settings) -> Iterator[Forward | None]:
    """Give the model's call, compiled as ``generate`` compiles it, or None."""
    if not settings.compiled:
        yield None
        return
    options: dict[str, Any] = {"mode": "reduce-overhead"} if settings.backend == "inductor" else {}
    compiled = torch.compile(model.__call__, backend=settings.backend, **options)
    # Every batch may have graphs of its own, and two kinds of caches share the code of one forward.
    with torch._dynamo.config.patch(recompile_limit=8 * len(settings.batches) + 16):
        yield compiled
    torch.compiler.reset()
