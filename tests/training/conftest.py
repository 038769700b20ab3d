"""What the tests of training share: small models, and a hook into the steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from synthetic import StepHook, recipe, run, small_resnets

from cnvzoo.progress import TrainingProgress
from cnvzoo.training import RunRecord, Trainer


@pytest.fixture(scope="module", autouse=True)
def _small_resnets() -> Iterator[None]:
    with small_resnets():
        yield


@pytest.fixture
def each_step(monkeypatch: pytest.MonkeyPatch) -> StepHook:
    """`each_step(action)` has runs call `action(trainer)` after every step, before its state may be saved.

    A further call replaces the action; None is none.
    """
    current: list[Callable[[Trainer], object]] = []
    original = TrainingProgress.__call__

    def call(self: TrainingProgress, trainer: Trainer) -> None:
        original(self, trainer)
        for action in current:
            action(trainer)

    monkeypatch.setattr(TrainingProgress, "__call__", call)

    def hook(action: Callable[[Trainer], object] | None) -> None:
        current[:] = [action] if action else []

    return hook


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    """The record of `recipe()`, trained without a stop; shared by tests, which must not change its folder."""
    return run(recipe(), tmp_path_factory.mktemp("whole"))
