"""Train the runs of a schedule, one or several at a time.

A runner (workers.py, cluster.py) trains one run; `execute` calls it in as many threads as there are runs at once.
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
from cnvzoo.training.state import RECORD, RunError, RunInterrupted, RunUnderWay, alone_in, caught_signals
from harness.entries import Entry, HarnessError, set_aside, shown
from harness.records import Records, misplaced
from harness.report import duration
from harness.schedule import Run, needed_entries, other_weights, resolve_weights
from harness.workers import Runner

_POLL_SECONDS = 0.2


@dataclass
class Outcome:
    """Which runs of a schedule failed or were not finished, and why the schedule stopped.

    Attributes:
        failed: runs that ended with an error.
        left: runs that are neither finished nor failed.
        elsewhere: those of `left` that another process was training; the others of `left` need these, unless stopped.
        stopped: why it stopped early, if it did: `time limit`, `SIGINT` or `SIGTERM`.
    """

    failed: list[Run] = field(default_factory=list)
    left: list[Run] = field(default_factory=list)
    elsewhere: list[Run] = field(default_factory=list)
    stopped: str | None = None


def execute(
    runs: Sequence[Run],
    runner: Runner,
    *,
    at_once: int | Callable[[], int] = 1,
    records: Records,
    deadline: float | None,
    say: Callable[[str], None],
    on_finished: Callable[[], None],
) -> Outcome:
    """Train `runs`, `at_once` of them at a time, and copy each record to its place when its run is finished.

    Runs start in order, but one that needs the weights of another waits for it while later ones start. `at_once` is a
    function where the number may change meanwhile. Only training happens in other threads, and with one run at a time
    not even that, unless the runner only waits. A run that fails holds up only those that need its weights. At the
    `deadline` (of time.monotonic()) or a signal, finished runs are kept, every run under way saves its state, and no
    other starts.

    Other processes may train in the same folders. What they have finished since the schedule was made is not trained
    again; what they are training is left to them, and tried once more when everything else is done.
    """
    in_this_thread = at_once == 1 and not runner.waits
    limit = at_once if callable(at_once) else lambda: at_once
    with _pool(0 if in_this_thread else len(runs)) as (pool, caught):
        stop = _Stop(caught)
        work = _Execution(runs, runner, limit, records, deadline, say, on_finished, pool, stop)
        try:
            return work.run_all()
        finally:
            stop.ask("an error")  # after an error here, runs that are still under way stop too


@dataclass
class _Stop:
    """Why all runs have to stop, once there is a reason."""

    caught: Sequence[str]  # names of signals, added as they arrive
    reason: str | None = None

    def __call__(self) -> str | None:
        return self.reason or next(iter(self.caught), None)

    def ask(self, reason: str) -> None:
        self.reason = self() or reason


@contextmanager
def _pool(threads: int) -> Iterator[tuple[Executor, Sequence[str]]]:
    """The executor of the runs, and the names of the signals that arrive while it is used.

    Without threads, a run trains in the main thread and catches signals itself. Those in threads are asked to stop by
    the first signal; a second one ends this process at once, because threads cannot be interrupted.
    """
    if threads == 0:
        yield _InPlace(), ()
    else:
        with caught_signals(second=signal.SIG_DFL) as caught, ThreadPoolExecutor(threads) as pool:
            yield pool, caught


class _InPlace(Executor):
    """Runs what is submitted at once, in the calling thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass
