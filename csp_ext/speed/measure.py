"""All arms at all batches, taking turns in rounds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from csp_ext.speed.arms import Arm, make_arms
from csp_ext.speed.bandwidth import measure_bandwidth
from csp_ext.speed.clock import paired, quartiles
from csp_ext.speed.memory import exact_resident_set, quick_collections, settle
from csp_ext.speed.shapes import step_weight_bytes
from csp_ext.speed.turn import PROFILED, WARM_STEPS, Forward, Turn, take_turn
from csp_ext.speed.workload import Workload, slot_bytes

Tell = Callable[[int, int, str], None]
# The round before the clock starts: on a GPU it compiles, on a CPU it measures memory, which costs time.
REHEARSAL = -1
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
    peaks : list of int
        Most bytes held beside model and inputs, one per turn that watched.
    failure : str
        Why there are no turns.
    """

    arm: Arm
    batch: int
    turns: list[Turn] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
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
        # The last prefill was profiled, which takes time.
        return statistics.median(turn.first_s for turn in self.turns[:-1] or self.turns)

    @property
    def prune(self) -> float | None:
        """Part of the prefill that goes into scoring, selecting and compacting; None: nothing is pruned."""
        return self.turns[-1].prune

    @property
    def peak(self) -> int | None:
        """Most bytes held beside the model; None where the system does not say."""
        return int(statistics.median(self.peaks)) if self.peaks else None

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
    done, total = 0, len(arms) * (1 + settings.rounds) * len(settings.batches)
    # Libraries load at first use, into somebody's memory and time.
    single = workload.inputs(model, 1)
    for arm in {arm.kind: arm for arm in arms}.values():
        take_turn(model, single, arm, settings.new_tokens, None, rehearsal=True)
    rows = [Row(arm, batch) for batch in settings.batches for arm in arms]
    with quick_collections(), _compiled(model, settings) as compiled:
        # All rehearsals first: what timed turns leave in the heap would be taken for a peak.
        for rounds in ([REHEARSAL], range(settings.rounds)):
            for batch in settings.batches:
                inputs = workload.inputs(model, batch)
                of_batch = [row for row in rows if row.batch == batch]
                for round_, row in itertools.product(rounds, of_batch):
                    tell(done, total, f"batch {batch}")
                    _add_turn(model, inputs, row, settings, compiled, round_)
                    done += 1
    tell(total, total, "done")
    weights = step_weight_bytes(model)
    return Measured(rows, bandwidth, weights, slot_bytes(model.config, model.dtype), workload.tokens)


def _add_turn(
    model: Any,
    inputs: Mapping[str, Tensor],
    row: Row,
    settings: Settings,
    compiled: Forward | None,
    round_: int,
) -> None:
    """Add one turn to a row, or the reason why it can have none."""
    if row.failure:
        return
    on_gpu, rehearsal = model.device.type == "cuda", round_ == REHEARSAL
    turn = partial(take_turn, model, inputs, row.arm, settings.new_tokens)
    try:
        if not rehearsal:
            result = turn(compiled, profiled=round_ == settings.rounds - 1)
        elif on_gpu:
            result = turn(compiled, rehearsal=True)
        else:
            with exact_resident_set(model.device):
                result = turn(None, rehearsal=True)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        row.failure = "out of memory"
    else:
        if not rehearsal:
            row.turns.append(result)
        if result.peak is not None and on_gpu != rehearsal:
            row.peaks.append(result.peak)
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
    # Every arm has a graph of its own sizes, as in a process that knows no other; a CUDA graph is recorded
    # again for the buffers of each turn.
    compiled = torch.compile(model.__call__, backend=settings.backend, dynamic=False, **options)
    graphs = len(settings.batches) * (len(settings.budgets) + 2)
    dynamo = torch._dynamo.config.patch(recompile_limit=2 * graphs)
    inductor = torch._inductor.config.patch({"triton.cudagraph_unexpected_rerecord_limit": 10_000})
    try:
        with dynamo, inductor:
            yield compiled
    finally:
        torch.compiler.reset()
