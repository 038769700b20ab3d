"""Watching a run: validation, the report of each epoch, and logs. None of it changes the weights."""

from __future__ import annotations

import csv
import importlib
import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from synthetic import CNV_BITS, StepHook, noise, recipe, run

import cnvzoo
from cnvzoo.data import Dataset
from cnvzoo.files import FileError
from cnvzoo.training import RunError, RunInterrupted, RunRecord, run_recipe

HELD: dict[str, Any] = {"holdout": 8}


def validations(record: RunRecord) -> list[float | None]:
    return [epoch.get("validation_accuracy") for epoch in record.history]


@pytest.mark.parametrize("changes", [{}, {"name": "mnist_quant_cnv", **CNV_BITS}])
def test_validation_leaves_the_weights_as_they_are(changes, tmp_path, uncompiled) -> None:
    wanted = recipe(**changes)
    plain = run(wanted, tmp_path / "plain", **HELD)
    validated = run(wanted, tmp_path / "validated", validate=8, **HELD)
    assert validated.weights_sha256 == plain.weights_sha256
    assert validated.correct == plain.correct
    assert validations(plain) == [None, None]
    assert validations(validated)[-1] == validated.accuracy


def test_images_of_all_classes_are_validated(tmp_path, monkeypatch) -> None:
    images = torch.randint(256, (48, 28, 28), dtype=torch.uint8)
    labels = [n // 16 for n in range(48)]  # in the order of the classes, as of a folder
    data = Dataset.from_arrays(images, labels, "abc", test_images=images[:3], test_labels=[0, 1, 2])
    scored: list[list[int]] = []

    def count(model, images, labels, *_, **__) -> int:
        scored.append(labels.tolist())
        return 0

    monkeypatch.setattr(importlib.import_module("cnvzoo.training.run"), "count_correct", count)
    run(recipe(), tmp_path, data, holdout=12, validate=3)
    assert scored == [[0, 1, 2]] * 2 + [[0] * 4 + [1] * 4 + [2] * 4]


def test_one_held_out_image_is_validated(tmp_path) -> None:
    record = run(recipe(), tmp_path, validate=1, **HELD)
    assert all(accuracy in (0.0, 100.0) for accuracy in validations(record))
    assert RunRecord.read(tmp_path / "record.json") == record


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"validate": 5}, "validate=5 needs held-out images: without them a run trains on all training images"),
        ({"validate": 9, "holdout": 8}, "validate=9: only 8 images are held out: validate those"),
        ({"validate": -1, "holdout": 8}, "validate=-1: a number of held-out images"),
        ({"validate": True, "holdout": 8}, "validate=True: a number of held-out images"),
    ],
)
def test_images_that_cannot_be_validated(arguments, says, tmp_path) -> None:
    with pytest.raises(RunError, match=says):
        run(recipe(), tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_record_of_a_scored_test_set_has_no_validation(tmp_path) -> None:
    record = run(recipe(), tmp_path)
    text = (tmp_path / "record.json").read_text()
    (tmp_path / "record.json").write_text(text.replace('"loss"', '"validation_accuracy": 50.0, "loss"', 1))
    with pytest.raises(ValueError, match="validated is True"):
        RunRecord.read(tmp_path / "record.json")
    assert record.holdout == 0


def test_each_epoch_is_reported(tmp_path) -> None:
    reports: list[cnvzoo.EpochReport] = []
    record = run(recipe(), tmp_path, on_epoch=reports.append, validate=4, **HELD)
    assert [(report.epoch, report.epochs) for report in reports] == [(1, 2), (2, 2)]
    for report, epoch in zip(reports, record.history, strict=True):
        assert report.loss == epoch["loss"]
        assert report.lr == epoch["lr"]
        assert report.seconds == epoch["seconds"]
        assert report.validation_accuracy == epoch["validation_accuracy"]


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_an_error_of_the_callback_is_raised_when_the_state_is_saved(error: type[BaseException], tmp_path) -> None:
    wanted = recipe()
    whole = run(wanted, tmp_path / "whole")

    def fail(report: cnvzoo.EpochReport) -> None:
        raise error(f"in epoch {report.epoch}")

    with pytest.raises(error, match="in epoch 1"):
        run(wanted, tmp_path / "failed", on_epoch=fail)
    assert (tmp_path / "failed" / "state.safetensors").exists()
    resumed: list[int] = []
    record = run(wanted, tmp_path / "failed", on_epoch=lambda report: resumed.append(report.epoch))
    assert resumed == [2]
    assert record.weights_sha256 == whole.weights_sha256


def test_a_second_interrupt_in_the_callback_stops_at_once(tmp_path) -> None:
    def interrupt_twice(_: cnvzoo.EpochReport) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt):
            run(recipe(), tmp_path, on_epoch=interrupt_twice)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "state.safetensors").exists()


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_csv_log_of_a_resumed_run_has_each_epoch_once(tmp_path, each_step: StepHook) -> None:
    log, wanted = tmp_path / "log.csv", recipe(epochs=3)
    each_step(lambda trainer: trainer.step == 8 and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunInterrupted):
        run(wanted, tmp_path / "run", log=log, validate=4, **HELD)
    each_step(None)
    assert [row["epoch"] for row in rows(log)] == ["1"]
    log.write_text(log.read_text() + log.read_text().splitlines()[1].replace("resnet8,0,1,", "resnet8,0,2,") + "\n")
    record = run(wanted, tmp_path / "run", log=log, validate=4, **HELD)
    written = rows(log)
    assert [(row["entry"], row["seed"], row["epoch"], row["epochs"]) for row in written] == [
        ("mnist_resnet8", "0", str(epoch), "3") for epoch in (1, 2, 3)
    ]
    for row, epoch in zip(written, record.history, strict=True):
        for name in ("loss", "lr", "seconds", "validation_accuracy"):
            assert float(row[name]) == epoch[name]


