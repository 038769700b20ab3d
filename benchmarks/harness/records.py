"""What has been run: the standing of every run, read from the records and from nothing else.

A record counts if it can be read, is of the run that its path says, and is of the recipe as it stands now. Any other
is named, with the remedy, and counts as missing; it stays where it is until a finished run replaces it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from cnvzoo.train import RecordError, RunRecord
from cnvzoo.train.run import RECORD, STATE

from .entries import SEEDS, Entry
from .files import shown
from .layout import Layout


class Status(Enum):
    DONE = "done"
    STARTED = "started"
    MISSING = "not run"
    STALE = "stale"
    INVALID = "invalid"


@dataclass(frozen=True)
class Standing:
    """How one run stands. `record` is there if and only if it is done; `problem` if a record was turned down."""

    status: Status
    record: RunRecord | None = None
    problem: str | None = None


Survey = Mapping[tuple[str, int], Standing]


def standing(entry: Entry, seed: int, path: Path, *, trial: bool = False) -> Standing:
    """How the run of `entry` with `seed` stands by the record at `path`."""
    if not path.exists():
        return Standing(Status.MISSING)
    where = shown(path)
    try:
        record = RunRecord.read(path)
    except RecordError as error:
        problem = f"{' '.join(str(error).split())}; restore it, or delete it and run again"
        return Standing(Status.INVALID, problem=problem)
    if problem := misplaced(record, entry, seed, trial=trial):
        return Standing(Status.INVALID, problem=f"{where}: {problem}; move it where it belongs, or delete it")
    if record.recipe_sha256 != entry.fingerprint:
        problem = (
            f"{where}: of another recipe ({record.recipe_sha256[:8]}) than {entry.path.name} is now "
            f"({entry.fingerprint[:8]}); run again, or restore the recipe"
        )
        return Standing(Status.STALE, problem=problem)
    return Standing(Status.DONE, record=record)


def misplaced(record: RunRecord, entry: Entry, seed: int, *, trial: bool = False) -> str | None:
    """Why `record` is not of this run at all, or None."""
    if (record.entry, record.seed) != (entry.name, seed):
        return f"the record of {record.entry} seed {record.seed}, not of {entry.name} seed {seed}"
    if record.trial != trial:
        return "the record of a trial, which enters no table" if record.trial else "not the record of a trial"
    return None


def survey(entries: Iterable[Entry], layout: Layout, seeds: Sequence[int] = SEEDS) -> dict[tuple[str, int], Standing]:
    """The standing of every run of the tables, by entry name and seed."""
    found = {}
    for entry in entries:
        for seed in seeds:
            now = standing(entry, seed, layout.record(entry.name, seed))
            if now.status is Status.MISSING and (layout.run_dir(entry.name, seed) / STATE).exists():
                now = Standing(Status.STARTED)
            found[entry.name, seed] = now
    return found


def problems(entries: Mapping[str, Entry], layout: Layout) -> list[str]:
    """A line for each file among the records that no table reads: out of date, not valid, or of no run of a table."""
    found = [now.problem for now in survey(entries.values(), layout).values() if now.problem is not None]
    expected = {layout.record(name, seed) for name in entries for seed in SEEDS}
    seeds = "|".join(map(str, SEEDS))
    return found + [
        f"{shown(path)}: of no run of a table; records are <entry>/seed<{seeds}>.json, <entry> the name of a recipe"
        for path in sorted(layout.results.rglob("*.json"))
        if path not in expected
    ]


def trials(
    entries: Iterable[Entry], seeds: Sequence[int], layout: Layout, epochs: int | None
) -> list[tuple[Entry, RunRecord]]:
    """The finished trials that `epochs` makes of the runs of `entries`."""
    found = []
    for entry in entries:
        if (trial_epochs := entry.trial_epochs(epochs)) is not None:
            for seed in seeds:
                path = layout.run_dir(entry.name, seed, trial_epochs) / RECORD
                if record := standing(entry, seed, path, trial=True).record:
                    found.append((entry, record))
    return found


def collect(entries: Iterable[Entry], seeds: Sequence[int], layout: Layout) -> list[Path]:
    """Bring home the records of finished runs that are not among the results yet; returns the paths written.

    A run is finished a moment before its record is copied, and a results folder can be lost: neither costs a training.
    """
    brought = []
    for entry in entries:
        for seed in seeds:
            home = layout.record(entry.name, seed)
            finished = standing(entry, seed, layout.run_dir(entry.name, seed) / RECORD).record
            if finished is not None and standing(entry, seed, home).record is None:
                finished.write(home)
                brought.append(home)
    return brought
