"""What a runner is: one run in, its record out.

Runs in this process, and how many of them go at once where nobody says: the machine decides that, not the bits.

On a CPU, several runs are several processes instead (processes.py): a process has one number of threads for all that
it does, and one run at a time that the interpreter works for.


Runs on the CPU in processes of their own, so that each has its threads, and a crash takes one run along."""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from cnvzoo.errors import CnvzooError
from cnvzoo.training.device import deterministic
from cnvzoo.training.recipe import Recipe
from cnvzoo.training.record import RunRecord
from cnvzoo.training.run import RECORD
from cnvzoo.training.state import RunError, RunInterrupted, RunUnderWay
from cnvzoo.training.trainer import TrainingDiverged


@dataclass(frozen=True)
class Run:
    """One run to be trained, or to be gone on with.

    epochs:  its length where that is less than the recipe's, else None
    weights: files that the recipe needs, by what run_recipe calls them: one as float_start, any number as teacher
    """

    recipe: Recipe
    seed: int
    run_dir: Path
    epochs: int | None = None
    weights: Mapping[str, Path | list[Path]] = field(default_factory=dict)


class Runner(Protocol):
    """Trains one run, or goes on with it."""

    def run(self, run: Run, stop: Callable[[], str | None]) -> RunRecord:
        """Return the record, with `record.json` and `weights.safetensors` in `run.run_dir`.

        Called in several threads at once where several runs go at once. `stop()` is to be asked often; once it gives
        a reason, the run is to stop with its state saved.

        Raises RunInterrupted where it stops before the end, its state in `run_dir`; RunUnderWay where another process
        is training it; any other exception where this run cannot be had, which says nothing about others.
        """
        ...


_AT_ONCE_ON_A_GPU = 3


@dataclass(frozen=True)
class LocalRunner:
    """In this process. `train` is cnvzoo.training.run_recipe, or what a test puts in its place.

    own_stream: on a GPU, each run on a CUDA stream of its own, so that those of several threads overlap.
    """

    train: Callable[..., RunRecord]
    device: torch.device
    deadline: float | None
    own_stream: bool = False

    def run(self, run: Run, stop: Callable[[], str | None]) -> RunRecord:
        stream = torch.cuda.stream(torch.cuda.Stream(self.device)) if self.own_stream else nullcontext()
        with stream:
            return self.train(
                run.recipe,
                run_dir=run.run_dir,
                seed=run.seed,
                device=self.device,
                epochs=run.epochs,
                deadline=self.deadline,
                stop=stop,
                **run.weights,
            )


def at_once_by_default(device: torch.device, threads: int) -> int:
    """How many runs keep the device busy: a GPU by three, a CPU by one for every `threads` usable cores."""
    if device.type == "cuda":
        return _AT_ONCE_ON_A_GPU
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // threads)


@contextmanager
def settings(device: torch.device, threads: int) -> Iterator[None]:
    """What holds for a whole process, set around all of its runs and put back after the last: on a CPU the threads,
    on a GPU deterministic kernels, which a run that ends would else put back while another is under way.
    """
    if device.type != "cpu":
        with deterministic(device):
            yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


WORKER = Path(__file__).with_name("worker.py")
_LOOK_EVERY_SECONDS = 0.1
_LINES_KEPT = 5
_ERRORS = {"RunError": RunError, "RunUnderWay": RunUnderWay, "TrainingDiverged": TrainingDiverged}


class WorkerEnded(RunInterrupted):
    """A worker that a request to stop ended before it could say how far it came."""

    def __init__(self, run: str, reason: str, run_dir: Path) -> None:
        super().__init__(run, reason, 0, 0, run_dir)
        self.run = run

    def __str__(self) -> str:
        return (
            f"{self.run}: stopped ({self.reason}); the same command goes on from the last state saved, if there is one"
        )


