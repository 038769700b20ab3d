"""Which runs are missing, in the order in which to train them, and where each finds the float weights it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cnvzoo.checkpoints.format import CONFIG, WEIGHTS
from cnvzoo.files import sha256_of
from cnvzoo.training.recipe import PUBLISHED_SEED
from cnvzoo.training.record import RunRecord
from cnvzoo.training.state import RECORD, RUN_WEIGHTS, STATE
from harness.entries import Entry, Layout, shown
from harness.records import Records, Status


@dataclass(frozen=True)
class Run:
    """One run to train or resume.

    Attributes:
        entry, seed: what is trained.
        run_dir: folder of its state, weights and record.
        trial_epochs: its epochs if fewer than the recipe's, else None.
        record_path: where its record is copied when it is finished; None if the record only stays in `run_dir`.
        reason: why it is in the queue, for people.
        replaces: the records that --retrain replaces: a record that is none of these means that the run is done.
    """

    entry: Entry
    seed: int
    run_dir: Path
    trial_epochs: int | None = None
    record_path: Path | None = None
    reason: str = ""
    replaces: tuple[RunRecord, ...] = ()

    @property
    def name(self) -> str:
        """How lines of the run begin, as with `Recipe.run_name`; in lists of runs it is `str(run)`, without a comma."""
        return f"{self.entry.name}, seed {self.seed}"

    @property
    def started(self) -> bool:
        return (self.run_dir / STATE).exists()

    def finished(self, records: Records) -> RunRecord | None:
        """The record of this run if it is done by now, among the results or in `run_dir`."""
        return next((record for record in self.valid_records(records) if record not in self.replaces), None)

    def valid_records(self, records: Records) -> list[RunRecord]:
        """The valid records of this run, among the results and in `run_dir`."""
        paths = [self.run_dir / RECORD] if self.record_path is None else [self.record_path, self.run_dir / RECORD]
        found = (records.status(self.entry, self.seed, path, trial_epochs=self.trial_epochs) for path in paths)
        return [run_status.done for run_status in found if run_status.done is not None]

    def __str__(self) -> str:
        trial = "" if self.trial_epochs is None else f", a trial of {self.trial_epochs} epochs"
        return f"{self.entry.name} seed {self.seed}{trial}"


_REASONS = {
    Status.MISSING: "not run yet",
    Status.STALE: "its record is of another recipe",
    Status.OLDER: "its record is of older arithmetic",
    Status.INVALID: "its record is not valid",
}


def make_plan(
    selected: Sequence[Entry],
    seeds: Sequence[int],
    *,
    records: Records,
    epochs: int | None = None,
    retrain: bool = False,
) -> list[Run]:
    """The runs of `selected` without a valid record of the current arithmetic, all of the first seed before any other.

    So every row has a number early. Runs that have a record of older arithmetic come after all others. A run that
    starts or learns from float weights comes after the run that makes them, which is put in front of it if its weights
    are nowhere to be found, selected or not. `epochs` limits the epochs of every run; `retrain` puts every selected
    run in the queue.
    """
    entries, layout = records.entries, records.layout
    wanted = {(entry.name, seed) for entry in selected for seed in seeds}
    runs: dict[Path, Run] = {}  # by folder, in the order of the queue

    def status(entry: Entry, seed: int, trial_epochs: int | None) -> Status:
        path = _record_path(layout, entry, seed, trial_epochs)
        return records.status(entry, seed, path, trial_epochs=trial_epochs).status

    def reason_to_run(entry: Entry, seed: int, trial_epochs: int | None) -> str | None:
        if (found := status(entry, seed, trial_epochs)) is not Status.DONE:
            return _REASONS[found]
        return "to be trained again" if retrain and (entry.name, seed) in wanted else None

    def add(entry: Entry, seed: int, trial_epochs: int | None, reason: str) -> None:
        run_dir = layout.run_dir(entry.name, seed, trial_epochs)
        if run_dir in runs:
            return
        for needed in needed_entries(entry, entries):
            needed_epochs = needed.trial_epochs(trial_epochs)  # a run of the table never needs a trial
            is_wanted = (needed.name, PUBLISHED_SEED) in wanted
            why = reason_to_run(needed, PUBLISHED_SEED, needed_epochs) if is_wanted else None
            if why is None and resolve_weights(needed, records, trial_epochs=needed_epochs) is None:
                if other_weights(needed, records) is not None:
                    continue  # trained here already, with other bits than its record has: `entry` fails, and says so
                why = f"{entry.name} needs its weights, which are not under {shown(layout.runs)}"
            if why is not None:
                add(needed, PUBLISHED_SEED, needed_epochs, why)
        # A valid record is replaced only with --retrain: a run for the sake of its weights leaves it as it is.
        recorded = records.status(entry, seed).status is Status.DONE
        keep = trial_epochs is not None or (recorded and not (retrain and (entry.name, seed) in wanted))
        run = Run(
            entry=entry,
            seed=seed,
            run_dir=run_dir,
            trial_epochs=trial_epochs,
            record_path=None if keep else layout.record(entry.name, seed),
            reason=reason,
        )
        if retrain and (entry.name, seed) in wanted:
            run = replace(run, replaces=tuple(run.valid_records(records)))
        runs[run_dir] = run

    candidates = [(entry, seed, entry.trial_epochs(epochs)) for seed in seeds for entry in selected]
    for entry, seed, trial_epochs in sorted(candidates, key=lambda candidate: status(*candidate) is Status.OLDER):
        if reason := reason_to_run(entry, seed, trial_epochs):
            add(entry, seed, trial_epochs, reason)
    return list(runs.values())


def _record_path(layout: Layout, entry: Entry, seed: int, trial_epochs: int | None) -> Path:
    if trial_epochs is None:
        return layout.record(entry.name, seed)
    return layout.run_dir(entry.name, seed, trial_epochs) / RECORD


def needed_entries(entry: Entry, entries: Mapping[str, Entry]) -> list[Entry]:
    """The entries whose weights a run of `entry` needs as float start or teacher; an entry may be listed twice."""
    return [entries[name] for names in entry.recipe.needs.values() for name in names]


def resolve_weights(entry: Entry, records: Records, *, trial_epochs: int | None = None) -> Path | None:
    """The safetensors file of the finished run of float `entry` with PUBLISHED_SEED, or None if it must be trained.

    Searched among the runs, then among the published checkpoints, then, with `trial_epochs`, among the trials of that
    length. Weights count only if their sha256 is the one in their record, and if that is of the current arithmetic.
    Where the table has a record of the entry, they have to be those of that record.
    """
    found = _from_run(entry, records) or _from_checkpoint(entry, records)
    if found is None and trial_epochs is not None:
        found = _from_run(entry, records, trial_epochs)
    return found


def other_weights(entry: Entry, records: Records) -> Path | None:
    """The weights of the finished run of `entry` with PUBLISHED_SEED if they are not those of its record in the table.

    They were trained on another kind of machine. Runs that learned from them would not be valid.
    """
    folder = records.layout.run_dir(entry.name, PUBLISHED_SEED)
    here, recorded = (records.status(entry, PUBLISHED_SEED, path).done for path in (folder / RECORD, None))
    if here is None or recorded is None or here.weights_sha256 == recorded.weights_sha256:
        return None
    return recorded_weights(folder / RUN_WEIGHTS, here)


def _from_run(entry: Entry, records: Records, trial_epochs: int | None = None) -> Path | None:
    if trial_epochs is None and other_weights(entry, records) is not None:
        return None
    folder = records.layout.run_dir(entry.name, PUBLISHED_SEED, trial_epochs)
    record = records.status(entry, PUBLISHED_SEED, folder / RECORD, trial_epochs=trial_epochs).done
    return recorded_weights(folder / RUN_WEIGHTS, record)


def _from_checkpoint(entry: Entry, records: Records) -> Path | None:
    record = records.status(entry, PUBLISHED_SEED).done
    folder = records.layout.checkpoint(entry.recipe)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # no checkpoint, or none whose config can be read
    if record is None or not isinstance(config, dict) or config.get("weights_sha256") != record.weights_sha256:
        return None
    return recorded_weights(folder / WEIGHTS, record)


def recorded_weights(weights: Path, record: RunRecord | None) -> Path | None:
    """`weights` if its sha256 is the one in `record`, else None."""
    known = record is not None and weights.is_file() and sha256_of(weights) == record.weights_sha256
    return weights if known else None
