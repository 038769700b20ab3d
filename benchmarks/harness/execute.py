"""Train what the plan says, one run or several at once: the half of `make` that acts.

A runner trains one run, and `execute` calls it in as many threads as there are runs at once: threads of this process,
worker processes and a cluster differ in the runner alone.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnvzoo.errors import CnvzooError, in_a_line
from cnvzoo.training.recipe import PUBLISHED_SEED
from cnvzoo.training.record import RunRecord
from cnvzoo.training.run import RECORD, alone_in, caught_signals
from cnvzoo.training.state import RunError, RunInterrupted, RunUnderWay
from harness.entries import Entry, HarnessError, set_aside, shown
from harness.records import Records, misplaced
from harness.report import duration
from harness.schedule import Job, needed_entries, resolve_weights
from harness.workers import Run, Runner

_LOOK_EVERY_SECONDS = 0.2


@dataclass
class Outcome:
    """What became of a plan.

    failed:    runs that cannot be had
    left:      runs that are neither finished nor failed
    elsewhere: those of `left` that another process was training; the others wait for these where nothing stopped
    stopped:   why it stopped before its end, if it did
    """

    failed: list[Job] = field(default_factory=list)
    left: list[Job] = field(default_factory=list)
    elsewhere: list[Job] = field(default_factory=list)
    stopped: str | None = None


def execute(
    jobs: Sequence[Job],
    runner: Runner,
    *,
    at_once: int = 1,
    records: Records,
    deadline: float | None,
    say: Callable[[str], None],
    on_finished: Callable[[], None],
) -> Outcome:
    """Train `jobs`, `at_once` of them at a time, and bring each record to its place when its run is finished.

    They start in order, but a run that needs the weights of another waits for it, and those behind it need not.
    All but the runs themselves happens in the calling thread, one thing at a time; with one run at a time that does
    too. A run that fails, for whatever reason, does not hold up those that can do without it. At the `deadline` (of
    time.monotonic()) or a signal, all that is done is kept, every run under way saves its state, and the rest is left
    as it was planned.

    Other processes may train on the same folders. What they have finished since the plan was made is not trained
    again, and what they are training is left to them: it is tried once more when everything else is done.
    """
    with _pool(at_once) as (pool, caught):
        stop = _Stop(caught)
        work = _Work(jobs, runner, at_once, records, deadline, say, on_finished, pool, stop)
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
    records: Records
    deadline: float | None
    say: Callable[[str], None]
    on_finished: Callable[[], None]
    pool: Executor
    stop: _Stop
    waiting: list[int] = field(init=False)
    under_way: dict[Future[RunRecord], int] = field(default_factory=dict)
    stopped: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    elsewhere: dict[int, int] = field(default_factory=dict)  # with the number of runs that had ended here by then
    ended: int = 0

    def __post_init__(self) -> None:
        self.waiting = list(range(len(self.jobs)))

    def do(self) -> Outcome:
        told = False
        while True:
            self._look_elsewhere()
            self._start()
            if not self.under_way:
                break
            done, others = wait(self.under_way, timeout=_LOOK_EVERY_SECONDS, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=self.under_way.__getitem__):
                self._conclude(self.under_way.pop(future), future)
            if others and not told and (reason := self.stop()):
                self.say(f"stopping ({reason}): {len(others)} under way, to be saved")
                told = True
        left = [n for n in sorted((*self.stopped, *self.waiting, *self.elsewhere)) if not self._is_kept(n)]
        return Outcome(
            failed=[self.jobs[number] for number in sorted(self.failed)],
            left=[self.jobs[number] for number in left],
            elsewhere=[self.jobs[number] for number in left if number in self.elsewhere],
            stopped=self.stop() if left else None,
        )

    def _start(self) -> None:
        """Start runs for as long as there is room, and any that can start."""
        while len(self.under_way) < self.at_once and not self.stop() and (ready := self._ready()) is not None:
            if self.deadline is not None and time.monotonic() >= self.deadline:
                self.stop.ask("time limit")
                return
            self.waiting.remove(ready)
            job = self.jobs[ready]
            try:
                weights = self._prepare(ready)
            except Exception as error:
                self._end(ready, error)
                continue
            if weights is None:
                continue
            future = self.pool.submit(
                self.runner.run,
                Run(job.entry.recipe, job.seed, job.run_dir, job.trial_epochs, weights),
                self.stop,
            )
            self.under_way[future] = ready

    def _ready(self) -> int | None:
        """The first in the queue that needs no weights that are still to come."""
        coming = {self.jobs[number].run_dir for number in (*self.waiting, *self.under_way.values(), *self.elsewhere)}
        return next((number for number in self.waiting if not coming & self._needed_runs(self.jobs[number])), None)

    def _needed_runs(self, job: Job) -> set[Path]:
        """The folders of the runs whose weights `job` needs."""
        needed = needed_entries(job.entry, self.records.entries)
        return {self.records.layout.run_dir(e.name, PUBLISHED_SEED, e.trial_epochs(job.trial_epochs)) for e in needed}

    def _look_elsewhere(self) -> None:
        """See which runs of other processes are finished; with nothing else to do here, try the rest of them again."""
        for number in list(self.elsewhere):
            if self._is_kept(number):
                del self.elsewhere[number]
        if not self.under_way and not self.stop() and self._ready() is None:
            again = [number for number, ended in self.elsewhere.items() if ended < self.ended]
            self.waiting = sorted(self.waiting + again)
            for number in again:
                del self.elsewhere[number]

    def _is_done(self, number: int) -> bool:
        """Whether another process has finished this run since the plan was made, with all that is needed of it.

        Its record is brought to its place. Raises FileError where that cannot be written.
        """
        job = self.jobs[number]
        record = job.finished()
        for_its_weights = job.record_path is None and job.trial_epochs is None
        if record is None and not for_its_weights:
            return False
        needed = for_its_weights or any(job.run_dir in self._needed_runs(self.jobs[n]) for n in self.waiting)
        if needed and resolve_weights(job.entry, self.records, trial_epochs=job.trial_epochs) is None:
            return False
        if record is not None and job.record_path is not None:
            self._keep(job, record)
        return True

    def _is_kept(self, number: int) -> bool:
        """Whether it is done and its record in its place."""
        try:
            return self._is_done(number)
        except (CnvzooError, OSError):
            return False

    def _prepare(self, number: int) -> dict[str, Path | list[Path]] | None:
        """Make way in the run's folder, in which no other process may be training meanwhile.

        Returns the weights that it needs, by what it needs them as, or None if the run is done by now.
        """
        job = self.jobs[number]
        label = f"[{number + 1}/{len(self.jobs)}] {job}"
        with alone_in(job.run_dir) if job.run_dir.is_dir() else nullcontext():
            if self._is_done(number):
                self.say(f"{label}: finished by now, and not trained again")
                return None
            self.say(f"{label}: {job.reason}")
            weights: dict[str, Path | list[Path]] = {}
            for purpose, names in job.entry.recipe.needs.items():
                found = [self._weights_of(self.records.entries[name], job) for name in names]
                weights[purpose] = found if purpose == "teacher" else found[0]
            if (job.run_dir / RECORD).exists():
                # The runner would hand back the run that is finished there already, or refuse to overwrite another.
                self.say(f"the finished run is set aside in {shown(set_aside(job.run_dir))}")
            elif job.started:
                self.say(f"going on from the state in {shown(job.run_dir)}")
        return weights

    def _weights_of(self, needed: Entry, job: Job) -> Path:
        found = resolve_weights(needed, self.records, trial_epochs=needed.trial_epochs(job.trial_epochs))
        if found is None:
            raise RunError(f"it needs the weights of {needed.name} seed {PUBLISHED_SEED}, which are not there")
        return found

    def _conclude(self, number: int, future: Future[RunRecord]) -> None:
        try:
            self._bring_home(self.jobs[number], future.result())
        except Exception as error:
            self._end(number, error)
        else:
            self.ended += 1
            self.on_finished()

    def _end(self, number: int, error: Exception) -> None:
        """What an error of one run means for it; the others go on, unless it was told to stop."""
        job = self.jobs[number]
        if isinstance(error, RunInterrupted):
            if error.unsaved:
                self.say(f"{job}: {error}")
            self.stop.ask(error.reason)
            self.stopped.append(number)
        elif isinstance(error, RunUnderWay):
            self.say(f"{job}: another process is training it, and it is left to that one")
            self.elsewhere[number] = self.ended
        else:
            self.say(f"{job} failed: {in_a_line(error)}")
            self.failed.append(number)
            self.ended += 1

    def _bring_home(self, job: Job, record: RunRecord) -> None:
        trial = job.trial_epochs is not None
        problem = misplaced(record, job.entry, job.seed, trial=trial)
        if problem or record.recipe_sha256 != job.entry.fingerprint:
            raise HarnessError(f"{shown(job.run_dir)}: the runner returned {problem or 'a record of another recipe'}")
        self.say(f"{job}: {record.accuracy:.2f} % after {duration(record.seconds)} of training")
        if job.record_path is not None:
            self._keep(job, record)
        elif not trial:
            self._compare(job, record)

    def _keep(self, job: Job, record: RunRecord) -> None:
        """Write the record to its place, unless another process has recorded this run there since the plan was made."""
        assert job.record_path is not None
        there = self.records.status(job.entry, job.seed).done
        if there is None or there in job.replaces:
            self.records.keep(record)
        else:
            self._compare(job, record)

    def _compare(self, job: Job, record: RunRecord) -> None:
        """Say so where the weights are not those of the record in the table, which stays."""
        kept = self.records.layout.record(job.entry.name, job.seed)
        published = self.records.status(job.entry, job.seed).record
        if published is not None and published.weights_sha256 != record.weights_sha256:
            self.say(
                f"{job}: its weights are not those of {shown(kept)}, which stays as it is: they were made on "
                f"{published.device['name']}; --retrain replaces it"
            )
