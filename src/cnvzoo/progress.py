"""Progress on stderr: a bar with the time left on a terminal, plain lines elsewhere.

Threads other than the main one print plain lines on a terminal too, as they may share it with others. What cannot be
shown, because stderr is on a full disk or nothing reads it any more, is left out: that is no reason to end a run.
"""

from __future__ import annotations

import importlib
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


_LINE_EVERY_SECONDS = 10.0
_STEPS_LINE_EVERY_SECONDS = 30.0  # of training, where a line is also printed for each epoch
_COMPILING = "compiling, which takes up to a minute the first time"
T = TypeVar("T")


class TrainingStatus(Protocol):
    """The part of a `Trainer` that progress is read from."""

    step: int
    total_steps: int
    steps_per_epoch: int
    history: list[dict[str, float]]

    def work(self, step: int, /) -> float:
        """Cost of the first `step` steps, in steps on whole images."""
        ...


class TrainingProgress:
    """Context manager that shows the progress of training; it is called with the trainer after every step.

    Args:
        name: name of the run.
        trainer: the trainer, at the step that training starts from.
        quiet: print nothing.
        compiles: say that the first step compiles code.
    """

    def __init__(self, name: str, trainer: TrainingStatus, quiet: bool = False, compiles: bool = False) -> None:
        self._name = name
        self._console = progress_console(quiet)
        self._epochs = trainer.total_steps // trainer.steps_per_epoch
        self._first_step, self._first_work = trainer.step, trainer.work(trainer.step)
        self._started = self._printed = time.monotonic()
        self._compiles = compiles and trainer.step < trainer.total_steps
        self._bar = _bar(self._console, "{task.fields[status]}")
        self._task = self._bar.add_task(name, total=trainer.total_steps, completed=trainer.step, status="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        if self._compiles:
            self._bar.update(self._task, status=_COMPILING)
            if not _has_terminal(self._console):
                self._print(_COMPILING)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, trainer: TrainingStatus) -> None:
        done, now = trainer.work(trainer.step), time.monotonic()
        if self._compiles and trainer.step == self._first_step + 1:  # the time of this step says nothing of the others
            self._started, self._first_work = now, done
            self._bar.update(self._task, completed=trainer.step, status="")
            if trainer.step % trainer.steps_per_epoch:
                return
        left = ""
        if done > self._first_work:
            rate = (now - self._started) / (done - self._first_work)
            left = f"{rate * (trainer.work(trainer.total_steps) - done) / 60:.1f} min left"
        last = trainer.history[-1] if trainer.history else {}
        loss = f"loss {last['loss']:.3f}" if last else ""
        self._bar.update(self._task, completed=trainer.step, status=_joined(left, loss, _validation(last)))
        if _has_terminal(self._console):
            return
        if trainer.step % trainer.steps_per_epoch == 0:
            seconds = f"{last['seconds']:.1f} s"
            epoch = f"epoch {int(last['epoch'])}/{self._epochs}"
            self._print(_joined(epoch, f"loss {last['loss']:.4f}", _validation(last), seconds, left))
        elif now - self._printed >= _STEPS_LINE_EVERY_SECONDS:
            epoch, step = divmod(trainer.step, trainer.steps_per_epoch)
            self._print(_joined(f"epoch {epoch + 1}/{self._epochs}, step {step}/{trainer.steps_per_epoch}", left))

    def _print(self, line: str) -> None:
        self._console.print(f"{self._name}: {line}", soft_wrap=True, markup=False)
        self._printed = time.monotonic()


def _validation(epoch: Mapping[str, float]) -> str:
    return f"validation {epoch['validation_accuracy']:.2f} %" if "validation_accuracy" in epoch else ""


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def counted(items: Sequence[T], name: str, *, quiet: bool = False) -> Iterator[T]:
    """Yield the items and show how many are done; without a terminal, a line every 10 seconds."""
    with counting(len(items), name, quiet=quiet) as one_more:
        for item in items:
            yield item
            one_more()


@contextmanager
def counting(total: int, name: str, *, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """A context that gives a function to call after each of `total` pieces of work, and shows them as `counted`."""
    console = progress_console(quiet)
    started = printed = time.monotonic()
    done = 0
    with _bar(console) as bar:
        task = bar.add_task(name, total=total)

        def one_more() -> None:
            nonlocal done, printed
            done += 1
            bar.update(task, completed=done)
            now = time.monotonic()
            if not _has_terminal(console) and now - printed >= _LINE_EVERY_SECONDS:
                left = (now - started) / done * (total - done)
                console.print(f"{name}: {done}/{total}, {left:.0f} s left", soft_wrap=True, markup=False)
                printed = now

        yield one_more


def progress_console(quiet: bool = False) -> Console:
    """A console on stderr that leaves out what cannot be written; nothing is shown with `quiet`."""
    if "rich.style" not in sys.modules:  # its import draws from Python's global random generator
        before = random.getstate()
        importlib.import_module("rich.style")
        random.setstate(before)
    from rich.console import Console

    class ProgressConsole(Console):
        def __exit__(self, *error: Any) -> None:
            """Write what was printed."""
            try:
                super().__exit__(*error)
            except OSError:
                del self._buffer[:]  # else it would be written again with the next line

        def on_broken_pipe(self) -> None:
            """Instead of the end of the process."""
            self.quiet = True

    return ProgressConsole(stderr=True, quiet=quiet, highlight=False, emoji=False)


def print_line(text: str) -> None:
    """Print a line on stderr as it is; one that cannot be written, on a full disk or a closed pipe, is left out."""
    progress_console().print(text, soft_wrap=True, markup=False)


def _bar(console: Console, status: str | None = None) -> Progress:
    """A progress bar with the time left, or with the text column `status` in its place."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}", style="bold", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn(status, markup=False)
        if status
        else progress.TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=console.quiet or not _has_terminal(console),
    )


def _has_terminal(console: Console) -> bool:
    return console.is_terminal and threading.current_thread() is threading.main_thread()
