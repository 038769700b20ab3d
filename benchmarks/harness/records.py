"""The status of every run, read from the records alone; and the results of replaced records (retired.json).

A record is valid if it can be read, belongs to the run that its path names, to the recipe as it is now and to the
published dataset, and if the weights that it started or learned from have a record themselves. One of an older version
of the arithmetic is valid too, marked, and due again. Any other is reported with the remedy and counts as missing; it
is kept until a finished run replaces it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from cnvzoo.checkpoints.folder import read_config
from cnvzoo.checkpoints.format import CheckpointError
from cnvzoo.data.published import published_sha256
from cnvzoo.errors import in_a_line
from cnvzoo.files import write_text
from cnvzoo.training.numerics import NUMERICS
from cnvzoo.training.recipe import PUBLISHED_SEED
from cnvzoo.training.record import RecordError, RunRecord
from cnvzoo.training.state import RECORD, STATE
from harness.entries import SEEDS, Entry, HarnessError, Layout, shown


class RetiredRecord(BaseModel):
    """The part of a replaced run record that states what was scored on the test set.

    Attributes:
        entry, seed: which run of which table entry.
        recipe_sha256: `Recipe.fingerprint()` of the recipe at that time.
        numerics: the version of the arithmetic; None for records from before it was recorded.
        epochs: epochs of that recipe.
        accuracy: top-1 in percent on the test set, `correct` of `total` images.
        weights_sha256: sha256 of the safetensors file of all weights.
        commit: commit of the checkout that trained; None without one, with a final `+` if it had changes.
        finished: UTC, ISO 8601.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    entry: str
    seed: int
    recipe_sha256: str
    numerics: int | None = None
    epochs: int = Field(ge=1)
    accuracy: float = Field(ge=0, le=100)
    correct: int = Field(ge=0)
    total: int = Field(gt=0)
    weights_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    commit: str | None
    finished: str

    @model_validator(mode="after")
    def _adds_up(self) -> RetiredRecord:
        if self.correct > self.total or abs(100 * self.correct / self.total - self.accuracy) > 0.005:
            raise ValueError(f"accuracy {self.accuracy} is not {self.correct} of {self.total}")
        return self

    @classmethod
    def of(cls, record: RunRecord) -> RetiredRecord:
        """The part of `record` that is kept."""
        return cls.model_validate(record.model_dump(include=set(cls.model_fields)))


_FILE = TypeAdapter(list[RetiredRecord])


def load_retired(path: Path) -> list[RetiredRecord]:
    """The retired records in the file at `path`, in its order; none if there is no file.

    Raises HarnessError if the file cannot be read or is not a list of retired records.
    """
    if not path.exists():
        return []
    try:
        return _FILE.validate_json(path.read_bytes())
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{part}: " for part in first["loc"])
        problem = f"not a list of retired records: {place}{first['msg']}"
    raise HarnessError(f"{shown(path)}: {problem}; restore it from version control")


def retire(path: Path, record: RunRecord) -> bool:
    """Add `record` to the file at `path`; returns whether it was added.

    A trial is not added, because it was in no table, and a record that is there already is not added again. Raises
    HarnessError if the file is not a list of retired records.
    """
    retired, new = load_retired(path), RetiredRecord.of(record)
    if record.trial or any(_identity(old) == _identity(new) for old in retired):
        return False
    lines = [line.model_dump_json() for line in sorted([*retired, new], key=_order)]
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")
    return True


def recipes_scored(entries: Iterable[Entry], layout: Layout) -> dict[str, int]:
    """How many recipes of each entry, by fingerprint, were ever scored on the test set.

    Counts the retired records and the records among the results, out of date or not, but no trials.
    """
    fingerprints: dict[str, set[str]] = {entry.name: set() for entry in entries}
    for old in load_retired(layout.retired):
        if old.entry in fingerprints:
            fingerprints[old.entry].add(old.recipe_sha256)
    for name, found in fingerprints.items():
        for seed in SEEDS:
            try:
                record = RunRecord.read(layout.record(name, seed))
            except RecordError:  # missing, or reported by `Records.problems`
                continue
            if not record.trial and record.entry == name:
                found.add(record.recipe_sha256)
    return {name: len(found) for name, found in fingerprints.items()}


def _identity(record: RetiredRecord) -> tuple[str, int, str, str]:
    return record.entry, record.seed, record.recipe_sha256, record.weights_sha256


def _order(record: RetiredRecord) -> tuple[str, int, str, str]:
    return record.entry, record.seed, record.finished, record.weights_sha256


