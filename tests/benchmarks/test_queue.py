"""Which runs reproduce.py trains, in which order, and which records and weights it keeps, resumes or replaces."""

from __future__ import annotations

import shutil
import time

import pytest
from harness.entries import Layout
from harness.records import Records
from workbench import FLOAT, QUANTIZED, label_of, make_record

from cnvzoo.training import NUMERICS, RunRecord

pytestmark = pytest.mark.usefixtures("no_checkpoints")


def test_the_first_seed_of_every_entry_is_trained_before_the_second(bench):
    for name in ("cifar10_cnv", "cifar10_resnet20"):
        bench.recipe(name)
    assert bench.run("--table", "cifar10") == 0
    assert bench.training.calls == [(name, seed) for seed in (0, 1, 2) for name in ("cifar10_cnv", "cifar10_resnet20")]


def test_a_run_with_a_record_is_not_trained_again(bench):
    bench.recipe("mnist_cnv")
    bench.put("mnist_cnv", 1)
    assert bench.run("--table", "mnist") == 0
    assert bench.training.calls == [("mnist_cnv", 0), ("mnist_cnv", 2)]
    assert bench.run("--table", "mnist") == 0
    assert len(bench.training.calls) == 2


def test_a_finished_run_copies_its_record_to_the_results(bench):
    bench.recipe("mnist_cnv")
    bench.run("--table", "mnist", "--seeds", "2")
    finished = bench.runs / "mnist_cnv" / "seed2" / "record.json"
    assert bench.result("mnist_cnv", 2).read_bytes() == finished.read_bytes()
    assert [path.name for path in bench.result("mnist_cnv").parent.iterdir()] == ["seed2.json"]


def test_only_the_requested_entries_and_seeds_are_trained(bench):
    for name in ("mnist_cnv", "mnist_resnet20", "cifar10_cnv"):
        bench.recipe(name)
    bench.run("--table", "all", "--entry", "cifar10_cnv", "mnist_cnv", "--seeds", "2", "1")
    assert bench.training.calls == [(name, seed) for seed in (2, 1) for name in ("mnist_cnv", "cifar10_cnv")]


def test_a_record_of_a_changed_recipe_is_trained_again(bench, capsys):
    bench.recipe("mnist_cnv", epochs=10)
    old = bench.put("mnist_cnv", accuracy=12.34).recipe_sha256
    bench.recipe("mnist_cnv", epochs=11)
    assert bench.run("--table", "mnist", "--time-limit", "0") == 3
    message = capsys.readouterr().err
    assert old[:8] in message
    assert bench.entry("mnist_cnv").fingerprint[:8] in message
    assert "12.34" not in bench.page
    assert bench.run("--table", "mnist", "--seeds", "0") == 0
    assert RunRecord.read(bench.result("mnist_cnv")).accuracy == 90


def test_a_corrupt_record_is_reported_and_kept_until_a_new_run_is_finished(bench, capsys):
    bench.recipe("mnist_cnv")
    bench.put("mnist_cnv", accuracy=12.34)
    path = bench.result("mnist_cnv")
    path.write_text(path.read_text()[:200])
    before = path.read_bytes()
    bench.training.stop_at["mnist_cnv", 0] = "SIGINT"
    assert bench.run("--table", "mnist", "--seeds", "0") == 130
    message = capsys.readouterr().err
    assert "seed0.json" in message
    assert "delete it" in message
    assert path.read_bytes() == before
    assert bench.run("--table", "mnist", "--seeds", "0") == 0
    assert RunRecord.read(path).accuracy == 90


@pytest.mark.parametrize(
    ("entry", "seed", "changes", "complaint"),
    [
        ("mnist_resnet20", 0, {}, "the record of mnist_resnet20 seed 0, not of mnist_cnv seed 0"),
        ("mnist_cnv", 1, {}, "the record of mnist_cnv seed 1, not of mnist_cnv seed 0"),
        ("mnist_cnv", 0, {"trial": True, "epochs": 3}, "the record of a trial, which enters no table"),
        ("mnist_cnv", 0, {"trial": True, "epochs": 20}, "the record of a trial, which enters no table"),
        ("mnist_cnv", 0, {"data_sha256": "d" * 64}, "trained on other images than mnist has"),
        ("mnist_cnv", 0, {"numerics": NUMERICS + 1}, f"of arithmetic version {NUMERICS + 1}, and this checkout has"),
    ],
)
def test_a_record_of_another_entry_seed_dataset_or_arithmetic_is_not_used(
    bench, capsys, entry, seed, changes, complaint
):
    for name in ("mnist_cnv", "mnist_resnet20"):
        bench.recipe(name)
    make_record(bench.entry(entry).recipe, seed, accuracy=12.34, **changes).write(bench.result("mnist_cnv"))
    assert bench.run("--table", "mnist", "--time-limit", "0") == 3
    assert complaint in capsys.readouterr().err
    assert "12.34" not in bench.page