@dataclass(frozen=True)
class ProcessRunner:
    """On the CPU of this machine, each run in a process that is started for it.

    threads: of each run
    say:     is called with each line that a worker prints, from the thread that runs it
    """

    threads: int
    deadline: float | None
    say: Callable[[str], None]

    def run(self, run: Run, stop: Callable[[], str | None]) -> RunRecord:
        name = f"{run.recipe.name}, seed {run.seed}"
        order = {
            "recipe": run.recipe.model_dump(mode="json"),
            "seed": run.seed,
            "run_dir": run.run_dir,
            "epochs": run.epochs,
            "weights": run.weights,
            "device": "cpu",
            "threads": self.threads,
            "seconds_left": None if self.deadline is None else self.deadline - time.monotonic(),
        }
        with self._started(order, name) as (worker, last_lines):
            _wait(worker, stop)
            assert worker.stdout is not None
            report = worker.stdout.read()  # a line that fits into the pipe: the worker never waits for a reader
        if not report.endswith("\n"):
            raise _ended(name, worker.returncode, stop(), last_lines, run.run_dir)
        _raise_unless_finished(report, name, run.run_dir)
        return RunRecord.read(run.run_dir / RECORD)

    @contextmanager
    def _started(
        self, order: dict[str, object], name: str
    ) -> Iterator[tuple[subprocess.Popen[str], collections.deque[str]]]:
        """The worker, and the last of its lines; the end of its stdin stops it where this process goes first."""
        # a stream that is no terminal gets plain lines, unless these say otherwise
        environment = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
        environment["OMP_NUM_THREADS"] = str(self.threads)
        command = [sys.executable, str(WORKER), json.dumps(order, default=str)]
        lines, written = os.pipe()
        try:
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=written, text=True, errors="replace",
                env=environment,
            )  # fmt: skip
        except OSError as error:
            os.close(lines)
            raise RunError(f"its worker process cannot be started: {error}") from None
        finally:
            os.close(written)
        last_lines: collections.deque[str] = collections.deque(maxlen=_LINES_KEPT)
        reader = threading.Thread(target=self._hand_on, args=(lines, name, last_lines), daemon=True)
        reader.start()
        with worker:
            yield worker, last_lines
        reader.join(timeout=1)  # not for ever: a process that the worker left behind would hold the pipe open

    def _hand_on(self, lines: int, name: str, last_lines: collections.deque[str]) -> None:
        with open(lines, errors="replace") as stream:
            for line in map(str.rstrip, stream):
                last_lines.append(line)
                self.say(line if line.startswith(name) else f"{name}: {line}")


def _raise_unless_finished(report: str, name: str, run_dir: Path) -> None:
    """Raise what a worker reports, if that is anything but the end of its run."""
    line = report.splitlines()[-1]  # in front of it may be what Python printed when it started
    try:
        outcome = json.loads(line)
        if "finished" in outcome:
            return
        if "failed" in outcome:
            error: CnvzooError = _ERRORS.get(outcome["failed"], CnvzooError)(outcome["message"])
        else:
            error = RunInterrupted(
                name, outcome["stopped"], outcome["step"], outcome["total_steps"], run_dir, outcome["unsaved"]
            )
    except (ValueError, KeyError, TypeError):
        raise RunError(f"its worker process printed {line[:200]!r} in the place of a report") from None
    raise error


def _wait(worker: subprocess.Popen[str], stop: Callable[[], str | None]) -> None:
    """Wait for the worker's end; ask it to stop, once, when `stop` says so."""
    told = False
    while worker.poll() is None:
        if not told and (reason := stop()):
            assert worker.stdin is not None
            with suppress(OSError):  # it has ended just now; a buffer would be flushed again when it is closed
                os.write(worker.stdin.fileno(), f"{reason}\n".encode())
            told = True
        with suppress(subprocess.TimeoutExpired):
            worker.wait(timeout=_LOOK_EVERY_SECONDS)


def _ended(name: str, status: int, reason: str | None, last_lines: Iterable[str], run_dir: Path) -> CnvzooError:
    """What to raise for a worker that left no report."""
    by = -status if status < 0 else None
    if reason is None and by in (signal.SIGINT, signal.SIGTERM):
        reason = signal.Signals(by).name
    if reason is not None:
        return WorkerEnded(name, reason, run_dir)
    cause = f"ended with status {status}" if by is None else f"was killed by signal {by} ({signal.strsignal(by)})"
    if by == signal.SIGKILL:
        cause += ", as the kernel does where memory runs out: fewer --at-once need less"
    return RunError("\n  ".join([f"its worker process {cause}. Its last lines:", *last_lines]))
