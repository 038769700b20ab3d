"""Train what the plan says, one run or several at once: the half of `make` that acts.

A runner trains one run, and `execute` calls it in as many threads as there are runs at once: threads of this process,
worker processes and a cluster differ in the runner alone.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnvzoo.train import PUBLISHED_SEED, RunError, RunInterrupted, RunRecord, TrainingDiverged
from cnvzoo.train.interrupts import caught_signals
from cnvzoo.train.run import RECORD

from .entries import Entry
from .errors import HarnessError
from .files import set_aside, shown
from .layout import Layout
from .needs import needed_entries, resolve_weights
from .plan import Job
from .records import misplaced, standing
from .render import duration
from .runner import Run, Runner

_LOOK_EVERY_SECONDS = 0.2


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
    at_once: int = 1,
    entries: Mapping[str, Entry],
    layout: Layout,
    deadline: float | None,
    say: Callable[[str], None],
    on_finished: Callable[[], None],
) -> Outcome:
    """Train `jobs`, `at_once` of them at a time, and bring each record to its place when its run is finished.

    They start in order, but a run that needs the weights of another waits for it, and those behind it need not.
    All but the runs themselves happens in the calling thread, one thing at a time; with one run at a time that does
    too. A run that fails does not hold up those that can do without it. At the `deadline` (of time.monotonic()) or a
    signal, all that is done is kept, every run under way saves its state, and the rest is left as it was planned.
    """
    with _pool(at_once) as (pool, caught):
        stop = _Stop(caught)
        work = _Work(jobs, runner, at_once, entries, layout, deadline, say, on_finished, pool, stop)
        try:
            return work.do()
        finally:
            stop.ask("an error")  # where there was one, for the runs that are under way still


@dataclass
class _Stop:
    """Why no run is to go on, once there is a reason."""

    caught: Sequence[str]  # signals, as they come
    reason: str | None = None

    def __call__(self) -> str | None:
        return self.reason or next(iter(self.caught), None)

    def ask(self, reason: str) -> None:
        self.reason = self() or reason


@contextmanager
def _pool(at_once: int) -> Iterator[tuple[Executor, Sequence[str]]]:
    """What runs are submitted to, and the signals that are to stop them, as they come.

    One at a time, a run is in the main thread and catches signals itself. Several are asked to stop by the first, and
    a second ends this process at once: threads cannot be unwound.
    """
    if at_once == 1:
        yield _InPlace(), ()
    else:
        with caught_signals(second=signal.SIG_DFL) as caught, ThreadPoolExecutor(at_once) as threads:
            yield threads, caught


class _InPlace(Executor):
    """Runs what is submitted there and then."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass
class _Work:
    """An execution under way. Jobs go by their number in the queue."""

    jobs: Sequence[Job]
    runner: Runner
    at_once: int
    entries: Mapping[str, Entry]
    layout: Layout
    deadline: float | None
    say: Callable[[str], None]
    on_finished: Callable[[], None]
    pool: Executor
    stop: _Stop
    waiting: list[int] = field(init=False)
    under_way: dict[Future[RunRecord], int] = field(default_factory=dict)
    stopped: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting = list(range(len(self.jobs)))

    def do(self) -> Outcome:
        told = False
        self._start()
        while self.under_way:
            done, others = wait(self.under_way, timeout=_LOOK_EVERY_SECONDS, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=self.under_way.__getitem__):
                self._conclude(self.under_way.pop(future), future)
            if others and not told and (reason := self.stop()):
                self.say(f"stopping ({reason}): {len(others)} under way, to be saved")
                told = True
            self._start()
        return Outcome(
            failed=[self.jobs[number] for number in sorted(self.failed)],
            left=[self.jobs[number] for number in sorted(self.stopped + self.waiting)],
            stopped=self.stop() if self.stopped or self.waiting else None,
        )

    def _start(self) -> None:
        """Start runs for as long as there is room, and any that can start."""
        while len(self.under_way) < self.at_once and not self.stop() and (ready := self._ready()) is not None:
            if self.deadline is not None and time.monotonic() >= self.deadline:
                self.stop.ask("time limit")
                return
            self.waiting.remove(ready)
            job = self.jobs[ready]
            self.say(f"[{ready + 1}/{len(self.jobs)}] {job}: {job.reason}")
            try:
                weights = self._prepare(job)
            except RunError as error:
                self._fail(ready, error)
                continue
            future = self.pool.submit(
                self.runner.run,
                Run(job.entry.recipe, job.seed, job.run_dir, job.trial_epochs, weights),
                self.stop,
            )
            self.under_way[future] = ready

    def _ready(self) -> int | None:
        """The first in the queue that needs no weights that are still to come."""
        coming = {self.jobs[number].run_dir for number in (*self.waiting, *self.under_way.values())}
        return next((number for number in self.waiting if not coming & self._needed_runs(self.jobs[number])), None)

    def _needed_runs(self, job: Job) -> set[Path]:
        """The folders of the runs whose weights `job` needs."""
        needed = needed_entries(job.entry, self.entries)
        return {self.layout.run_dir(e.name, PUBLISHED_SEED, e.trial_epochs(job.trial_epochs)) for e in needed}

    def _prepare(self, job: Job) -> dict[str, Path | list[Path]]:
        """Make way in the run's folder; returns the weights that it needs, by what it needs them as."""
        weights: dict[str, Path | list[Path]] = {}
        for purpose, names in job.entry.recipe.needs.items():
            found = [self._weights_of(self.entries[name], job) for name in names]
            weights[purpose] = found if purpose == "teacher" else found[0]
        trial = job.trial_epochs is not None
        if standing(job.entry, job.seed, job.run_dir / RECORD, trial=trial).record is not None:
            # The runner would hand back the run that is finished there already.
            self.say(f"the finished run is set aside in {shown(set_aside(job.run_dir))}")
        elif job.started:
            self.say(f"going on from the state in {shown(job.run_dir)}")
        return weights

    def _weights_of(self, needed: Entry, job: Job) -> Path:
        found = resolve_weights(needed, self.layout, trial_epochs=needed.trial_epochs(job.trial_epochs))
        if found is None:
            raise RunError(f"it needs the weights of {needed.name} seed {PUBLISHED_SEED}, which are not there")
        return found

    def _conclude(self, number: int, future: Future[RunRecord]) -> None:
        try:
            record = future.result()
        except RunInterrupted as interruption:
            self.stop.ask(interruption.reason)
            self.stopped.append(number)
        except (RunError, TrainingDiverged) as error:
            self._fail(number, error)
        else:
            self._bring_home(self.jobs[number], record)
            self.on_finished()

    def _fail(self, number: int, error: Exception) -> None:
        self.say(f"{self.jobs[number]} failed: {error}")
        self.failed.append(number)

    def _bring_home(self, job: Job, record: RunRecord) -> None:
        trial = job.trial_epochs is not None
        problem = misplaced(record, job.entry, job.seed, trial=trial)
        if problem or record.recipe_sha256 != job.entry.fingerprint:
            raise HarnessError(f"{shown(job.run_dir)}: the runner returned {problem or 'a record of another recipe'}")
        self.say(f"{job}: {record.accuracy:.2f} % after {duration(record.seconds)} of training")
        if job.record_path is not None:
            record.write(job.record_path)
        elif not trial:
            self._compare(job, record)

    def _compare(self, job: Job, record: RunRecord) -> None:
        """Trained for its weights alone: say so where they are not those of the record in the table."""
        kept = self.layout.record(job.entry.name, job.seed)
        published = standing(job.entry, job.seed, kept).record
        if published is not None and published.weights_sha256 != record.weights_sha256:
            self.say(
                f"{job}: its weights are not those of {shown(kept)}, which stays as it is: they were made on "
                f"{published.device['name']}; --retrain replaces it"
            )