class Status(Enum):
    DONE = "done"
    OLDER = "done by older arithmetic"
    STARTED = "started"
    MISSING = "missing"
    STALE = "out of date"
    INVALID = "not valid"


@dataclass(frozen=True)
class RunStatus:
    """The status of one run.

    Attributes:
        status: see `Status`.
        record: the valid record; not None if and only if the status is DONE or OLDER.
        problem: why a record is OLDER or not valid.
    """

    status: Status
    record: RunRecord | None = None
    problem: str | None = None

    @property
    def done(self) -> RunRecord | None:
        """The record if it is of the current version of the arithmetic."""
        return self.record if self.status is Status.DONE else None


Survey = Mapping[tuple[str, int], RunStatus]


@dataclass(frozen=True)
class Records:
    """The records of a checkout, read again for every call because other processes write them too."""

    entries: Mapping[str, Entry]
    layout: Layout

    def status(
        self, entry: Entry, seed: int, path: Path | None = None, *, trial_epochs: int | None = None
    ) -> RunStatus:
        """The status of the run of `entry` with `seed` by the record at `path`, by default the one in results/.

        With `trial_epochs`, of the trial of so many epochs.
        """
        trial = trial_epochs is not None
        path = path or self.layout.record(entry.name, seed)
        if not path.exists():
            return RunStatus(Status.MISSING)
        where = shown(path)
        try:
            record = RunRecord.read(path)
        except RecordError as error:
            problem = f"{in_a_line(error)}; restore it, or delete it and run again"
            return RunStatus(Status.INVALID, problem=problem)
        if problem := misplaced(record, entry, seed, trial_epochs=trial_epochs):
            return RunStatus(Status.INVALID, problem=f"{where}: {problem}; move it to its place, or delete it")
        if record.recipe_sha256 != entry.fingerprint and (trial or not _differs_in_inputs_alone(record, entry)):
            problem = (
                f"{where}: of another recipe ({record.recipe_sha256[:8]}) than {entry.path.name} is now "
                f"({entry.fingerprint[:8]}); run again, or restore the recipe"
            )
            return RunStatus(Status.STALE, problem=problem)
        if problem := self._foreign(record, entry) or (None if trial else self._copied(record)):
            return RunStatus(Status.INVALID, problem=f"{where}: {problem}")
        found = self._judged_by_arithmetic(record) if trial else self._judged_by_inputs(record)
        return found if found.problem is None else RunStatus(found.status, found.record, f"{where}: {found.problem}")

    def _foreign(self, record: RunRecord, entry: Entry) -> str | None:
        """Why `record` does not fit this checkout's dataset, code and published checkpoint, or None."""
        if record.data_sha256 != published_sha256(entry.recipe.dataset):
            return f"trained on other images than {entry.recipe.dataset} has; delete it and run again"
        if record.numerics > NUMERICS:
            return f"of arithmetic version {record.numerics}, and this checkout has {NUMERICS}: update the checkout"
        if record.seed != PUBLISHED_SEED or record.trial:
            return None
        try:
            config = read_config(self.layout.checkpoint(entry.recipe))
        except CheckpointError:
            return None  # none is published, or `cnvzoo verify` reports it
        same = config.weights_sha256 == record.weights_sha256
        if same and (config.correct, config.total) != (record.correct, record.total):
            return (
                f"{record.correct} of {record.total} right, and the published checkpoint of the same weights says "
                f"{config.correct} of {config.total}: see `cnvzoo verify {config.name}`, and restore the wrong one"
            )
        return None

    def _copied(self, record: RunRecord) -> str | None:
        """Why `record` is a copy of that of an earlier seed, whose weights are the same; None if it is not."""
        for seed in range(record.seed):
            with suppress(RecordError):
                other = RunRecord.read(self.layout.record(record.entry, seed))
                if (other.entry, other.seed, other.weights_sha256) == (record.entry, seed, record.weights_sha256):
                    return f"the weights are those of seed {seed}; delete it and run again"
        return None

    def _judged_by_arithmetic(self, record: RunRecord) -> RunStatus:
        if record.numerics < NUMERICS:
            problem = f"of arithmetic version {record.numerics}, and the current one is {NUMERICS}; it is due again"
            return RunStatus(Status.OLDER, record, problem)
        return RunStatus(Status.DONE, record)

    def _judged_by_inputs(self, record: RunRecord) -> RunStatus:
        """Its status by its arithmetic, unless what it started or learned from has new weights or a new recipe."""
        found = self._judged_by_arithmetic(record)
        if found.problem is None and record.recipe_sha256 != self.entries[record.entry].fingerprint:
            problem = "the recipe of its float start or of a teacher has changed; it is due again"
            found = RunStatus(Status.OLDER, record, problem)
        for name, seed, sha256 in record.inputs():
            source = self.status(self.entries[name], seed)
            if source.record is not None and source.record.weights_sha256 == sha256:
                if source.status is Status.OLDER:
                    problem = f"uses the weights of {name} seed {seed}, which are of older arithmetic; it is due again"
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
        """Records of this run that are no longer in a table, or not for the recipe as it is now."""
        known: list[RunRecord | RetiredRecord] = [
            old for old in load_retired(self.layout.retired) if (old.entry, old.seed) == (name, seed)
        ]
        with suppress(RecordError):
            known.append(RunRecord.read(self.layout.record(name, seed)))
        return known

    def survey(self) -> dict[tuple[str, int], RunStatus]:
        """The status of every run of the tables, by entry name and seed."""
        found = {}
        for entry in self.entries.values():
            for seed in SEEDS:
                run_status = self.status(entry, seed)
                if run_status.status is Status.MISSING and (self.layout.run_dir(entry.name, seed) / STATE).exists():
                    run_status = RunStatus(Status.STARTED)
                found[entry.name, seed] = run_status
        return found

    def problems(self) -> list[str]:
        """A line for each file in results/ that is in no table: out of date, not valid, or of no run of a table."""
        found = [s.problem for s in self.survey().values() if s.problem is not None and s.record is None]
        expected = {self.layout.record(name, seed) for name in self.entries for seed in SEEDS}
        seeds = "|".join(map(str, SEEDS))
        return found + [
            f"{shown(path)}: of no run of a table; records are <entry>/seed<{seeds}>.json, with the name of a recipe"
            for path in sorted(self.layout.results.rglob("*.json"))
            if path not in expected
        ]

    def trials(
        self, entries: Iterable[Entry], seeds: Sequence[int], epochs: int | None
    ) -> list[tuple[Entry, RunRecord]]:
        """The records of the finished trials of `entries` with this number of epochs."""
        found = []
        for entry in entries:
            if (trial_epochs := entry.trial_epochs(epochs)) is not None:
                for seed in seeds:
                    path = self.layout.run_dir(entry.name, seed, trial_epochs) / RECORD
                    if record := self.status(entry, seed, path, trial_epochs=trial_epochs).record:
                        found.append((entry, record))
        return found

    def collect(self, entry: Entry, seed: int) -> Path | None:
        """Copy the record of a finished run to the results unless a valid one is there; returns its path if copied.

        A process may end between the end of a run and the copy, and the results folder may be lost: no run is repeated
        for that.
        """
        path = self.layout.record(entry.name, seed)
        finished = self.status(entry, seed, self.layout.run_dir(entry.name, seed) / RECORD).done
        if finished is None or self.status(entry, seed).done is not None:
            return None
        self.keep(finished)
        return path

    def keep(self, record: RunRecord) -> None:
        """Write a record to its place among the results; one that it replaces is added to the retired ones."""
        path = self.layout.record(record.entry, record.seed)
        with self.locked():
            try:
                replaced = RunRecord.read(path)
            except RecordError:  # none, or one that cannot be read
                replaced = None
            if replaced is not None and replaced.weights_sha256 != record.weights_sha256:
                retire(self.layout.retired, replaced)
            record.write(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Inside, no other command in this checkout writes the files that all records share; not to be nested.

        Where the folder cannot be written there is no lock: what is written inside then reports why.
        """
        lock = FileLock(self.layout.retired.with_name(".results.lock"))
        with suppress(OSError):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()


def _differs_in_inputs_alone(record: RunRecord, entry: Entry) -> bool:
    """Whether the recipe of `record` is that of `entry`, but for the recipes of its float start and teachers."""
    inputs = {key: getattr(entry.recipe, key) for key in ("float_start_sha256", "teacher_sha256")}
    return record.parsed_recipe().model_copy(update=inputs).fingerprint(record.data_sha256) == entry.fingerprint


def misplaced(record: RunRecord, entry: Entry, seed: int, *, trial_epochs: int | None = None) -> str | None:
    """Why `record` is not of this run, or None. With `trial_epochs`, the run is the trial of so many epochs."""
    if (record.entry, record.seed) != (entry.name, seed):
        return f"the record of {record.entry} seed {record.seed}, not of {entry.name} seed {seed}"
    if record.trial != (trial_epochs is not None):
        return "the record of a trial, which enters no table" if record.trial else "not the record of a trial"
    if trial_epochs is not None and (record.epochs, record.holdout) != (trial_epochs, 0):
        return f"a trial of {record.epochs} epochs, {record.holdout} images held out, not of {trial_epochs} and none"
    return None
