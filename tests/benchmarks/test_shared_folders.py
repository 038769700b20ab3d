"""Two reproduce.py on the same folders: what one has finished, and what it is training, while the other works."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from filelock import FileLock
from harness import outputs
from test_at_once import Play, left
from workbench import Bench, FakeTraining, make_record

from cnvzoo.training import RunRecord, RunUnderWay

# in the order of the table
FIRST, FLOAT, OTHER, QUANTIZED = "cifar10_mobilenet_v1", "cifar10_cnv", "cifar10_resnet20", "cifar10_quant_cnv_w4a4"
Key = tuple[str, int]


class Neighbour:
    """Another process that trains on the folders of a bench."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.locks = bench, ExitStack()

    def starts(self, name: str, seed: int = 0) -> None:
        folder = self.bench.runs / name / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        self.locks.enter_context(FileLock(folder / ".lock"))

    def finishes(self, name: str, seed: int = 0, *, recorded: bool = True, epochs: int | None = None) -> RunRecord:
        """Train a run to its end; with a record among the results, unless it gets no further than the run's folder."""
        self.locks.close()
        folder = self.bench.runs / name / f"seed{seed}"
        if epochs is not None:
            folder = self.bench.runs / "trials" / name / f"seed{seed}-{epochs}epochs"
        shutil.rmtree(folder, ignore_errors=True)
        recipe = self.bench.entry(name).recipe
        training = FakeTraining(accuracy=lambda name, seed: 77.0, flavour="theirs ")
        weights = dict.fromkeys(recipe.needs, "theirs")
        record = training(recipe, run_dir=folder, seed=seed, epochs=epochs, **weights)
        if recorded and epochs is None:
            record.write(self.bench.result(name, seed))
        return record

    def stops(self) -> None:
        self.locks.close()


@pytest.fixture
def neighbour(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Neighbour]:
    monkeypatch.setattr(outputs, "keep_missing", lambda *_: [])  # which takes most of the time
    for name in (FIRST, FLOAT, OTHER):
        bench.recipe(name)
    bench.recipe(QUANTIZED, float_start=FLOAT)
    other = Neighbour(bench)
    yield other
    other.stops()


@pytest.fixture
def during(bench: Bench) -> Callable[[str, Callable[[], object]], Play]:
    """`during(name, action)`: the first training of that entry's seed 0 waits for the action."""

    def use(name: str, action: Callable[[], object]) -> Play:
        waiting = [action]

        def scene(key: Key, _: object) -> None:
            if key == (name, 0) and waiting:
                waiting.pop()()

        bench.train = play = Play(scene)
        return play

    return use


def no_previous(bench: Bench) -> bool:
    return not list(bench.runs.rglob("*.previous"))


@pytest.mark.parametrize("recorded", [True, False])
def test_what_another_finishes_meanwhile_is_not_trained_again(bench, neighbour, during, capsys, recorded):
    play = during(FIRST, lambda: neighbour.finishes(OTHER, recorded=recorded))
    assert bench.run("--table", "cifar10", "--entry", FIRST, OTHER, "--seeds", "0", "1") == 0
    assert play.fake.calls == [(FIRST, 0), (FIRST, 1), (OTHER, 1)]
    said = capsys.readouterr()
    assert f"{OTHER} seed 0: finished meanwhile, not trained again" in said.err
    assert "77.00, 91.00, -" in said.out
    assert RunRecord.read(bench.result(OTHER)).accuracy == 77
    assert no_previous(bench)


def test_a_record_that_is_copied_in_meanwhile_stands(bench, neighbour, during):
    play = during(FIRST, lambda: bench.put(OTHER, accuracy=66.0))
    assert bench.run("--table", "cifar10", "--entry", FIRST, OTHER, "--seeds", "0") == 0
    assert play.fake.calls == [(FIRST, 0)]
    assert RunRecord.read(bench.result(OTHER)).accuracy == 66


