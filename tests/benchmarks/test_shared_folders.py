"""Two processes of reproduce.py on the same folders: runs that the other has finished, and runs that it is training."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from filelock import FileLock
from harness import outputs
from test_at_once import HookedTraining, unfinished
from workbench import FLOAT, QUANTIZED, Bench, FakeTraining, make_record

from cnvzoo.training import RunRecord, RunUnderWay

# in the order of the table
FIRST, OTHER = "cifar10_mobilenet_v1", "cifar10_resnet20"
Key = tuple[str, int]


class OtherProcess:
    """Another process that trains in the same folders, as far as this one can see: its locks and its files."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.locks = bench, ExitStack()

    def starts(self, name: str, seed: int = 0) -> None:
        folder = self.bench.runs / name / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        self.locks.enter_context(FileLock(folder / ".lock"))

    def finishes(self, name: str, seed: int = 0, *, recorded: bool = True, epochs: int | None = None) -> RunRecord:
        """Write a finished run; its record is also copied to the results, unless `recorded` is false."""
        self.locks.close()
        folder = self.bench.runs / name / f"seed{seed}"
        if epochs is not None:
            folder = self.bench.runs / "trials" / name / f"seed{seed}-{epochs}epochs"
        shutil.rmtree(folder, ignore_errors=True)
        recipe = self.bench.entry(name).recipe
        training = FakeTraining(accuracy=lambda name, seed: 77.0, variant="theirs ")
        weights = dict.fromkeys(recipe.needs, "theirs")
        record = training(recipe, run_dir=folder, seed=seed, epochs=epochs, **weights)
        if recorded and epochs is None:
            record.write(self.bench.result(name, seed))
        return record

    def stops(self) -> None:
        self.locks.close()


