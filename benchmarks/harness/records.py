"""What has been run: the status of every run, read from the records and from nothing else.

A record counts if it can be read, is of the run that its path says, of the recipe as it is now, of the published
dataset, and started or learned from weights that have a record themselves. One of an older version of the arithmetic
counts too, marked, and is due again. Any other is named, with the remedy, and counts as missing; it stays where it is
until a finished run replaces it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from cnvzoo.data import published_sha256
from cnvzoo.hub import CheckpointError, read_config
from cnvzoo.train import NUMERICS, PUBLISHED_SEED, RecordError, RunRecord
from cnvzoo.train.run import RECORD, STATE

from .entries import SEEDS, Entry
from .files import shown
from .layout import Layout
from .retired import RetiredRecord, load_retired, retire


class Status(Enum):
    DONE = "done"
    OLDER = "done by older arithmetic"
    STARTED = "started"
    MISSING = "missing"
    STALE = "out of date"
    INVALID = "not valid"


@dataclass(frozen=True)
class RunStatus:
    """What is known of one run.

    record:  that of its table, if and only if the status is DONE or OLDER
    problem: why a record is OLDER, or counts as missing
    """

    status: Status
    record: RunRecord | None = None
    problem: str | None = None

    @property
    def done(self) -> RunRecord | None:
        """The record, if it is of today's arithmetic."""
        return self.record if self.status is Status.DONE else None


Survey = Mapping[tuple[str, int], RunStatus]


