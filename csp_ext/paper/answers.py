"""What the studies of answers share: running the arms, and the parts of the data they are told for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from csp_ext.demo.console import UserError
from csp_ext.evaluation.arms import Arm
from csp_ext.evaluation.facts import run_facts
from csp_ext.evaluation.results import Mean, Record, groups, labels, mean
from csp_ext.evaluation.runner import keys, run
from csp_ext.evaluation.store import Store
from csp_ext.evaluation.tables import PROTOCOL
from csp_ext.paper.request import Request, Subject, Tell

ALL = "all"
METRICS = {
    "exact_match": "the whole answer right",
    "multiple_choice": "the right option",
    "token_match": "the reference among the answer's words",
    "contains": "the reference in the answer",
    "rouge_l": "ROUGE-L",
    "token_accuracy": "words right",
}
RECORDS = "records"


def answered(request: Request, subject: Subject, arms: Sequence[Arm], tell: Tell) -> list[Record]:
    """Answer every sample with every arm, or what is left of that in the folder of the results.

    Raises
    ------
    UserError
        If no sample can be used.
    """
    described: dict[str, Any] = {
        "study": request.name,
        "model": subject.described(),
        "data": {
            f"{dataset.name}, seed {seed}": len(dataset.samples)
            for seed, of_seed in request.datasets.items()
            for dataset in of_seed
        },
        "arms": [asdict(arm) for arm in arms],
        **asdict(request.settings),
    }
    # Other settings, another folder: what was measured before is never in the way.
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]
    store = Store(request.out / RECORDS / digest, described, run_facts(), resume=True)
    run(subject.model, subject.processor, request.datasets, arms, request.settings, store, tell)
    store.finish(keys(request.datasets, arms))
    records = store.records()
    if not records:
        problem = store.problems()[0]
        raise UserError(f"no sample could be used; the first: {problem['file']}: {problem['reason']}")
    return records


def parts(records: Sequence[Record]) -> dict[str, Callable[[str], Mean]]:
    """Return what gives an arm's mean score on all data sets, then on each group."""
    names = groups(records)

    def of(**where: str) -> Callable[[str], Mean]:
        return lambda arm: mean(records, arm, **where)

    return {ALL: of(), **({name: of(group=name) for name in names} if len(names) > 1 else {})}


def plain(records: Sequence[Record], **more: Any) -> list[dict[str, Any]]:
    """Return every arm's scores on every part, for a CSV file."""
    first = {record["arm"]: record for record in reversed(records)}
    result = []
    for part, score in parts(records).items():
        for arm in labels(records):
            found = score(arm)
            result.append(
                {
                    **more,
                    "arm": arm,
                    "method": first[arm]["method"],
                    "budget": first[arm]["budget"],
                    "group": part,
                    "score": found.value,
                    "error": found.error,
                    "samples": found.count,
                }
            )
    return result


def about(request: Request, records: Sequence[Record]) -> list[str]:
    """Return what the scores are."""
    metrics = dict.fromkeys(METRICS[record["metric"]] for record in records)
    return [
        f"{PROTOCOL[request.settings.protocol]} (protocol {request.settings.protocol}).",
        f"Score: {', '.join(metrics)}; x 100, ± standard error over the samples; "
        "a group's is the unweighted mean of its data sets.",
        request.asked(len({(r["seed"], r["dataset"], r["sample_id"]) for r in records})),
    ]
