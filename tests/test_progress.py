"""What a run prints to stderr: nothing with quiet, a line each epoch without a terminal, a bar on a terminal."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cnvzoo import progress
from cnvzoo.progress import TrainingProgress, counted, print_line
from cnvzoo.training import Trainer

NAME = "fashion_mnist_mobilenet_v1_with_a_long_name, seed 2"


def show(
    monkeypatch: pytest.MonkeyPatch,
    *,
    start: int = 0,
    stop: int = 6,
    quiet: bool = False,
    work: Callable[[int], float] = float,
    compiles: bool = False,
    validates: bool = False,
) -> None:
    """Progress of three epochs of two steps, each of which takes 30 s."""
    trainer: Any = SimpleNamespace(total_steps=6, steps_per_epoch=2, step=start, history=[], work=work)
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with TrainingProgress(NAME, cast(Trainer, trainer), quiet, compiles) as after_step:
        for step in range(start + 1, stop + 1):
            now += 30
            trainer.step = step
            if step % 2 == 0:
                trainer.history.append({"epoch": step // 2, "loss": 9.87654 / step, "lr": 0.1, "seconds": 60.04})
                if validates:
                    trainer.history[-1]["validation_accuracy"] = 12.3456
            after_step(cast(Trainer, trainer))


def test_quiet_prints_nothing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    show(monkeypatch, quiet=True)
    assert capfd.readouterr() == ("", "")


def test_there_is_a_line_each_half_minute_and_epoch_with_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show(monkeypatch)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"{NAME}: epoch 1/3, step 1/2, 2.5 min left",
        f"{NAME}: epoch 1/3, loss 4.9383, 60.0 s, 2.0 min left",
        f"{NAME}: epoch 2/3, step 1/2, 1.5 min left",
        f"{NAME}: epoch 2/3, loss 2.4691, 60.0 s, 1.0 min left",
        f"{NAME}: epoch 3/3, step 1/2, 0.5 min left",
        f"{NAME}: epoch 3/3, loss 1.6461, 60.0 s, 0.0 min left",
    ]


def test_a_line_of_a_run_that_validates(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    show(monkeypatch, stop=2, validates=True)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"{NAME}: epoch 1/3, loss 4.9383, validation 12.35 %, 60.0 s, 2.0 min left"


def test_compiling_is_printed_and_does_not_change_the_estimate_of_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show(monkeypatch, stop=3, work=lambda step: min(step, 1) * 100 + step, compiles=True)
    assert capsys.readouterr().err.splitlines() == [
        f"{NAME}: compiling, which takes up to a minute the first time",
        f"{NAME}: epoch 1/3, loss 4.9383, 60.0 s, 2.0 min left",
        f"{NAME}: epoch 2/3, step 1/2, 1.5 min left",
    ]


def test_the_time_left_of_a_resumed_run_follows_from_its_own_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show(monkeypatch, start=3, stop=4)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{NAME}: epoch 2/3, loss 2.4691, 60.0 s, 1.0 min left"


def test_a_terminal_gets_a_bar_with_step_loss_and_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "160"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    show(monkeypatch, stop=4)
    out, err = capsys.readouterr()
    assert out == ""
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err).splitlines()[-1]
    assert NAME in last
    assert "4/6" in last
    assert "1.0 min left, loss 2.469" in last


def test_the_time_left_is_weighted_by_the_work_of_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One epoch of whole images follows two whose parts have a tenth of the pixels."""
    show(monkeypatch, stop=4, work=lambda step: min(step, 4) / 10 + max(step - 4, 0))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[-1] for line in lines if "loss" in line] == ["11.0 min left", "10.0 min left"]


def test_a_thread_gets_plain_lines_on_a_terminal_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bars of several runs at once would overwrite each other."""
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    thread = threading.Thread(target=show, args=(monkeypatch,))
    thread.start()
    thread.join()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[1] for line in lines if "loss" in line] == [
        f" seed 2: epoch {epoch}/3" for epoch in (1, 2, 3)
    ]


class Unwritable(io.StringIO):
    """Standard error on a full disk, or whose reader has ended."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code

    def write(self, text: str) -> int:
        if self.code:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(text)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EPIPE])
def test_what_cannot_be_written_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], code: int, terminal: bool
) -> None:
    if terminal:
        for name, value in {"FORCE_COLOR": "1", "TERM": "xterm"}.items():
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Unwritable(code))
    show(monkeypatch, compiles=True)
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    for _ in counted(range(6), "evaluating"):
        now += 60
    print("the results")  # rich would send them to the null device
    assert capfd.readouterr() == ("the results\n", "")


def test_a_line_is_printed_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    text = "/a/:smile:/[red]/a folder with a long name: 12 files"
    print_line(text)
    assert capsys.readouterr().err == text + "\n"
    monkeypatch.setattr(sys, "stderr", Unwritable(errno.EPIPE))
    print_line(text)


def test_a_disk_that_is_full_for_a_while_costs_only_the_lines_of_that_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Unwritable(errno.ENOSPC)
    monkeypatch.setattr(sys, "stderr", stderr)
    console = progress.progress_console()
    console.print("lost")
    stderr.code = 0
    console.print("written")
    assert stderr.getvalue() == "written\n"


@pytest.mark.parametrize("quiet", [True, False])
def test_counting_yields_all_items_and_prints_nothing_if_it_is_quick(
    quiet: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    assert list(counted(range(0, 50, 10), "evaluating", quiet=quiet)) == [0, 10, 20, 30, 40]
    assert capfd.readouterr() == ("", "")


def test_counting_prints_its_progress_if_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    for _ in counted(range(6), "evaluating"):
        now += 6
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["evaluating: 2/6, 24 s left", "evaluating: 4/6, 12 s left", "evaluating: 6/6, 0 s left"]