class _Execution:
    """The state of an execution. Runs are known by their number in the queue."""

    runs: Sequence[Run]
    runner: Runner
    at_once: Callable[[], int]
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
    elsewhere: dict[int, int] = field(default_factory=dict)  # values: how many runs had ended here when it was found
    ended: int = 0

    def __post_init__(self) -> None:
        self.waiting = list(range(len(self.runs)))

    def run_all(self) -> Outcome:
        told = False
        while True:
            self._check_elsewhere()
            self._start()
            if not self.under_way:
                break
            done, others = wait(self.under_way, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=self.under_way.__getitem__):
                self._conclude(self.under_way.pop(future), future)
            if others and not told and (reason := self.stop()):
                self.say(f"stopping ({reason}): {len(others)} under way, to be saved")
                told = True
        # a signal after the last step, or while states are saved at the time limit, stops what follows the runs
        reason = next(iter(self.stop.caught), None) or self.stop()
        left = [n for n in sorted((*self.stopped, *self.waiting, *self.elsewhere)) if not self._is_kept(n)]
        return Outcome(
            failed=[self.runs[number] for number in sorted(self.failed)],
            left=[self.runs[number] for number in left],
            elsewhere=[self.runs[number] for number in left if number in self.elsewhere],
            stopped=reason if left or reason in ("SIGINT", "SIGTERM") else None,
        )

    def _start(self) -> None:
        """Start runs while fewer than `at_once()` are under way and one can start."""
        while len(self.under_way) < self.at_once() and not self.stop() and (ready := self._ready()) is not None:
            if self.deadline is not None and time.monotonic() >= self.deadline:
                self.stop.ask("time limit")
                return
            self.waiting.remove(ready)
            run = self.runs[ready]
            try:
                weights = self._prepare(ready)
            except Exception as error:
                self._handle_error(ready, error)
                continue
            if weights is not None:
                self.under_way[self.pool.submit(self.runner.run, run, weights, self.stop)] = ready

    def _ready(self) -> int | None:
        """The first run in the queue whose weights do not depend on an unfinished run."""
        unfinished = {
            self.runs[number].run_dir for number in (*self.waiting, *self.under_way.values(), *self.elsewhere)
        }
        return next((number for number in self.waiting if not unfinished & self._needed_runs(self.runs[number])), None)

    def _needed_runs(self, run: Run) -> set[Path]:
        """The folders of the runs whose weights `run` needs."""
        needed = needed_entries(run.entry, self.records.entries)
        return {self.records.layout.run_dir(e.name, PUBLISHED_SEED, e.trial_epochs(run.trial_epochs)) for e in needed}

    def _check_elsewhere(self) -> None:
        """Drop runs that other processes have finished; queue the others again when there is nothing else to do."""
        for number in list(self.elsewhere):
            if self._is_kept(number):
                del self.elsewhere[number]
        if not self.under_way and not self.stop() and self._ready() is None:
            again = [number for number, ended in self.elsewhere.items() if ended < self.ended]
            self.waiting = sorted(self.waiting + again)
            for number in again:
                del self.elsewhere[number]

    def _is_done(self, number: int) -> bool:
        """Whether another process has finished this run meanwhile, and its weights are there if they are needed.

        Copies its record to its place. Raises FileError if that cannot be written.
        """
        run = self.runs[number]
        record = run.finished(self.records)
        for_its_weights = run.record_path is None and run.trial_epochs is None
        if record is None and not for_its_weights:
            return False
        needed = for_its_weights or any(run.run_dir in self._needed_runs(self.runs[n]) for n in self.waiting)
        if needed and resolve_weights(run.entry, self.records, trial_epochs=run.trial_epochs) is None:
            # other bits than the record has: they would come out of training it here again
            return for_its_weights and other_weights(run.entry, self.records) is not None
        if record is not None and run.record_path is not None:
            self._keep(run, record)
        return True

    def _is_kept(self, number: int) -> bool:
        """Whether it is done and its record is in its place."""
        try:
            return self._is_done(number)
        except (CnvzooError, OSError):
            return False

    def _prepare(self, number: int) -> dict[str, Path | list[Path]] | None:
        """Prepare the run's folder, locked against other processes.

        Returns the weights that it needs, by argument of run_recipe, or None if the run is done by now.
        """
        run = self.runs[number]
        label = f"[{number + 1}/{len(self.runs)}] {run}"
        with alone_in(run.run_dir) if run.run_dir.is_dir() else nullcontext():
            if self._is_done(number):
                self.say(f"{label}: finished meanwhile, not trained again")
                return None
            self.say(f"{label}: {run.reason}")
            weights: dict[str, Path | list[Path]] = {}
            for purpose, names in run.entry.recipe.needs.items():
                found = [self._weights_of(self.records.entries[name], run) for name in names]
                weights[purpose] = found if purpose == "teacher" else found[0]
            if (run.run_dir / RECORD).exists():
                # run_recipe would return the record of the finished run, or refuse to overwrite another one
                self.say(f"the finished run is moved to {shown(set_aside(run.run_dir))}")
            elif run.started:
                self.say(f"resuming from the state in {shown(run.run_dir)}")
        return weights

    def _weights_of(self, needed: Entry, run: Run) -> Path:
        found = resolve_weights(needed, self.records, trial_epochs=needed.trial_epochs(run.trial_epochs))
        if found is not None:
            return found
        if (others := other_weights(needed, self.records)) is not None:
            layout = self.records.layout
            raise RunError(
                f"it needs the weights of {needed.name} seed {PUBLISHED_SEED} of "
                f"{shown(layout.record(needed.name, PUBLISHED_SEED))}, and {shown(others)} are others: restore "
                f"{shown(layout.checkpoint(needed.recipe))}, or replace the record by --retrain --entry {needed.name}"
            )
        raise RunError(f"it needs the weights of {needed.name} seed {PUBLISHED_SEED}, which are missing")

    def _conclude(self, number: int, future: Future[RunRecord]) -> None:
        try:
            self._finish(self.runs[number], future.result())
        except Exception as error:
            self._handle_error(number, error)
        else:
            self.ended += 1
            self.on_finished()

    def _handle_error(self, number: int, error: Exception) -> None:
        """Record the error of one run; the others continue unless it is a request to stop."""
        run = self.runs[number]
        if isinstance(error, RunInterrupted):
            if error.unsaved:
                self.say(f"{run}: {error}")
            self.stop.ask(error.reason)
            self.stopped.append(number)
        elif isinstance(error, RunUnderWay):
            self.say(f"{run}: another process is training it; not trained here for now")
            self.elsewhere[number] = self.ended
        else:
            self.say(f"{run} failed: {in_a_line(error)}")
            self.failed.append(number)
            self.ended += 1

    def _finish(self, run: Run, record: RunRecord) -> None:
        problem = misplaced(record, run.entry, run.seed, trial_epochs=run.trial_epochs)
        if problem or record.recipe_sha256 != run.entry.fingerprint:
            raise HarnessError(f"{shown(run.run_dir)}: the runner returned {problem or 'a record of another recipe'}")
        self.say(f"{run}: {record.accuracy:.2f} % after {duration(record.seconds)} of training")
        if run.record_path is not None:
            self._keep(run, record)
        elif run.trial_epochs is None:
            self._compare(run, record)

    def _keep(self, run: Run, record: RunRecord) -> None:
        """Copy the record to its place, unless another process has put one there since the schedule was made."""
        assert run.record_path is not None
        present = self.records.status(run.entry, run.seed).done
        if present is None or present in run.replaces:
            self.records.keep(record)
        else:
            self._compare(run, record)

    def _compare(self, run: Run, record: RunRecord) -> None:
        """Say so if the weights differ from those of the record in the table, which is kept."""
        kept = self.records.layout.record(run.entry.name, run.seed)
        published = self.records.status(run.entry, run.seed).record
        if published is not None and published.weights_sha256 != record.weights_sha256:
            self.say(
                f"{run}: its weights differ from those of {shown(kept)}, which were trained on "
                f"{published.device['name']} and are kept; --retrain replaces them"
            )
