"""Train what the plan says, one run after the other: the half of `make` that acts.

A runner trains one run: another machine, or a cluster, is one more class with that one method. Several runs at once is
one more function in the place of `execute`, over the same plan.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cnvzoo.train import Recipe, RunError, RunInterrupted, RunRecord, TrainingDiverged
from cnvzoo.train.run import RECORD

from .entries import Entry
from .errors import HarnessError
from .files import set_aside, shown
from .float_start import resolve_float_start
from .layout import Layout
from .plan import Job
from .records import misplaced, standing
from .render import duration


class Runner(Protocol):
    """Trains one run, or goes on with it."""

    def run(
        self, recipe: Recipe, seed: int, *, run_dir: Path, epochs: int | None, float_start: Path | None
    ) -> RunRecord:
        """Return the record, with `record.json` and `weights.safetensors` in `run_dir`.

        Raises RunInterrupted where it stops before the end, its state in `run_dir`; RunError or TrainingDiverged
        where this run cannot be had, which says nothing about others.
        """
        ...


@dataclass(frozen=True)
class LocalRunner:
    """On this machine, in this process. `train` is cnvzoo.train.run_recipe, or what a test puts in its place."""

    train: Callable[..., RunRecord]
    device: str
    deadline: float | None

    def run(
        self, recipe: Recipe, seed: int, *, run_dir: Path, epochs: int | None, float_start: Path | None
    ) -> RunRecord:
        return self.train(
            recipe,
            run_dir=run_dir,
            seed=seed,
            device=self.device,
            epochs=epochs,
            deadline=self.deadline,
            float_start=float_start,
        )


@dataclass
class Outcome:
    """What became of a plan: the runs that failed, those left, and why it stopped before its end, if it did."""

    failed: list[Job] = field(default_factory=list)
    left: list[Job] = field(default_factory=list)
    stopped: str | None = None


def execute(
    jobs: Sequence[Job],
    runner: Runner,
    *,
    entries: Mapping[str, Entry],
    layout: Layout,
    deadline: float | None,
    say: Callable[[str], None],
    on_finished: Callable[[], None],
) -> Outcome:
    """Train `jobs` in order, and bring each record to its place before the next one starts.

    A run that fails does not hold up those that can do without it. At the `deadline` (of time.monotonic()) or a
    signal, all that is done is kept, and the rest is left as it was planned.
    """
    outcome = Outcome()
    for number, job in enumerate(jobs, start=1):
        if deadline is not None and time.monotonic() >= deadline:
            outcome.left, outcome.stopped = list(jobs[number - 1 :]), "time limit"
            break
        say(f"[{number}/{len(jobs)}] {job}: {job.reason}")
        try:
            _run(job, runner, entries, layout, say)
        except RunInterrupted as interruption:
            outcome.left, outcome.stopped = list(jobs[number - 1 :]), interruption.reason
            break
        except (RunError, TrainingDiverged) as error:
            say(f"{job} failed: {error}")
            outcome.failed.append(job)
        else:
            on_finished()
    return outcome


def _run(job: Job, runner: Runner, entries: Mapping[str, Entry], layout: Layout, say: Callable[[str], None]) -> None:
    entry, trial = job.entry, job.trial_epochs is not None
    float_start = None
    if entry.recipe.float_start is not None:
        start = entries[entry.recipe.float_start]
        trial_epochs = start.trial_epochs(job.trial_epochs)
        float_start = resolve_float_start(start, job.seed, layout, trial_epochs=trial_epochs)
        if float_start is None:
            raise RunError(f"it starts from the weights of {start.name} seed {job.seed}, which are not there")
    if standing(entry, job.seed, job.run_dir / RECORD, trial=trial).record is not None:
        # The runner would hand back the run that is finished there already.
        say(f"the finished run is set aside in {shown(set_aside(job.run_dir))}")
    elif job.started:
        say(f"going on from the state in {shown(job.run_dir)}")
    record = runner.run(entry.recipe, job.seed, run_dir=job.run_dir, epochs=job.trial_epochs, float_start=float_start)
    problem = misplaced(record, entry, job.seed, trial=trial)
    if problem or record.recipe_sha256 != entry.fingerprint:
        raise HarnessError(f"{shown(job.run_dir)}: the runner returned {problem or 'a record of another recipe'}")
    say(f"{job}: {record.accuracy:.2f} % after {duration(record.seconds)} of training")
    if job.record_path is not None:
        record.write(job.record_path)
    elif not trial:
        _compare(job, record, layout, say)


def _compare(job: Job, record: RunRecord, layout: Layout, say: Callable[[str], None]) -> None:
    """Trained for its weights alone: say so where they are not those of the record in the table."""
    kept = layout.record(job.entry.name, job.seed)
    published = standing(job.entry, job.seed, kept).record
    if published is not None and published.weights_sha256 != record.weights_sha256:
        say(
            f"{job}: its weights are not those of {shown(kept)}, which stays as it is: they were made on "
            f"{published.device['name']}; --retrain replaces it"
        )
