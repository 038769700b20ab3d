"""Runners train one run: in this process, or in a worker process; cluster.py has one that trains on a Ray cluster.

On a CPU several runs at once are several processes: the number of threads belongs to a process, and Python runs one
thread at a time. On a GPU they are threads of one process, each with a CUDA stream of its own.
"""

from __future__ import annotations

import collections
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias

import torch

from cnvzoo.errors import CnvzooError, in_a_line
from cnvzoo.models.compiled import sigint_blocked
from cnvzoo.training.device import deterministic, using_threads
from cnvzoo.training.record import RunRecord
from cnvzoo.training.run import run_recipe
from cnvzoo.training.state import RunError, RunInterrupted
from harness.schedule import Run

Stop: TypeAlias = Callable[[], "str | None"]  # the reason to stop for, once there is one
Train: TypeAlias = Callable[..., RunRecord]  # cnvzoo.training.run_recipe, or a replacement in tests
Weights: TypeAlias = Mapping[str, "Path | list[Path]"]  # by the argument of run_recipe: float_start and teacher

AT_ONCE_ON_A_GPU = 3
_POLL_SECONDS = 0.1
_LINES_KEPT = 5


class Runner(Protocol):
    """Trains or resumes one run.

    Attributes:
        waits: whether `run` only waits for another process, and so has to be called in another thread than the main
            one, which catches signals; otherwise training catches them where it is called in the main thread.
    """

    waits: ClassVar[bool]

    def run(self, run: Run, weights: Weights, stop: Stop) -> RunRecord:
        """Return the record, with `record.json` and `weights.safetensors` in `run.run_dir`.

        Called from several threads when several runs are trained at once. The run polls `stop()`; when it returns a
        reason, the run saves its state and stops.

        Raises:
            RunInterrupted: it stopped before its end, with its state in `run_dir`.
            RunUnderWay: another process is training it.
            Exception: any other error concerns this run alone.
        """
        ...


@dataclass(frozen=True)
class LocalRunner:
    """Trains in this process.

    Attributes:
        train: called as cnvzoo.training.run_recipe.
        device: to train on.
        deadline: of time.monotonic().
        own_stream: on a GPU, use a new CUDA stream for each run, so that the runs of several threads overlap.
    """

    train: Train
    device: torch.device
    deadline: float | None
    own_stream: bool = False
    waits: ClassVar[bool] = False

    def run(self, run: Run, weights: Weights, stop: Stop) -> RunRecord:
        stream = torch.cuda.stream(torch.cuda.Stream(self.device)) if self.own_stream else nullcontext()
        with stream:
            return self.train(
                run.entry.recipe,
                run_dir=run.run_dir,
                seed=run.seed,
                device=self.device,
                epochs=run.trial_epochs,
                deadline=self.deadline,
                stop=stop,
                **weights,
            )


