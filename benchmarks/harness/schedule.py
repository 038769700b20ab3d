"""Where a run finds the float weights that it starts or learns from: the published ones, those of a record.

What is missing, in the order in which to train it: the half of `make` that decides."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cnvzoo.files import sha256_of
from cnvzoo.training.recipe import PUBLISHED_SEED
from cnvzoo.training.record import RunRecord
from cnvzoo.training.run import RECORD, STATE, WEIGHTS
from harness.entries import Entry, Layout, shown
from harness.records import Records, Status


def needed_entries(entry: Entry, entries: Mapping[str, Entry]) -> list[Entry]:
    """The entries whose weights a run of `entry` needs, whatever for; one of them may be there twice."""
    return [entries[name] for names in entry.recipe.needs.values() for name in names]


def resolve_weights(entry: Entry, records: Records, *, trial_epochs: int | None = None) -> Path | None:
    """The safetensors file of the finished run of float `entry` with PUBLISHED_SEED, or None if it is to be trained.

    Looked for among the runs first, then among the published checkpoints. `trial_epochs` lets a trial of that
    length serve if neither has it. Weights count only if their sha256 is the one in their record, and if that is of
    today's arithmetic.
    """
    found = _from_run(entry, records) or _from_hub(entry, records)
    if found is None and trial_epochs is not None:
        found = _from_run(entry, records, trial_epochs)
    return found


def _from_run(entry: Entry, records: Records, trial_epochs: int | None = None) -> Path | None:
    folder = records.layout.run_dir(entry.name, PUBLISHED_SEED, trial_epochs)
    record = records.status(entry, PUBLISHED_SEED, folder / RECORD, trial=trial_epochs is not None).done
    return proven(folder / WEIGHTS, record)


def _from_hub(entry: Entry, records: Records) -> Path | None:
    record = records.status(entry, PUBLISHED_SEED).done
    folder = records.layout.checkpoint(entry.recipe)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # nothing published here that could say whose it is
    if record is None or not isinstance(config, dict) or config.get("weights_sha256") != record.weights_sha256:
        return None
    return proven(folder / "model.safetensors", record)


def proven(weights: Path, record: RunRecord | None) -> Path | None:
    """`weights` if they are those of `record`, else None."""
    known = record is not None and weights.is_file() and sha256_of(weights) == record.weights_sha256
    return weights if known else None


_REASONS = {
    Status.MISSING: "not run yet",
    Status.STALE: "its record is of another recipe",
    Status.OLDER: "its record is of older arithmetic",
    Status.INVALID: "its record is not valid",
}


@dataclass(frozen=True)
class Job:
    """One run to be trained, or to be gone on with.

    trial_epochs: its length where that is less than the recipe's, else None
    record_path:  where its record goes when it is finished; None: the record stays with the run
    reason:       why it is in the queue, for people
    book:         the records of the checkout
    replaces:     the records that it is to replace on request: others, made since, mean that it is done
    """

    entry: Entry
    seed: int
    run_dir: Path
    trial_epochs: int | None
    record_path: Path | None
    reason: str
    book: Records = field(compare=False, repr=False)
    replaces: tuple[RunRecord, ...] = ()

    @property
    def started(self) -> bool:
        return (self.run_dir / STATE).exists()

    def finished(self) -> RunRecord | None:
        """The record of this run where it is done by now, among the results or in the folder of the run."""
        made = (record for record in self.records() if record not in self.replaces)
        return next(made, None)

    def records(self) -> list[RunRecord]:
        """The records of this run that count, wherever they are."""
        paths = [self.run_dir / RECORD] if self.record_path is None else [self.record_path, self.run_dir / RECORD]
        found = (self.book.status(self.entry, self.seed, path, trial=self.trial_epochs is not None) for path in paths)
        return [now.done for now in found if now.done is not None]

    def __str__(self) -> str:
        trial = "" if self.trial_epochs is None else f", a trial of {self.trial_epochs} epochs"
        return f"{self.entry.name} seed {self.seed}{trial}"


def make_plan(
    selected: Sequence[Entry],
    seeds: Sequence[int],
    *,
    records: Records,
    epochs: int | None = None,
    retrain: bool = False,
) -> list[Job]:
    """The runs of `selected` that are not there yet, all of the first seed before any of the next.

    So every row has a number early. Runs that have a record of older arithmetic come after all others. A run that
    starts or learns from float weights comes after the run that makes them, which is put in its place in the queue if
    its weights are nowhere to be found, asked for or not. `epochs` caps the epochs of every run; `retrain` puts every
    selected run in the queue.
    """
    entries, layout = records.entries, records.layout
    wanted = {(entry.name, seed) for entry in selected for seed in seeds}
    jobs: dict[Path, Job] = {}  # by the folder of the run, in the order of the queue

    def status(entry: Entry, seed: int, trial_epochs: int | None) -> Status:
        path = _record_path(layout, entry, seed, trial_epochs)
        return records.status(entry, seed, path, trial=trial_epochs is not None).status

    def reason_to_run(entry: Entry, seed: int, trial_epochs: int | None) -> str | None:
        if (now := status(entry, seed, trial_epochs)) is not Status.DONE:
            return _REASONS[now]
        return "to be trained again" if retrain and (entry.name, seed) in wanted else None

    def add(entry: Entry, seed: int, trial_epochs: int | None, reason: str) -> None:
        run_dir = layout.run_dir(entry.name, seed, trial_epochs)
        if run_dir in jobs:
            return
        for needed in needed_entries(entry, entries):
            needed_epochs = needed.trial_epochs(trial_epochs)  # a run of the table never needs a trial
            is_wanted = (needed.name, PUBLISHED_SEED) in wanted
            why = reason_to_run(needed, PUBLISHED_SEED, needed_epochs) if is_wanted else None
            if why is None and resolve_weights(needed, records, trial_epochs=needed_epochs) is None:
                why = f"{entry.name} needs its weights, which are not under {shown(layout.runs)}"
            if why is not None:
                add(needed, PUBLISHED_SEED, needed_epochs, why)
        # A record that stands is replaced only on request: a run for the sake of its weights leaves it alone.
        recorded = records.status(entry, seed).status is Status.DONE
        keep = trial_epochs is not None or (recorded and not (retrain and (entry.name, seed) in wanted))
        job = Job(
            entry=entry,
            seed=seed,
            run_dir=run_dir,
            trial_epochs=trial_epochs,
            record_path=None if keep else layout.record(entry.name, seed),
            reason=reason,
            book=records,
        )
        jobs[run_dir] = replace(job, replaces=tuple(job.records())) if retrain and (entry.name, seed) in wanted else job

    runs = [(entry, seed, entry.trial_epochs(epochs)) for seed in seeds for entry in selected]
    older = {(run[0].name, run[1]): status(*run) is Status.OLDER for run in runs}
    for entry, seed, trial_epochs in sorted(runs, key=lambda run: older[run[0].name, run[1]]):
        if reason := reason_to_run(entry, seed, trial_epochs):
            add(entry, seed, trial_epochs, reason)
    return list(jobs.values())


def _record_path(layout: Layout, entry: Entry, seed: int, trial_epochs: int | None) -> Path:
    if trial_epochs is None:
        return layout.record(entry.name, seed)
    return layout.run_dir(entry.name, seed, trial_epochs) / RECORD