def test_the_epochs_of_another_run_of_the_same_name_are_kept(tmp_path, capsys) -> None:
    log = tmp_path / "log.csv"
    run(recipe(), tmp_path / "first", log=log)
    first = log.read_bytes()
    run(recipe(optimizer={"lr": 0.01}), tmp_path / "second", log=log)
    (kept,) = tmp_path.glob("log-*.csv")
    assert kept.read_bytes() == first
    assert f"{log}: had other epochs than this run, and is now {kept}" in capsys.readouterr().err
    assert [row["epoch"] for row in rows(log)] == ["1", "2"]
    assert log.read_bytes() != first


def test_a_csv_log_of_a_finished_run_is_written_from_its_record(tmp_path) -> None:
    wanted = recipe()
    run(wanted, tmp_path / "run")
    run(wanted, tmp_path / "run", log=tmp_path / "log.csv")
    assert [row["validation_accuracy"] for row in rows(tmp_path / "log.csv")] == ["", ""]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a,b\n1,2\n", "exists, and is not a log of epochs: give another file"),
        (b"\xff\xfe", "exists, and is not a log of epochs"),
        ("seed 1", "holds the log of another run: seed 1, not 0: give another file"),
    ],
)
def test_a_csv_log_replaces_no_other_file(content, says, tmp_path) -> None:
    log = tmp_path / "log.csv"
    if content == "seed 1":
        run(recipe(seed=1), tmp_path / "other", log=log, epochs=2)
    else:
        log.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = log.read_bytes()
    with pytest.raises(RunError, match=says):
        run(recipe(), tmp_path / "run", log=log)
    assert log.read_bytes() == before


def test_a_csv_log_at_an_impossible_path_is_refused_with_a_remedy(tmp_path) -> None:
    (tmp_path / "file").touch()
    for log, says in (
        ("", "Is a directory: give the path of a file"),
        ("file/log.csv", "file is a file, not a folder"),
    ):
        with pytest.raises(FileError, match=says):
            run(recipe(), tmp_path / "run", log=tmp_path / log)


class FakeWriter:
    """Replaces torch.utils.tensorboard.SummaryWriter, which needs another package."""

    made: list[FakeWriter]

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = False
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[FakeWriter]:
    module: Any = ModuleType("torch.utils.tensorboard")
    monkeypatch.setattr(FakeWriter, "made", [], raising=False)
    module.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return FakeWriter.made


def test_tensorboard_has_every_epoch_of_a_resumed_run(tmp_path, writers: list[FakeWriter]) -> None:
    wanted = recipe()
    with pytest.raises(RuntimeError, match="stop"):
        run(wanted, tmp_path / "run", on_epoch=_stop, tensorboard=tmp_path / "board", validate=4, **HELD)
    record = run(wanted, tmp_path / "run", tensorboard=tmp_path / "board", validate=4, **HELD)
    assert [writer.closed for writer in writers] == [True, True]
    assert writers[1].folder == str(tmp_path / "board")
    assert writers[1].purge_step == 1
    assert writers[1].scalars == [
        (name, epoch[name], epoch["epoch"])
        for epoch in record.history
        for name in ("loss", "lr", "seconds", "validation_accuracy")
    ]


def _stop(_: object) -> None:
    raise RuntimeError("stop")


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RunError, match=r"needs the package tensorboard .*pip install 'cnvzoo\[tensorboard\]'"):
        run_recipe(recipe(), run_dir=tmp_path / "run", dataset=noise("mnist"), tensorboard=tmp_path, quiet=True)
    assert not (tmp_path / "run").exists()