def test_a_record_that_is_copied_in_during_its_run_stands(bench, neighbour, during, capsys):
    during(OTHER, lambda: bench.put(OTHER, accuracy=66.0))
    assert bench.run("--table", "cifar10", "--entry", OTHER, "--seeds", "0") == 0
    assert RunRecord.read(bench.result(OTHER)).accuracy == 66
    assert "its weights differ from those of" in capsys.readouterr().err


def test_a_record_of_another_recipe_is_not_taken_for_it(bench, neighbour, during):
    recipe = bench.entry(OTHER).recipe
    other = recipe.model_copy(update={"label_smoothing": 0.25})
    during(FIRST, lambda: make_record(other).write(bench.result(OTHER)))
    assert bench.run("--table", "cifar10", "--entry", FIRST, OTHER, "--seeds", "0") == 0
    assert RunRecord.read(bench.result(OTHER)).recipe_sha256 == recipe.fingerprint()


def test_a_trial_that_another_finishes_is_not_repeated(bench, neighbour, during, capsys):
    play = during(FIRST, lambda: neighbour.finishes(OTHER, epochs=2))
    assert bench.run("--table", "cifar10", "--entry", FIRST, OTHER, "--seeds", "0", "--epochs", "2") == 0
    assert play.fake.calls == [(FIRST, 0)]
    assert "| cifar10_resnet20 | 0 | 2 of 10 | 77.00 |" in capsys.readouterr().out
    assert no_previous(bench)


class TestRetrain:
    COMMAND = ("--table", "cifar10", "--entry", FIRST, OTHER, "--seeds", "0", "--retrain")

    def test_trains_what_was_there(self, bench, neighbour):
        neighbour.finishes(OTHER)
        assert bench.run(*self.COMMAND) == 0
        assert bench.training.calls == [(FIRST, 0), (OTHER, 0)]
        assert RunRecord.read(bench.result(OTHER)).accuracy == 90

    @pytest.mark.parametrize("recorded", [True, False])
    def test_is_not_for_what_another_has_trained_again_meanwhile(self, bench, neighbour, during, recorded):
        bench.run("--table", "cifar10", "--entry", OTHER, "--seeds", "0")
        play = during(FIRST, lambda: neighbour.finishes(OTHER, recorded=recorded))
        assert bench.run(*self.COMMAND) == 0
        assert play.fake.calls == [(FIRST, 0)]
        assert RunRecord.read(bench.result(OTHER)).accuracy == 77


class TestWeights:
    """Of a float start that is trained for its weights alone: its record is there."""

    def test_that_another_brings_meanwhile_serve(self, bench, neighbour, during):
        kept = bench.put(FLOAT, accuracy=91.5)
        play = during(FIRST, lambda: neighbour.finishes(FLOAT, recorded=False))
        assert bench.run("--table", "cifar10", "--entry", FIRST, QUANTIZED, "--seeds", "0") == 0
        assert play.fake.calls == [(FIRST, 0), (QUANTIZED, 0)]
        assert play.fake.options[-1]["float_start"] == bench.runs / FLOAT / "seed0" / "weights.safetensors"
        assert RunRecord.read(bench.result(FLOAT)) == kept

    def test_are_trained_though_the_record_comes_meanwhile(self, bench, neighbour, during):
        play = during(FIRST, lambda: bench.put(FLOAT, accuracy=66.0))
        assert bench.run("--table", "cifar10", "--entry", FIRST, QUANTIZED, "--seeds", "0") == 0
        assert play.fake.calls == [(FIRST, 0), (FLOAT, 0), (QUANTIZED, 0)]
        assert RunRecord.read(bench.result(FLOAT)).accuracy == 66


