"""A whole evaluation, as ``csp eval`` runs it: data, model, arms, a folder of results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from csp_ext.demo import checkpoint
from csp_ext.demo.console import UserError
from csp_ext.evaluation import sources
from csp_ext.evaluation.arms import arms_of
from csp_ext.evaluation.checkpoint import load_eval_model
from csp_ext.evaluation.facts import run_facts
from csp_ext.evaluation.items import Dataset, Problem
from csp_ext.evaluation.milebench import read_datasets
from csp_ext.evaluation.processes import Processes
from csp_ext.evaluation.runner import Settings, check, keys, run
from csp_ext.evaluation.store import Store, check_folder
from csp_ext.evaluation.tasks import SUITE_LAYOUT

SUITE_SAMPLES = 32
# Images per batch: MileBench's, and 16 samples of the generated suite.
BATCH_IMAGES = 24
SUITE_BATCH_IMAGES = 16 * SUITE_LAYOUT.photos


@dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes
    ----------
    out : Path
        Folder of the results.
    data : Path or None
        A MileBench root; None: the generated suite, written into `out`.
    adversarial : bool
        Whether to take the adversarial annotations of the root.
    combined : int
        Into how many images each sample's were combined in the root; 0: not at all.
    datasets : tuple of str
        Which data sets, or tasks of the suite; empty: all.
    samples : int or None
        The first so many of each data set; None: all, 32 of the generated suite.
    model : Path or None
        A local checkpoint; None: the model that comes with the package.
    methods, budgets
        Every method at every budget.
    settings : Settings
        A `context_len` of None leaves room for the answer in the model's positions, for data from files.
    device, dtype : str
        As in ``csp generate``.
    threads : int or None
        Of torch; None: its own choice.
    resume : bool
        Whether to go on with the run in `out`.
    """

    out: Path
    methods: tuple[str, ...]
    budgets: tuple[float | int, ...]
    settings: Settings
    data: Path | None = None
    adversarial: bool = False
    combined: int = 0
    datasets: tuple[str, ...] = ()
    samples: int | None = None
    model: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    threads: int | None = None
    resume: bool = False


def evaluate(request: Request, progress: Callable[[int, int], None]) -> Store:
    """Run an evaluation, or what is left of it.

    Parameters
    ----------
    request : Request
        What to evaluate.
    progress : callable
        See :func:`csp_ext.evaluation.runner.run`.

    Returns
    -------
    Store
        Finished; of several processes the first has the results.

    Raises
    ------
    UserError
        See the message.
    """
    try:
        arms = arms_of(request.methods, request.budgets)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    if request.data is not None and len(request.settings.seeds) > 1:
        raise UserError("several seeds draw several suites, but the data are given; name one seed")
    if request.data is None and (request.adversarial or request.combined):
        raise UserError("the generated suite has no adversarial annotations and no combined images")
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    place = checkpoint.device_of(request.device)
    processes = Processes.launched(cpu=place.type == "cpu")
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", processes.local_rank)
    processes.first(lambda: check_folder(request.out, request.resume))
    if request.data is None:
        processes.first(lambda: _write_suites(request))
    datasets, problems = {}, {}
    for seed in request.settings.seeds:
        datasets[seed], problems[seed] = _read(request, seed)
    model, processor = _load(request, place)
    settings = request.settings if request.data is None else sources.with_room(request.settings, [model])
    check(model, processor, settings)
    described = {
        "model": "embedded" if request.model is None else str(request.model.resolve()),
        "data": "generated" if request.data is None else str(request.data.resolve()),
        "adversarial": request.adversarial,
        "combined": request.combined,
        "datasets": [dataset.name for dataset in datasets[settings.seeds[0]]],
        "samples": request.samples,
        "arms": [asdict(arm) for arm in arms],
        "device": place.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        **asdict(settings),
    }
    facts = run_facts() | {"processes": processes.count}
    store = Store(request.out, described, facts, resume=request.resume, processes=processes)
    if processes.rank == 0:
        for seed, of_seed in problems.items():
            for problem in of_seed:
                store.add((), seed, problem.file.parent.name, [problem])
    run(model, processor, datasets, arms, settings, store, progress)
    store.finish(keys(datasets, arms))
    return store


def _suite(request: Request, seed: int) -> Path:
    return request.out / "suite" / f"seed{seed}"


def _write_suites(request: Request) -> None:
    """Write what is missing of the suites; a run may have been interrupted here, too."""
    tasks, count = sources.tasks_of(request.datasets), request.samples or SUITE_SAMPLES
    for seed in request.settings.seeds:
        root = _suite(request, seed)
        missing = [task for task in tasks if not (root / task / f"{task}.json").is_file()]
        sources.draw(root, missing, count, seed)


def _read(request: Request, seed: int) -> tuple[list[Dataset], list[Problem]]:
    if request.data is None:
        return read_datasets(_suite(request, seed), sources.tasks_of(request.datasets))
    return sources.read(
        request.data,
        request.datasets,
        request.samples,
        adversarial=request.adversarial,
        combined=request.combined,
    )


def _load(request: Request, place: torch.device) -> tuple[Any, Any]:
    if request.dtype not in checkpoint.DTYPES:
        raise UserError(f"dtype must be one of {', '.join(checkpoint.DTYPES)}, got {request.dtype!r}")
    if request.model is not None:
        return checkpoint.load(request.model, place, request.dtype)
    dtype = torch.float32 if request.dtype == "auto" else getattr(torch, request.dtype)
    model, processor = load_eval_model(dtype=dtype)
    moved: Any = model
    return moved.to(place), processor