@pytest.fixture
def other_process(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[OtherProcess]:
    monkeypatch.setattr(outputs, "keep_missing", lambda *_: [])  # writing checkpoints takes most of the time
    for name in (FIRST, FLOAT, OTHER):
        bench.recipe(name)
    bench.recipe(QUANTIZED, float_start=FLOAT)
    process = OtherProcess(bench)
    yield process
    process.stops()


@pytest.fixture
def during(bench: Bench) -> Callable[[str, Callable[[], object]], HookedTraining]:
    """`during(name, action)`: calls the action once, before the training of that entry's seed 0."""

    def use(name: str, action: Callable[[], object]) -> HookedTraining:
        actions = [action]

        def before_run(key: Key, _: object) -> None:
            if key == (name, 0) and actions:
                actions.pop()()

        bench.train = training = HookedTraining(before_run)
        return training

    return use


def no_previous_folder(bench: Bench) -> bool:
    return not list(bench.runs.rglob("*.previous"))


@pytest.mark.parametrize("recorded", [True, False])
def test_a_run_that_another_process_finishes_is_not_trained_again(bench, other_process, during, capsys, recorded):
    training = during(FIRST, lambda: other_process.finishes(OTHER, recorded=recorded))
    assert bench.run("--table", "cifar10", "--entry", FIRST, OTHER, "--seeds", "0", "1") == 0
    assert training.fake.calls == [(FIRST, 0), (FIRST, 1), (OTHER, 1)]
    printed = capsys.readouterr()
    assert f"{OTHER} seed 0: finished meanwhile, not trained again" in printed.err
    assert "77.00, 91.00, -" in printed.out
    assert RunRecord.read(bench.result(OTHER)).accuracy == 77
    assert no_previous_folder(bench)


def test_a_record_added_before_its_run_starts_is_kept_and_the_run_is_not_trained(bench, other_process, during):
    training = during(FIRST, lambda: bench.put(OTHER, accuracy=66.0))
    assert bench.run("--table", "cifar10", "--entry", FIRST, OTHER, "--seeds", "0") == 0
    assert training.fake.calls == [(FIRST, 0)]
    assert RunRecord.read(bench.result(OTHER)).accuracy == 66


def test_a_record_added_during_its_run_is_kept(bench, other_process, during, capsys):
    during(OTHER, lambda: bench.put(OTHER, accuracy=66.0))
    assert bench.run("--table", "cifar10", "--entry", OTHER, "--seeds", "0") == 0
    assert RunRecord.read(bench.result(OTHER)).accuracy == 66
    assert "its weights differ from those of" in capsys.readouterr().err


def test_a_record_of_another_recipe_added_by_another_process_is_replaced(bench, other_process, during):
    recipe = bench.entry(OTHER).recipe
    other = recipe.model_copy(update={"label_smoothing": 0.25})
    during(FIRST, lambda: make_record(other).write(bench.result(OTHER)))
    assert bench.run("--table", "cifar10", "--entry", FIRST, OTHER, "--seeds", "0") == 0
    assert RunRecord.read(bench.result(OTHER)).recipe_sha256 == recipe.fingerprint()


def test_a_trial_that_another_process_finishes_is_not_trained_again(bench, other_process, during, capsys):
    training = during(FIRST, lambda: other_process.finishes(OTHER, epochs=2))
    assert bench.run("--table", "cifar10", "--entry", FIRST, OTHER, "--seeds", "0", "--epochs", "2") == 0
    assert training.fake.calls == [(FIRST, 0)]
    assert "| cifar10_resnet20 | 0 | 2 of 10 | 77.00 |" in capsys.readouterr().out
    assert no_previous_folder(bench)


class TestRetrain:
    COMMAND = ("--table", "cifar10", "--entry", FIRST, OTHER, "--seeds", "0", "--retrain")

    def test_trains_a_run_that_was_finished_before(self, bench, other_process):
        other_process.finishes(OTHER)
        assert bench.run(*self.COMMAND) == 0
        assert bench.training.calls == [(FIRST, 0), (OTHER, 0)]
        assert RunRecord.read(bench.result(OTHER)).accuracy == 90

    @pytest.mark.parametrize("recorded", [True, False])
    def test_does_not_train_a_run_that_another_process_has_just_trained_again(
        self, bench, other_process, during, recorded
    ):
        bench.run("--table", "cifar10", "--entry", OTHER, "--seeds", "0")
        training = during(FIRST, lambda: other_process.finishes(OTHER, recorded=recorded))
        assert bench.run(*self.COMMAND) == 0
        assert training.fake.calls == [(FIRST, 0)]
        assert RunRecord.read(bench.result(OTHER)).accuracy == 77


class TestWeights:
    """The weights of a float start, whose record may exist without them."""

    COMMAND = ("--table", "cifar10", "--entry", FIRST, QUANTIZED, "--seeds", "0")

    def test_from_another_process_are_used(self, bench, other_process, during):
        kept = other_process.finishes(FLOAT)
        shutil.rmtree(bench.runs / FLOAT)
        training = during(FIRST, lambda: other_process.finishes(FLOAT, recorded=False))
        assert bench.run(*self.COMMAND) == 0
        assert training.fake.calls == [(FIRST, 0), (QUANTIZED, 0)]
        assert training.fake.options[-1]["float_start"] == bench.runs / FLOAT / "seed0" / "weights.safetensors"
        assert RunRecord.read(bench.result(FLOAT)) == kept

    def test_from_another_process_are_not_used_if_they_are_not_those_of_the_record(self, bench, other_process, during):
        kept = bench.put(FLOAT, accuracy=91.5)
        training = during(FIRST, lambda: other_process.finishes(FLOAT, recorded=False))
        assert bench.run(*self.COMMAND) == 1
        assert training.fake.calls == [(FIRST, 0)]
        assert RunRecord.read(bench.result(FLOAT)) == kept

    def test_are_trained_when_only_the_record_is_added(self, bench, other_process, during):
        training = during(FIRST, lambda: bench.put(FLOAT, accuracy=66.0))
        assert bench.run(*self.COMMAND) == 1
        assert training.fake.calls == [(FIRST, 0), (FLOAT, 0)]
        assert RunRecord.read(bench.result(FLOAT)).accuracy == 66


class TestRunOfAnotherProcess:
    """A run that another process is training when this one wants to start it."""

    def test_is_not_started_and_the_other_runs_are_trained(self, bench, other_process, capsys):
        other_process.starts(FLOAT)
        (state := bench.runs / FLOAT / "seed0" / "state.safetensors").write_text("theirs")
        assert bench.run("--table", "cifar10", "--seeds", "0") == 4
        assert bench.training.calls == [(FIRST, 0), (OTHER, 0)]
        printed = capsys.readouterr()
        assert f"{FLOAT} seed 0: another process is training it" in printed.err
        assert "failed" not in printed.err
        assert unfinished(printed.err) == [f"{FLOAT} seed 0", f"{QUANTIZED} seed 0"]
        assert f"  {FLOAT} seed 0: another process is training it\n" in printed.err
        assert f"  {QUANTIZED} seed 0: not started\n" in printed.err
        assert f"| {OTHER} | 90.00" in printed.out
        assert state.read_text() == "theirs"

    @pytest.mark.parametrize("recorded", [True, False])
    @pytest.mark.parametrize("at_once", ["1", "2"])
    def test_is_recorded_when_it_finishes_while_other_runs_train(self, bench, other_process, during, recorded, at_once):
        other_process.starts(FLOAT)
        training = during(OTHER, lambda: other_process.finishes(FLOAT, recorded=recorded))
        assert bench.run("--table", "cifar10", "--seeds", "0", "--at-once", at_once) == 0
        assert sorted(training.fake.calls) == sorted([(FIRST, 0), (OTHER, 0), (QUANTIZED, 0)])
        assert RunRecord.read(bench.result(FLOAT)).accuracy == 77
        assert no_previous_folder(bench)

    def test_is_recorded_when_it_finishes_during_the_last_run(self, bench, other_process, during):
        other_process.starts(FLOAT)
        during(OTHER, lambda: other_process.finishes(FLOAT))
        assert bench.run("--table", "cifar10", "--entry", FLOAT, OTHER, "--seeds", "0") == 0

    def test_is_resumed_when_the_other_process_has_stopped(self, bench, other_process, during):
        other_process.starts(FLOAT)
        (bench.runs / FLOAT / "seed0" / "state.safetensors").touch()
        training = during(OTHER, other_process.stops)
        assert bench.run("--table", "cifar10", "--seeds", "0") == 0
        assert training.fake.calls == [(FIRST, 0), (OTHER, 0), (FLOAT, 0), (QUANTIZED, 0)]
        assert training.fake.resumed == [(FLOAT, 0)]

    @pytest.mark.parametrize("at_once", ["1", "3"])
    def test_is_also_found_when_it_began_just_before_training(self, bench, other_process, capsys, at_once):
        """It began after its lock was looked at and before this process started it."""
        asked: list[Key] = []

        def train(recipe: Any, **arguments: Any) -> RunRecord:
            asked.append(key := (recipe.name, arguments["seed"]))
            if key == (FLOAT, 0):
                raise RunUnderWay("in use")
            return bench.training(recipe, **arguments)

        bench.train = train
        assert bench.run("--table", "cifar10", "--seeds", "0", "--at-once", at_once) == 4
        assert asked.count((FLOAT, 0)) == 2  # once more after all other runs, and no third time
        assert unfinished(capsys.readouterr().err) == [f"{FLOAT} seed 0", f"{QUANTIZED} seed 0"]

    def test_is_listed_as_unfinished_after_a_failure_and_after_a_stop(self, bench, other_process, capsys):
        other_process.starts(FLOAT)
        bench.training.fail_at.add((FIRST, 0))
        assert bench.run("--table", "cifar10", "--seeds", "0") == 1
        bench.training.stop_at[OTHER, 1] = "SIGTERM"
        capsys.readouterr()
        assert bench.run("--table", "cifar10", "--entry", FLOAT, OTHER, "--seeds", "0", "1") == 143
        assert unfinished(capsys.readouterr().err) == [f"{FLOAT} seed 0", f"{OTHER} seed 1"]


def test_after_a_stop_a_run_that_another_process_finished_is_not_listed_as_unfinished(
    bench, other_process, during, capsys
):
    during(FIRST, lambda: other_process.finishes(OTHER))
    bench.train.fake.stop_at[FIRST, 0] = "SIGTERM"
    assert bench.run("--table", "cifar10", "--entry", FIRST, OTHER, "--seeds", "0") == 143
    assert unfinished(capsys.readouterr().err) == [f"{FIRST} seed 0"]
