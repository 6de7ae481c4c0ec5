"""An evaluation's results on disk, written batch by batch: an interrupted run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from csp_ext.demo.console import UserError, replacing
from csp_ext.evaluation.items import Item, Problem
from csp_ext.evaluation.processes import Processes

RECORDS, PROBLEMS, RUN = "records.jsonl", "problems.jsonl", "run.json"

# Seed, data set, sample, arm.
Key = tuple[int, str, str, str]


def check_folder(folder: Path, resume: bool) -> None:
    """Refuse a folder that holds a run which is not to be resumed, before any long work."""
    if (folder / RUN).is_file() and not resume:
        raise UserError(f"{folder} holds a run; go on with --resume, or name another folder")


def key_of(record: dict[str, Any]) -> Key:
    """Return what makes a record the only one of its kind."""
    return record["seed"], record["dataset"], record["sample_id"], record["arm"]


class Store:
    """A folder with ``records.jsonl``, ``problems.jsonl`` and ``run.json``.

    Of several processes each writes files of its own, ``records.rank<r>.jsonl``; the first merges them.

    Attributes
    ----------
    rank, count : int
        Which of how many processes this is.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        facts: dict[str, Any],
        *,
        resume: bool = False,
        processes: Processes | None = None,
    ) -> None:
        """Begin a run, or go on with one.

        Parameters
        ----------
        folder : Path
            Created if need be.
        settings : dict
            All that decides about the results, ready for JSON.
        facts : dict
            What else ``run.json`` says; that of the first start stays.
        resume : bool
            Whether to go on with the run in the folder, if there is one.
        processes : Processes, optional
            All that work on this run.

        Raises
        ------
        UserError
            If the folder holds a run and `resume` is not set, or that run has other settings; or it cannot
            be written.
        """
        self.folder, self._processes = folder, processes or Processes()
        self.rank, self.count = self._processes.rank, self._processes.count
        self._processes.first(lambda: self._open(settings, facts, resume))
        self._records = {key_of(record): record for record in self.records()}
        self._problems = {_problem_key(entry): entry for entry in self.problems()}

    def _open(self, settings: dict[str, Any], facts: dict[str, Any], resume: bool) -> None:
        settings = json.loads(json.dumps(settings))
        file = self.folder / RUN
        check_folder(self.folder, resume)
        try:
            if file.is_file():
                _compare(file, settings)
                self._merge()
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(file) as path:
                path.write_text(json.dumps(facts | {"settings": settings}, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror}") from error

    def has(self, seed: int, item: Item, labels: Iterable[str]) -> bool:
        """Say whether nothing is left to do for a sample: all its records are there, or it was left out."""
        if (seed, item.dataset, item.sample_id) in self._problems:
            return True
        return all((seed, item.dataset, item.sample_id, label) in self._records for label in labels)

    def add(
        self, records: Sequence[dict[str, Any]], seed: int, dataset: str, problems: Sequence[Problem]
    ) -> None:
        """Write those records and problems of a batch that are not there yet."""
        fresh = {key_of(record): record for record in records if key_of(record) not in self._records}
        left_out = {}
        for problem in problems:
            entry = {
                "seed": seed,
                "dataset": dataset,
                "sample_id": problem.sample_id,
                "file": str(problem.file),
                "reason": problem.reason,
            }
            left_out[_problem_key(entry)] = entry
        left_out = {key: entry for key, entry in left_out.items() if key not in self._problems}
        self._append(RECORDS, fresh.values())
        self._append(PROBLEMS, left_out.values())
        self._records |= fresh
        self._problems |= left_out

    def finish(self, order: Sequence[Key]) -> None:
        """Wait for all processes; bring the records into this order. Those of other keys come last."""
        self._processes.wait()
        self._processes.first(lambda: self._merge(order))

    def records(self) -> list[dict[str, Any]]:
        """Return the records in the order of the file."""
        return _read(self.folder / RECORDS)

    def problems(self) -> list[dict[str, Any]]:
        """Return what was left out."""
        return _read(self.folder / PROBLEMS)

    def _own(self, name: str) -> Path:
        return self.folder / (name if self.count == 1 else _of_rank(name, str(self.rank)))

    def _append(self, name: str, entries: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        if not text:
            return
        try:
            # Bytes of a broken line must not run into the first of these: `_merge` has cut them off.
            with self._own(name).open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self._own(name)} cannot be written: {error.strerror}") from error

    def _merge(self, order: Sequence[Key] = ()) -> None:
        """Put the files of all ranks into one, without repetitions and half-written lines."""
        place = {key: at for at, key in enumerate(order)}
        for name, identity in ((RECORDS, key_of), (PROBLEMS, _problem_key)):
            files = [self.folder / name, *sorted(self.folder.glob(_of_rank(name, "*")))]
            entries: dict[Any, dict[str, Any]] = {}
            for file in files:
                for entry in _read(file):
                    entries.setdefault(identity(entry), entry)
            if not any(file.is_file() for file in files):
                continue
            if name == RECORDS:
                ordered = sorted(entries.values(), key=lambda entry: place.get(key_of(entry), len(place)))
            else:
                ordered = sorted(
                    entries.values(), key=lambda entry: [str(part) for part in _problem_key(entry)]
                )
            with replacing(self.folder / name) as path:
                path.write_text(
                    "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in ordered),
                    encoding="utf-8",
                )
            for file in files[1:]:
                file.unlink()


def _of_rank(name: str, rank: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}.rank{rank}.{suffix}"


def _problem_key(entry: dict[str, Any]) -> tuple[int, str, str | None]:
    return entry["seed"], entry["dataset"], entry["sample_id"]


def _read(file: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a last line without its end was being written and does not count."""
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return []
    whole = data[: data.rfind(b"\n") + 1]
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from error


def _compare(file: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with other settings, and say which."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged; name another folder") from error
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if names:
        differing = "; ".join(
            f"{name} was {_brief(before.get(name))}, is {_brief(settings.get(name))}" for name in names
        )
        raise UserError(f"{file.parent} holds a run with other settings: {differing}")


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."
