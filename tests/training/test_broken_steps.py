"""A step that ends with an error: it is an interruption if a signal caused it, and an error otherwise."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from synthetic import noise, recipe

from cnvzoo.training import RunInterrupted, RunRecord, Trainer, run_recipe

STEPS = 12  # of `recipe()` on `noise()`


def run(folder: Path) -> RunRecord:
    return run_recipe(recipe(), run_dir=folder, dataset=noise("mnist"), quiet=True, save_every=0)


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, signal.Signals | None], list[int]]:
    """`breaking(step, number)`: that step fails once, after signal `number`; returns a list of the steps begun."""
    take = Trainer.take_step

    def arrange(step: int, number: signal.Signals | None) -> list[int]:
        begun: list[int] = []

        def take_or_break(trainer: Trainer) -> None:
            begun.append(trainer.step)
            if begun == list(range(step + 1)):
                for parameter in trainer.model.parameters():
                    parameter.data.zero_()  # half of a step
                if number is not None:
                    os.kill(os.getpid(), number)
                raise RuntimeError("C++ compile error")
            take(trainer)

        monkeypatch.setattr(Trainer, "take_step", take_or_break)
        return begun

    return arrange


def test_a_run_stopped_by_a_signal_that_ends_the_compiler_resumes_from_before_the_step(breaking, tmp_path):
    whole = run(tmp_path / "whole")
    for number in (signal.SIGINT, signal.SIGTERM):
        begun = breaking(8, number)
        folder = tmp_path / number.name
        with pytest.raises(RunInterrupted) as caught:
            run(folder)
        assert (caught.value.reason, caught.value.step) == (number.name, 8)
        assert str(caught.value.unsaved).startswith("a step failed: RuntimeError: C++ compile error (")
        assert "resumes from the last state saved, if there is one" in str(caught.value)
        assert run(folder).weights_sha256 == whole.weights_sha256
        assert begun == [*range(9), *range(8, STEPS)]


def test_an_error_without_a_signal_is_an_error(breaking, tmp_path):
    breaking(0, None)
    with pytest.raises(RuntimeError, match=r"^C\+\+ compile error$"):
        run(tmp_path)