class TestUnderWay:
    """A run that another process is training."""

    def test_is_left_to_it_and_the_others_go_on(self, bench, neighbour, capsys):
        neighbour.starts(FLOAT)
        (state := bench.runs / FLOAT / "seed0" / "state.safetensors").write_text("theirs")
        assert bench.run("--table", "cifar10", "--seeds", "0") == 4
        assert bench.training.calls == [(FIRST, 0), (OTHER, 0)]
        said = capsys.readouterr()
        assert f"{FLOAT} seed 0: another process is training it" in said.err
        assert "failed" not in said.err
        assert left(said.err) == [f"{FLOAT} seed 0", f"{QUANTIZED} seed 0"]
        assert f"  {FLOAT} seed 0: another process is training it\n" in said.err
        assert f"  {QUANTIZED} seed 0: not started\n" in said.err
        assert f"| {OTHER} | 90.00" in said.out
        assert state.read_text() == "theirs"

    @pytest.mark.parametrize("recorded", [True, False])
    @pytest.mark.parametrize("at_once", ["1", "2"])
    def test_counts_when_it_is_finished_in_time(self, bench, neighbour, during, recorded, at_once):
        neighbour.starts(FLOAT)
        play = during(OTHER, lambda: neighbour.finishes(FLOAT, recorded=recorded))
        assert bench.run("--table", "cifar10", "--seeds", "0", "--at-once", at_once) == 0
        assert sorted(play.fake.calls) == sorted([(FIRST, 0), (OTHER, 0), (QUANTIZED, 0)])
        assert RunRecord.read(bench.result(FLOAT)).accuracy == 77
        assert no_previous(bench)

    def test_counts_when_it_is_finished_last_of_all(self, bench, neighbour, during):
        neighbour.starts(FLOAT)
        during(OTHER, lambda: neighbour.finishes(FLOAT))
        assert bench.run("--table", "cifar10", "--entry", FLOAT, OTHER, "--seeds", "0") == 0

    def test_is_gone_on_with_where_the_other_has_stopped(self, bench, neighbour, during):
        neighbour.starts(FLOAT)
        (bench.runs / FLOAT / "seed0" / "state.safetensors").touch()
        play = during(OTHER, neighbour.stops)
        assert bench.run("--table", "cifar10", "--seeds", "0") == 0
        assert play.fake.calls == [(FIRST, 0), (OTHER, 0), (FLOAT, 0), (QUANTIZED, 0)]
        assert play.fake.resumed == [(FLOAT, 0)]

    @pytest.mark.parametrize("at_once", ["1", "3"])
    def test_may_be_found_by_the_runner(self, bench, neighbour, capsys, at_once):
        """It has begun between the look at its folder and its start."""
        asked: list[Key] = []

        def train(recipe: Any, **arguments: Any) -> RunRecord:
            asked.append(key := (recipe.name, arguments["seed"]))
            if key == (FLOAT, 0):
                raise RunUnderWay("in use")
            return bench.training(recipe, **arguments)

        bench.train = train
        assert bench.run("--table", "cifar10", "--seeds", "0", "--at-once", at_once) == 4
        assert asked.count((FLOAT, 0)) == 2  # again when all else was done, and not for ever
        assert left(capsys.readouterr().err) == [f"{FLOAT} seed 0", f"{QUANTIZED} seed 0"]

    def test_beside_a_failure_and_a_stop(self, bench, neighbour, capsys):
        neighbour.starts(FLOAT)
        bench.training.fail_at.add((FIRST, 0))
        assert bench.run("--table", "cifar10", "--seeds", "0") == 1
        bench.training.stop_at[OTHER, 1] = "SIGTERM"
        capsys.readouterr()
        assert bench.run("--table", "cifar10", "--entry", FLOAT, OTHER, "--seeds", "0", "1") == 143
        assert left(capsys.readouterr().err) == [f"{FLOAT} seed 0", f"{OTHER} seed 1"]


def test_what_another_has_finished_is_not_left_after_a_stop(bench, neighbour, during, capsys):
    during(FIRST, lambda: neighbour.finishes(OTHER))
    bench.train.fake.stop_at[FIRST, 0] = "SIGTERM"
    assert bench.run("--table", "cifar10", "--entry", FIRST, OTHER, "--seeds", "0") == 143
    assert left(capsys.readouterr().err) == [f"{FIRST} seed 0"]