def test_records_that_belong_to_no_table_are_reported(bench, capsys):
    bench.recipe("mnist_cnv")
    record = make_record(bench.entry("mnist_cnv").recipe)
    for name, seed in (("mnist_cnv", 7), ("mnist_cvn", 0)):
        record.write(bench.result(name, seed))
    bench.run("--table", "mnist", "--time-limit", "0")
    message = capsys.readouterr().err
    assert "seed7.json" in message
    assert "mnist_cvn" in message


def test_a_stopped_run_resumes(bench):
    bench.recipe("mnist_cnv")
    bench.training.stop_at["mnist_cnv", 0] = "SIGTERM"
    assert bench.run("--table", "mnist") == 143
    assert not bench.result("mnist_cnv").exists()
    assert bench.run("--table", "mnist", "--seeds", "0") == 0
    assert bench.training.resumed == [("mnist_cnv", 0)]


@pytest.mark.parametrize(("reason", "status"), [("time limit", 3), ("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stop_keeps_finished_runs_and_lists_the_unfinished_ones(bench, capsys, reason, status):
    for name in ("mnist_resnet20", "mnist_cnv"):
        bench.recipe(name)
    bench.training.stop_at["mnist_cnv", 0] = reason
    assert bench.run("--table", "mnist", "--seeds", "0", "1") == status
    assert bench.training.calls == [("mnist_resnet20", 0), ("mnist_cnv", 0)]
    assert bench.result("mnist_resnet20").exists()
    message = capsys.readouterr().err
    assert reason in message
    left = [line for line in message.splitlines() if line.startswith("  ")]
    assert [line.split(":")[0].strip() for line in left] == [
        "mnist_cnv seed 0",
        "mnist_resnet20 seed 1",
        "mnist_cnv seed 1",
    ]
    assert "state in" in left[0]
    assert "mnist_cnv/seed0" in left[0].replace("\\", "/")
    assert "not started" in left[1]


def test_the_time_limit_is_passed_to_the_run_as_a_deadline(bench):
    bench.recipe("mnist_cnv")
    before = time.monotonic()
    bench.run("--table", "mnist", "--seeds", "0", "--time-limit", "1000")
    assert before + 1000 <= bench.training.options[0]["deadline"] <= time.monotonic() + 1000
    bench.run("--table", "mnist", "--seeds", "1")
    assert bench.training.options[1]["deadline"] is None


def test_no_run_starts_after_the_time_limit(bench):
    bench.recipe("mnist_cnv")
    assert bench.run("--table", "mnist", "--time-limit", "0") == 3
    assert bench.training.calls == []
    assert "mnist_cnv" in bench.page


def test_after_a_failed_run_the_runs_that_do_not_depend_on_it_are_trained(float_and_quantized, capsys):
    float_and_quantized.recipe("cifar10_resnet20")
    float_and_quantized.training.fail_at.add((FLOAT, 0))
    assert float_and_quantized.run("--table", "cifar10", "--seeds", "0", "1") == 1
    assert float_and_quantized.training.calls == [
        (FLOAT, 0),
        ("cifar10_resnet20", 0),
        (FLOAT, 1),
        ("cifar10_resnet20", 1),
    ]
    assert f"{FLOAT} seed 0, {QUANTIZED} seed 0, {QUANTIZED} seed 1" in capsys.readouterr().err
    assert not float_and_quantized.result(QUANTIZED, 0).exists()


def test_a_finished_run_without_a_record_in_the_results_is_not_trained_again(bench):
    bench.recipe("mnist_cnv")
    bench.run("--table", "mnist", "--seeds", "0")
    shutil.rmtree(bench.home / "results")
    assert bench.run("--table", "mnist", "--seeds", "0") == 0
    assert bench.training.calls == [("mnist_cnv", 0)]
    assert bench.result("mnist_cnv").exists()


class TestRetrain:
    def test_replaces_the_record_when_the_new_run_is_finished(self, bench):
        bench.recipe("mnist_cnv")
        bench.run("--table", "mnist", "--seeds", "0")
        before = bench.result("mnist_cnv").read_bytes()
        bench.training.accuracy = lambda name, seed: 95.0
        bench.training.stop_at["mnist_cnv", 0] = "SIGINT"
        assert bench.run("--table", "mnist", "--seeds", "0", "--retrain") == 130
        assert bench.result("mnist_cnv").read_bytes() == before
        assert bench.run("--table", "mnist", "--seeds", "0", "--retrain") == 0
        assert bench.training.resumed == [("mnist_cnv", 0)]
        assert RunRecord.read(bench.result("mnist_cnv")).accuracy == 95

    def test_keeps_the_weights_that_it_replaces(self, bench):
        bench.recipe("mnist_cnv")
        bench.run("--table", "mnist", "--seeds", "0")
        bench.training.variant = "new "
        bench.run("--table", "mnist", "--seeds", "0", "--retrain")
        folder = bench.runs / "mnist_cnv"
        assert label_of(folder / "seed0" / "weights.safetensors").startswith("new ")
        assert not label_of(folder / "seed0.previous" / "weights.safetensors").startswith("new ")

    def test_trains_only_the_requested_entries_again(self, float_and_quantized):
        float_and_quantized.run("--table", "cifar10", "--seeds", "0")
        float_and_quantized.training.calls.clear()
        float_and_quantized.run("--table", "cifar10", "--seeds", "0", "--entry", QUANTIZED, "--retrain")
        assert float_and_quantized.training.calls == [(QUANTIZED, 0)]

    def test_of_float_and_quantized_entries_starts_from_the_new_float_weights(self, float_and_quantized):
        float_and_quantized.run("--table", "cifar10", "--seeds", "0")
        float_and_quantized.training.calls.clear()
        float_and_quantized.training.variant = "new "
        float_and_quantized.run("--table", "cifar10", "--seeds", "0", "--retrain")
        assert float_and_quantized.training.calls == [(FLOAT, 0), (QUANTIZED, 0)]
        assert label_of(float_and_quantized.training.options[-1]["float_start"]).startswith("new ")


class TestTrial:
    def test_is_listed_separately_and_in_no_table(self, bench, capsys):
        bench.recipe("mnist_cnv", epochs=10)
        bench.training.accuracy = lambda name, seed: 12.34
        assert bench.run("--table", "mnist", "--seeds", "0", "--epochs", "2") == 0
        assert bench.training.options[0]["epochs"] == 2
        assert (bench.runs / "trials" / "mnist_cnv" / "seed0-2epochs" / "record.json").exists()
        assert not (bench.home / "results").exists()
        assert "12.34" not in bench.page
        tables, trials = capsys.readouterr().out.split("trials:")
        assert "12.34" not in tables
        assert "| mnist_cnv | 0 | 2 of 10 | 12.34 |" in trials

    def test_that_is_finished_is_not_trained_again(self, bench):
        bench.recipe("mnist_cnv")
        for _ in range(2):
            assert bench.run("--table", "mnist", "--seeds", "0", "--epochs", "2") == 0
        assert bench.training.calls == [("mnist_cnv", 0)]

    @pytest.mark.parametrize("epochs", ["10", "99"])
    def test_with_as_many_epochs_as_the_recipe_or_more_is_a_full_run(self, bench, epochs):
        bench.recipe("mnist_cnv", epochs=10)
        assert bench.run("--table", "mnist", "--seeds", "0", "--epochs", epochs) == 0
        assert bench.training.options[0]["epochs"] is None
        assert bench.result("mnist_cnv").exists()

    def test_starts_from_the_weights_of_another_trial(self, float_and_quantized):
        assert float_and_quantized.run("--table", "cifar10", "--entry", QUANTIZED, "--seeds", "0", "--epochs", "2") == 0
        assert float_and_quantized.training.calls == [(FLOAT, 0), (QUANTIZED, 0)]
        assert "trials" in float_and_quantized.training.options[1]["float_start"].parts

    def test_starts_from_the_weights_of_a_full_run_if_they_exist(self, float_and_quantized):
        float_and_quantized.run("--table", "cifar10", "--entry", FLOAT, "--seeds", "0")
        float_and_quantized.run("--table", "cifar10", "--entry", QUANTIZED, "--seeds", "0", "--epochs", "2")
        assert float_and_quantized.training.calls == [(FLOAT, 0), (QUANTIZED, 0)]
        assert (
            float_and_quantized.training.options[1]["float_start"]
            == float_and_quantized.runs / FLOAT / "seed0" / "weights.safetensors"
        )

    def test_a_full_run_does_not_start_from_a_trial(self, bench):
        bench.recipe(FLOAT, epochs=20)
        bench.recipe(QUANTIZED, epochs=5, float_start=FLOAT)
        assert bench.run("--table", "cifar10", "--seeds", "0", "--epochs", "10") == 0
        assert bench.training.options[-1]["float_start"] == bench.runs / FLOAT / "seed0" / "weights.safetensors"
        assert bench.result(QUANTIZED).exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--table", "mnist", "--entry", "mnist_cvn"], "unknown entry 'mnist_cvn': did you mean 'mnist_cnv'"),
        (["--table", "mnist", "--entry", "cifar10_cnv"], "cifar10_cnv is in table cifar10, not in mnist"),
        (["--table", "cifar100"], "cifar100 has no recipe"),
    ],
)
def test_an_unknown_entry_or_table_is_an_error(bench, capsys, arguments, complaint):
    bench.recipe("mnist_cnv")
    bench.recipe("cifar10_cnv")
    assert bench.run(*arguments) == 2
    assert complaint in capsys.readouterr().err
    assert bench.training.calls == []


@pytest.mark.parametrize("wrong", [["--seeds", "3"], ["--epochs", "0"], ["--time-limit", "-1"], ["--time-limit", "1h"]])
def test_arguments_out_of_range_are_refused(bench, wrong):
    with pytest.raises(SystemExit) as stop:
        bench.run("--table", "mnist", *wrong)
    assert stop.value.code == 2


def test_a_file_of_results_that_is_damaged_during_a_campaign_stops_no_run(bench, capsys):
    """As by a conflict of version control."""
    for name in ("mnist_cnv", "mnist_resnet20"):
        bench.recipe(name)
    damage = bench.home / "retired.json"

    def train(recipe, **arguments):
        record = bench.training(recipe, **arguments)
        damage.write_text("<<<<<<< HEAD")
        return record

    bench.train = train
    assert bench.run("--table", "mnist", "--seeds", "0") == 1
    assert sorted(bench.training.calls) == [("mnist_cnv", 0), ("mnist_resnet20", 0)]
    said = capsys.readouterr().err
    assert said.count("what the tables show stays as it was") == 1
    assert "retired.json: not a list of retired records" in said
    damage.unlink()
    assert bench.run("--table", "mnist", "--seeds", "0") == 0
    assert "90.00" in bench.page


def test_tables_that_cannot_be_printed_do_not_stop_what_follows(bench, capsys, monkeypatch, tmp_path):
    bench.recipe("mnist_cnv")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reproduce._print_tables", full)
    assert bench.run("--table", "mnist", "--publish", str(tmp_path / "store")) == 1
    said = capsys.readouterr().err
    assert "the tables are not printed: No space left on device" in said
    assert "not written, see above: the printed tables" in said


@pytest.mark.parametrize(("reason", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_after_the_last_step_stops_the_verification(bench, capsys, reason, status):
    bench.recipe("mnist_cnv")

    def train(recipe, *, stop, **arguments):
        record = bench.training(recipe, **arguments)
        stop.ask(reason)
        return record

    bench.train = train
    assert bench.run("--table", "mnist", "--seeds", "0") == status
    assert bench.verified == []
    assert (
        f"stopped ({reason}) after the last run; the same command verifies the checkpoints" in capsys.readouterr().err
    )
    assert RunRecord.read(bench.result("mnist_cnv")).accuracy == 90


def test_a_command_whose_runs_end_without_valid_records_returns_1(bench, capsys):
    """As when another process replaces the record of the float start while the quantized run is trained."""
    bench.recipe(FLOAT)
    bench.recipe(QUANTIZED, float_start=FLOAT)

    def train(recipe, **arguments):
        record = bench.training(recipe, **arguments)
        if recipe.name == QUANTIZED:
            bench.put(FLOAT, weights_sha256="e" * 64)
        return record

    bench.train = train
    assert bench.run("--table", "cifar10", "--seeds", "0") == 1
    assert f"without a valid record, see above: {QUANTIZED} seed 0" in capsys.readouterr().err


@pytest.mark.parametrize(("epochs", "holdout"), [(2, 0), (3, 5000)])
def test_another_trial_is_not_shown_as_the_one_that_was_asked_for(bench, epochs, holdout):
    bench.recipe("mnist_cnv")
    entry, layout = bench.entry("mnist_cnv"), Layout.of(bench.home, bench.runs)
    records = Records({entry.name: entry}, layout)
    path = layout.run_dir(entry.name, 0, 3) / "record.json"
    path.parent.mkdir(parents=True)
    scored = holdout or 10000
    make_record(
        entry.recipe, 0, trial=True, epochs=epochs, holdout=holdout, total=scored, correct=scored * 9 // 10
    ).write(path)  # fmt: skip
    assert records.trials([entry], [0], 3) == []
    make_record(entry.recipe, 0, trial=True, epochs=3).write(path)
    assert [record.epochs for _, record in records.trials([entry], [0], 3)] == [3]
