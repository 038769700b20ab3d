"""Watching a run: what is known of each epoch when it ends, and logs of it as CSV and for TensorBoard.

Nothing here changes the weights. Logs are written from the run's history when it starts or resumes, and continued with
each epoch, so a resumed run has each epoch once.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from cnvzoo.files import expanded, sha256_of, write_text, writing
from cnvzoo.progress import print_line
from cnvzoo.training.recipe import Recipe
from cnvzoo.training.state import RunError


@dataclass(frozen=True)
class EpochReport:
    """An epoch of a run that has ended.

    Attributes:
        epoch: its number, from 1.
        epochs: number of epochs of the run.
        loss: mean training loss.
        lr: learning rate of its last step.
        seconds: training time, without validation.
        validation_accuracy: top-1 in percent on held-out images; None where the run does not validate.
    """

    epoch: int
    epochs: int
    loss: float
    lr: float
    seconds: float
    validation_accuracy: float | None = None

    @classmethod
    def of(cls, epoch: Mapping[str, float], epochs: int) -> EpochReport:
        """The report of an epoch in the history of a run of `epochs` epochs."""
        return cls(
            int(epoch["epoch"]), epochs, epoch["loss"], epoch["lr"], epoch["seconds"], epoch.get("validation_accuracy")
        )


class EpochLog(Protocol):
    """A log of a run's epochs."""

    def start(self, past: Sequence[EpochReport]) -> None:
        """Begin the log with the epochs that have ended."""
        ...

    def add(self, report: EpochReport) -> None:
        """Add an epoch that has ended now."""
        ...

    def close(self) -> None:
        """Release the log's files."""
        ...


class CsvLog:
    """A CSV file with a line for each epoch: entry, seed, and the fields of `EpochReport`.

    Args:
        path: the file. One that exists has to be the log of the same run, and is written anew from its history. If it
            has other lines than that, because they are of a run with other settings or later than the state that the
            run resumes from, it is kept: renamed to `<name>-<first digits of its sha256><suffix>`.
        recipe: the run's, with its seed.
        epochs: number of epochs of the run.

    Raises:
        RunError: the file exists and is anything else.
    """

    COLUMNS = ("entry", "seed", *(field.name for field in fields(EpochReport)))

    def __init__(self, path: str | Path, recipe: Recipe, epochs: int) -> None:
        self._path = expanded(path)
        self._run = {"entry": recipe.name, "seed": recipe.seed}
        self._text = ""
        self._check_existing({**self._run, "epochs": epochs})

    def _check_existing(self, run: Mapping[str, Any]) -> None:
        with writing(self._path):
            try:
                with self._path.open(newline="", encoding="utf-8") as file:
                    reader = csv.DictReader(file)
                    columns = reader.fieldnames
                    found = next(reader, None)
            except FileNotFoundError:
                return
            except (UnicodeDecodeError, csv.Error):
                columns, found = [], None
        remedy = "give another file, or move that one away"
        if columns is not None and tuple(columns) != self.COLUMNS:
            raise RunError(f"{self._path}: exists, and is not a log of epochs: {remedy}")
        if found is not None and (differences := [k for k, value in run.items() if found[k] != str(value)]):
            of = ", ".join(f"{key} {found[key]}, not {run[key]}" for key in differences)
            raise RunError(f"{self._path}: holds the log of another run: {of}: {remedy}")

    def start(self, past: Sequence[EpochReport]) -> None:
        lines = _csv_line(self.COLUMNS) + "".join(map(self._line, past))
        with writing(self._path):
            if self._path.exists() and not lines.startswith(self._path.read_text(encoding="utf-8")):
                aside = self._path.with_name(f"{self._path.stem}-{sha256_of(self._path)[:8]}{self._path.suffix}")
                self._path.replace(aside)
                print_line(f"{self._path}: had other epochs than this run, and is now {aside}")
        self._write(lines)

    def add(self, report: EpochReport) -> None:
        self._write(self._text + self._line(report))

    def _write(self, text: str) -> None:
        write_text(self._path, text)  # anew, since a full disk could leave a part of an appended line
        self._text = text

    def close(self) -> None:
        pass

    def _line(self, report: EpochReport) -> str:
        values = {**self._run, **asdict(report)}
        return _csv_line(["" if values[column] is None else values[column] for column in self.COLUMNS])


def _csv_line(values: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


class TensorBoardLog:
    """Scalars for TensorBoard: loss, lr, seconds and, where the run validates, validation_accuracy, by epoch.

    Args:
        folder: folder of the event files.

    Raises:
        RunError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RunError(
                f"a log for TensorBoard needs the package tensorboard ({error}): pip install 'cnvzoo[tensorboard]'"
            ) from None
        self._folder, self._open = expanded(folder), SummaryWriter
        self._writer: Any = None

    def start(self, past: Sequence[EpochReport]) -> None:
        with writing(self._folder):
            # a viewer drops what earlier event files of this folder say of the steps from purge_step on
            self._writer = self._open(str(self._folder), purge_step=1)
        for report in past:
            self.add(report)

    def add(self, report: EpochReport) -> None:
        values = asdict(report)
        for name in ("loss", "lr", "seconds", "validation_accuracy"):
            if values[name] is not None:
                self._writer.add_scalar(name, values[name], report.epoch)
        with writing(self._folder):
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@dataclass(frozen=True)
class Watch:
    """The logs and the function that receive the epochs of a run.

    Attributes:
        epochs: number of epochs of the run.
        logs: logs, which have all epochs of the run.
        on_epoch: called with the report of each epoch that ends in this call.
    """

    epochs: int
    logs: tuple[EpochLog, ...] = ()
    on_epoch: Callable[[EpochReport], object] | None = None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        epochs: int,
        on_epoch: Callable[[EpochReport], object] | None,
        log: str | Path | None,
        tensorboard: str | Path | None,
    ) -> Watch:
        """The watch of a run, with the logs at the given paths. Raises RunError as the logs do."""
        logs: list[EpochLog] = [] if log is None else [CsvLog(log, recipe, epochs)]
        return cls(epochs, (*logs, *([] if tensorboard is None else [TensorBoardLog(tensorboard)])), on_epoch)

    @contextmanager
    def started(self, history: Sequence[Mapping[str, float]]) -> Iterator[None]:
        """A context in which the logs are open; they begin with the epochs of `history`."""
        with ExitStack() as closing:
            for log in self.logs:
                closing.callback(log.close)
                log.start([EpochReport.of(epoch, self.epochs) for epoch in history])
            yield

    def epoch_ended(self, epoch: Mapping[str, float]) -> None:
        """Pass an epoch, given as in the history, to the logs and to `on_epoch`."""
        report = EpochReport.of(epoch, self.epochs)
        for log in self.logs:
            log.add(report)
        if self.on_epoch is not None:
            self.on_epoch(report)


def check_validation(recipe: Recipe, validate: int, holdout: int) -> None:
    """Raise RunError where a run cannot score `validate` images after each epoch.

    Only held-out images can be: a run without them trains on all training images, and reads the test set once, at its
    end.
    """
    if not validate:
        return  # a holdout that is impossible is refused elsewhere
    if not holdout:
        raise RunError(
            f"{recipe.name}: validate={validate} needs held-out images: without them a run trains on all training "
            f"images, and reads the test set once, at its end: give holdout={validate} too, or more"
        )
    if validate > holdout:
        raise RunError(f"{recipe.name}: validate={validate}: only {holdout} images are held out: validate those")
