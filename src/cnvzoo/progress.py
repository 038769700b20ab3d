"""Progress on stderr: a bar with the time left on a terminal, plain lines elsewhere.

Threads other than the main one print plain lines on a terminal too, as they may share it with others.
"""

from __future__ import annotations

import importlib
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


_LINE_EVERY_SECONDS = 10.0
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
    """

    def __init__(self, name: str, trainer: TrainingStatus, quiet: bool = False) -> None:
        self._name = name
        self._console = _console(quiet)
        self._epochs = trainer.total_steps // trainer.steps_per_epoch
        self._started, self._first_work = time.monotonic(), trainer.work(trainer.step)
        self._bar = _bar(self._console, "{task.fields[status]}")
        self._task = self._bar.add_task(name, total=trainer.total_steps, completed=trainer.step, status="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, trainer: TrainingStatus) -> None:
        at_epoch_end = trainer.step % trainer.steps_per_epoch == 0
        done = trainer.work(trainer.step)
        rate = (time.monotonic() - self._started) / (done - self._first_work)
        minutes_left = f"{rate * (trainer.work(trainer.total_steps) - done) / 60:.1f} min left"
        loss = f", loss {trainer.history[-1]['loss']:.3f}" if trainer.history else ""
        self._bar.update(self._task, completed=trainer.step, status=minutes_left + loss)
        if at_epoch_end and not _has_terminal(self._console):
            last = trainer.history[-1]
            self._console.print(
                f"{self._name}: epoch {int(last['epoch'])}/{self._epochs}, loss {last['loss']:.4f}, "
                f"{last['seconds']:.1f} s, {minutes_left}",
                soft_wrap=True,
            )


def counted(items: Sequence[T], name: str, *, quiet: bool = False) -> Iterator[T]:
    """Yield the items and show how many are done; without a terminal, a line every 10 seconds."""
    console = _console(quiet)
    started = printed = time.monotonic()
    with _bar(console) as bar:
        task = bar.add_task(name, total=len(items))
        for done, item in enumerate(items, start=1):
            yield item
            bar.update(task, completed=done)
            now = time.monotonic()
            if not _has_terminal(console) and now - printed >= _LINE_EVERY_SECONDS:
                left = (now - started) / done * (len(items) - done)
                console.print(f"{name}: {done}/{len(items)}, {left:.0f} s left")
                printed = now


def _console(quiet: bool) -> Console:
    if "rich.style" not in sys.modules:  # its import draws from Python's global random generator
        before = random.getstate()
        importlib.import_module("rich.style")
        random.setstate(before)
    from rich.console import Console

    return Console(stderr=True, quiet=quiet, highlight=False)


def _bar(console: Console, status: str | None = None) -> Progress:
    """A progress bar with the time left, or with the text column `status` in its place."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("[bold]{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn(status) if status else progress.TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=console.quiet or not _has_terminal(console),
    )


def _has_terminal(console: Console) -> bool:
    return console.is_terminal and threading.current_thread() is threading.main_thread()