@dataclass(frozen=True)
class Records:
    """The records of a checkout. They are read anew for every answer: other processes write them too."""

    entries: Mapping[str, Entry]
    layout: Layout

    def status(self, entry: Entry, seed: int, path: Path | None = None, *, trial: bool = False) -> RunStatus:
        """The status of the run of `entry` with `seed` by the record at `path`, by default that among the results."""
        path = path or self.layout.record(entry.name, seed)
        if not path.exists():
            return RunStatus(Status.MISSING)
        where = shown(path)
        try:
            record = RunRecord.read(path)
        except RecordError as error:
            problem = f"{' '.join(str(error).split())}; restore it, or delete it and run again"
            return RunStatus(Status.INVALID, problem=problem)
        if problem := misplaced(record, entry, seed, trial=trial):
            return RunStatus(Status.INVALID, problem=f"{where}: {problem}; move it where it belongs, or delete it")
        if record.recipe_sha256 != entry.fingerprint:
            problem = (
                f"{where}: of another recipe ({record.recipe_sha256[:8]}) than {entry.path.name} is now "
                f"({entry.fingerprint[:8]}); run again, or restore the recipe"
            )
            return RunStatus(Status.STALE, problem=problem)
        if problem := self._not_ours(record, entry):
            return RunStatus(Status.INVALID, problem=f"{where}: {problem}")
        found = self._judged_by_arithmetic(record) if trial else self._judged_by_inputs(record)
        return found if found.problem is None else RunStatus(found.status, found.record, f"{where}: {found.problem}")

    def _not_ours(self, record: RunRecord, entry: Entry) -> str | None:
        """Why `record` cannot be of this checkout's dataset, code and published checkpoint, or None."""
        if record.data_sha256 != published_sha256(entry.recipe.dataset):
            return f"trained on other images than {entry.recipe.dataset} has; delete it and run again"
        if record.numerics > NUMERICS:
            return f"of arithmetic version {record.numerics}, and this checkout has {NUMERICS}: update the checkout"
        if record.seed != PUBLISHED_SEED or record.trial:
            return None
        try:
            config = read_config(self.layout.checkpoint(entry.recipe))
        except CheckpointError:
            return None  # none is published, or one that is named elsewhere
        same = config.weights_sha256 == record.weights_sha256
        if same and (config.correct, config.total) != (record.correct, record.total):
            return (
                f"{record.correct} of {record.total} right, and the published checkpoint of the same weights says "
                f"{config.correct} of {config.total}: see `cnvzoo verify {config.name}`, and restore the wrong one"
            )
        return None

    def _judged_by_arithmetic(self, record: RunRecord) -> RunStatus:
        if record.numerics < NUMERICS:
            problem = f"of arithmetic version {record.numerics}, and today's is {NUMERICS}; it is due again"
            return RunStatus(Status.OLDER, record, problem)
        return RunStatus(Status.DONE, record)

    def _judged_by_inputs(self, record: RunRecord) -> RunStatus:
        """As by its arithmetic, unless the weights that it started or learned from are not those of today."""
        found = self._judged_by_arithmetic(record)
        for (name, seed), sha256 in record.inputs().items():
            now = self.status(self.entries[name], seed)
            if now.record is not None and now.record.weights_sha256 == sha256:
                if now.status is Status.OLDER:
                    problem = f"uses the weights of {name} seed {seed}, of older arithmetic; it is due again"
                    found = RunStatus(Status.OLDER, record, found.problem or problem)
            elif any(old.weights_sha256 == sha256 for old in self._retired(name, seed)):
                problem = f"uses weights of {name} seed {seed} that were replaced since; it is due again"
                found = RunStatus(Status.OLDER, record, found.problem or problem)
            else:
                problem = (
                    f"uses weights of {name} seed {seed} ({sha256[:8]}) that have no record; restore that record, or "
                    "delete this one and run again"
                )
                return RunStatus(Status.INVALID, problem=problem)
        return found

    def _retired(self, name: str, seed: int) -> list[RunRecord | RetiredRecord]:
        """What is known of runs whose records are no longer in a table, or not for the recipe as it is now."""
        known: list[RunRecord | RetiredRecord] = [
            old for old in load_retired(self.layout.retired) if (old.entry, old.seed) == (name, seed)
        ]
        with suppress(RecordError):
            known.append(RunRecord.read(self.layout.record(name, seed)))
        return known

    def survey(self, seeds: Sequence[int] = SEEDS) -> dict[tuple[str, int], RunStatus]:
        """The status of every run of the tables, by entry name and seed."""
        found = {}
        for entry in self.entries.values():
            for seed in seeds:
                now = self.status(entry, seed)
                if now.status is Status.MISSING and (self.layout.run_dir(entry.name, seed) / STATE).exists():
                    now = RunStatus(Status.STARTED)
                found[entry.name, seed] = now
        return found

    def problems(self) -> list[str]:
        """A line for each file among the records that no table reads: out of date, not valid, or of no run of one."""
        found = [now.problem for now in self.survey().values() if now.problem is not None and now.record is None]
        expected = {self.layout.record(name, seed) for name in self.entries for seed in SEEDS}
        seeds = "|".join(map(str, SEEDS))
        return found + [
            f"{shown(path)}: of no run of a table; records are <entry>/seed<{seeds}>.json, <entry> the name of a recipe"
            for path in sorted(self.layout.results.rglob("*.json"))
            if path not in expected
        ]

    def trials(
        self, entries: Iterable[Entry], seeds: Sequence[int], epochs: int | None
    ) -> list[tuple[Entry, RunRecord]]:
        """The finished trials that `epochs` makes of the runs of `entries`."""
        found = []
        for entry in entries:
            if (trial_epochs := entry.trial_epochs(epochs)) is not None:
                for seed in seeds:
                    path = self.layout.run_dir(entry.name, seed, trial_epochs) / RECORD
                    if record := self.status(entry, seed, path, trial=True).record:
                        found.append((entry, record))
        return found

    def collect(self, entry: Entry, seed: int) -> Path | None:
        """Bring the record of a finished run to the results, unless one that is done is there; returns its path then.

        A run is finished a moment before its record is copied, and a results folder can be lost: neither costs a
        training.
        """
        home = self.layout.record(entry.name, seed)
        finished = self.status(entry, seed, self.layout.run_dir(entry.name, seed) / RECORD).done
        if finished is None or self.status(entry, seed).done is not None:
            return None
        self.keep(finished)
        return home

    def keep(self, record: RunRecord) -> None:
        """Write a record to its place among the results; what is kept of one that it replaces goes to the retired."""
        home = self.layout.record(record.entry, record.seed)
        try:
            replaced = RunRecord.read(home)
        except RecordError:  # none is there, or none that could say what was scored
            replaced = None
        if replaced is not None and replaced.weights_sha256 != record.weights_sha256:
            retire(self.layout.retired, replaced)
        record.write(home)


def misplaced(record: RunRecord, entry: Entry, seed: int, *, trial: bool = False) -> str | None:
    """Why `record` is not of this run at all, or None."""
    if (record.entry, record.seed) != (entry.name, seed):
        return f"the record of {record.entry} seed {record.seed}, not of {entry.name} seed {seed}"
    if record.trial != trial:
        return "the record of a trial, which enters no table" if record.trial else "not the record of a trial"
    return None