def default_runs_at_once(device: torch.device, threads: int) -> int:
    """How many runs keep the device busy: three on a GPU, one for every `threads` usable cores on a CPU."""
    return AT_ONCE_ON_A_GPU if device.type == "cuda" else max(1, usable_cores() // threads)


def usable_cores() -> int:
    """How many cores this process may use; where the system does not say, as on macOS, all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def process_settings(device: torch.device, threads: int) -> Iterator[None]:
    """Settings of the whole process for the time of all runs: the threads on a CPU, deterministic kernels on a GPU.

    The first run to end would otherwise restore the previous settings while another is still training.
    """
    with deterministic(device) if device.type != "cpu" else using_threads(threads):
        yield


class WorkerEnded(RunInterrupted):
    """A worker process ended after a request to stop, before it could report how far it came."""

    def __init__(self, run: str, reason: str, run_dir: Path) -> None:
        super().__init__(run, reason, 0, 0, run_dir)
        self.run = run

    def __reduce__(self) -> tuple[type[WorkerEnded], tuple[Any, ...]]:
        return type(self), (self.run, self.reason, self.run_dir)

    def __str__(self) -> str:
        return f"{self.run}: stopped ({self.reason}); the same command resumes from the last saved state, if any"


@dataclass(frozen=True)
class ProcessRunner:
    """Trains each run in a new process, so that a crash ends one run only.

    Attributes:
        threads: of each run.
        deadline: of time.monotonic().
        say: called with each line that a worker prints, from the thread that waits for it.
        train: called as cnvzoo.training.run_recipe in the worker; it must be picklable.
        device: to train on.
    """

    threads: int
    deadline: float | None
    say: Callable[[str], None]
    train: Train = run_recipe
    device: str = "cpu"
    waits: ClassVar[bool] = True
    _starting: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def run(self, run: Run, weights: Weights, stop: Stop) -> RunRecord:
        name = run.name
        arguments = {
            "recipe": run.entry.recipe,
            "run_dir": run.run_dir,
            "seed": run.seed,
            "device": self.device,
            "epochs": run.trial_epochs,
            **weights,
        }
        with self._started(name, arguments) as (process, connection, last_lines):
            outcome = _wait_for_outcome(process, connection, stop)
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            raise _worker_error(name, process.exitcode or 0, stop(), last_lines, run.run_dir)
        return outcome

    @contextmanager
    def _started(
        self, name: str, arguments: dict[str, Any]
    ) -> Iterator[tuple[SpawnProcess, Connection, collections.deque[str]]]:
        """A worker process, the connection to it, and the last lines that it printed; it has ended afterwards."""
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        lines, written = context.Pipe(duplex=False)
        # the clock of time.monotonic() is the same for all processes of a machine
        process = context.Process(
            target=_work, args=(theirs, written, self.train, arguments, self.threads, self.deadline)
        )
        resource_tracker.ensure_running()  # the first start of a process would start it, which unblocks SIGINT
        try:
            # the worker never gets SIGINT, which a terminal sends to all processes: this one passes it on
            with self._starting, _environment(self.threads), sigint_blocked():
                process.start()
        except OSError as error:
            raise RunError(f"its worker process cannot be started: {error}") from None
        finally:
            theirs.close()
            written.close()
        last_lines: collections.deque[str] = collections.deque(maxlen=_LINES_KEPT)
        reader = threading.Thread(target=self._forward_lines, args=(lines, name, last_lines), daemon=True)
        reader.start()
        try:
            yield process, connection, last_lines
            process.join()
        finally:
            connection.close()  # after an error, this asks the worker to stop
            process.join()
            reader.join(timeout=1)  # a process that the worker left behind may keep the pipe open

    def _forward_lines(self, lines: Connection, name: str, last_lines: collections.deque[str]) -> None:
        with lines, open(lines.fileno(), errors="replace", closefd=False) as stream:
            for line in map(str.rstrip, stream):
                last_lines.append(line)
                self.say(line if line.startswith(name) else f"{name}: {line}")


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """OMP_NUM_THREADS for a process started inside: OpenMP reads it when torch is imported."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _wait_for_outcome(process: SpawnProcess, connection: Connection, stop: Stop) -> RunRecord | Exception | None:
    """The record or error that the worker sends, None if it ended without. Forwards the first reason to stop."""
    asked = False
    while not wait_for_any([connection, process.sentinel], timeout=_POLL_SECONDS):
        if not asked and (reason := stop()):
            with suppress(OSError):  # it has just ended
                connection.send(reason)
            asked = True
    try:
        return connection.recv() if connection.poll() else None
    except (EOFError, OSError):
        return None


def _worker_error(name: str, status: int, reason: str | None, last_lines: Iterable[str], run_dir: Path) -> CnvzooError:
    """The error for a worker that ended without an outcome."""
    number = -status if status < 0 else None
    if reason is None and number in (signal.SIGINT, signal.SIGTERM):
        reason = signal.Signals(number).name
    if reason is not None:
        return WorkerEnded(name, reason, run_dir)
    cause = f"ended with status {status}"
    if number is not None:
        cause = f"was killed by signal {number} ({signal.strsignal(number)})"
    if number == signal.SIGKILL:
        cause += ", as the kernel does when memory runs out: a smaller --at-once needs less"
    return RunError("\n  ".join([f"its worker process {cause}. Its last lines:", *last_lines]))


def _work(
    connection: Connection,
    lines: Connection,
    train: Train,
    arguments: dict[str, Any],
    threads: int,
    deadline: float | None,
) -> None:
    """The worker process: train one run and send its record or error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(lines.fileno(), 2)
    os.dup2(2, 1)
    lines.close()
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):  # with these, rich writes colours and bars to a pipe too
        os.environ.pop(name, None)
    reasons: list[str] = []
    threading.Thread(target=_receive_stop, args=(connection, reasons), daemon=True).start()
    torch.set_num_threads(threads)
    try:
        outcome: RunRecord | Exception = train(**arguments, deadline=deadline, stop=lambda: next(iter(reasons), None))
    except Exception as error:
        outcome = picklable(error)
    with suppress(OSError):  # the parent is gone
        connection.send(outcome)


def _receive_stop(connection: Connection, reasons: list[str]) -> None:
    """Collect requests to stop.

    The end of the parent process counts as SIGTERM. If there was a request before, this process ends at once.
    """
    with suppress(EOFError, OSError):
        while True:
            reasons.append(connection.recv())
    if reasons:
        os._exit(1)
    reasons.append("SIGTERM")


def picklable(error: Exception) -> CnvzooError:
    """The error if it is one of cnvzoo and another process can unpickle it, else its message."""
    if isinstance(error, CnvzooError):
        with suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return error
    return CnvzooError(in_a_line(error))
