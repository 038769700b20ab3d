"""Which runs are written to hub/ as checkpoints: those of seed 0 whose weights are the ones of the record."""

from __future__ import annotations

import hashlib
import shutil

import pytest
from workbench import Bench

from cnvzoo.checkpoints.folder import read_config
from cnvzoo.checkpoints.format import FileFacts
from cnvzoo.checkpoints.index import read_index
from cnvzoo.files import sha256_of
from cnvzoo.training import RunRecord

NAME = "mnist_cnv"


@pytest.fixture
def trained_once(bench: Bench) -> Bench:
    bench.recipe(NAME)
    assert bench.run("--table", "mnist", "--seeds", "0", "1") == 0
    return bench


def test_the_run_of_seed_0_becomes_a_checkpoint_with_its_accuracy_and_weights(trained_once):
    folder = trained_once.hub / "cnv.mnist"
    assert [path.name for path in trained_once.hub.iterdir()] == ["cnv.mnist"]
    config = read_config(folder)
    assert (config.correct, config.total, config.recipe["seed"]) == (9000, 10000, 0)
    assert config.model == {"name": "cnv", "num_classes": 10, "in_chans": 1}
    assert config.preprocessing["size"] == 32
    run = trained_once.runs / NAME / "seed0"
    assert (folder / "model.safetensors").read_bytes() == (run / "weights.safetensors").read_bytes()


def test_an_existing_checkpoint_is_not_written_again(trained_once):
    weights = trained_once.hub / "cnv.mnist" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    trained_once.run("--table", "mnist", "--seeds", "0")
    assert weights.stat().st_mtime_ns == before


def test_a_lost_checkpoint_is_written_again_without_training(trained_once):
    (trained_once.hub / "cnv.mnist" / "config.json").unlink()
    calls = len(trained_once.training.calls)
    trained_once.run("--table", "mnist", "--seeds", "0")
    assert read_config(trained_once.hub / "cnv.mnist").correct == 9000
    assert len(trained_once.training.calls) == calls


def test_a_retrained_run_replaces_the_checkpoint(trained_once):
    trained_once.training.variant = "new "
    trained_once.training.accuracy = lambda name, seed: 95.0
    trained_once.run("--table", "mnist", "--seeds", "0", "--retrain")
    assert read_config(trained_once.hub / "cnv.mnist").correct == 9500
    run = trained_once.runs / NAME / "seed0"
    kept = (trained_once.hub / "cnv.mnist" / "model.safetensors").read_bytes()
    assert kept == (run / "weights.safetensors").read_bytes()
    assert b"new " in kept[:2000]


def test_the_checkpoint_has_the_results_of_all_seeds(bench):
    bench.recipe(NAME)
    for seed in (2, 0):
        bench.run("--table", "mnist", "--seeds", str(seed))
    shutil.rmtree(bench.runs)  # the weights are not needed again, only the records
    weights = bench.hub / "cnv.mnist" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    bench.put(NAME, 1, accuracy=95.5)
    bench.run("--table", "mnist", "--time-limit", "0")
    results = [(r.seed, r.correct, r.total) for r in read_config(bench.hub / "cnv.mnist").results]
    assert results == [(0, 9000, 10000), (1, 9550, 10000), (2, 9200, 10000)]
    assert weights.stat().st_mtime_ns == before


def test_the_index_lists_the_checkpoint_and_its_files(trained_once):
    index = read_index(trained_once.home.parent / "src" / "cnvzoo" / "checkpoints" / "index.json")
    entry = index.checkpoints["cnv.mnist"]
    assert (entry.correct, entry.total, entry.dataset, entry.parameters) == (9000, 10000, "mnist", 1_545_536)
    for file in (trained_once.hub / "cnv.mnist").iterdir():
        content = file.read_bytes()
        assert entry.files[file.name] == FileFacts(hashlib.sha256(content).hexdigest(), len(content))


def test_quantized_weights_are_packed(bench):
    bench.recipe("cifar10_quant_cnv_w2a2")
    assert bench.run("--table", "cifar10", "--seeds", "0") == 0
    folder = bench.hub / "quant_cnv_w2a2.cifar10"
    run = bench.runs / "cifar10_quant_cnv_w2a2" / "seed0" / "weights.safetensors"
    assert read_config(folder).weights_sha256 == sha256_of(run)
    assert (folder / "model.safetensors").stat().st_size < run.stat().st_size / 14


def test_a_stray_file_is_not_published(trained_once, capsys):
    index = trained_once.home.parent / "src" / "cnvzoo" / "checkpoints" / "index.json"
    before = index.read_text()
    (trained_once.hub / "cnv.mnist" / "notes.txt").touch()
    trained_once.run("--table", "mnist", "--seeds", "0")
    printed = capsys.readouterr().err
    assert printed.count("cnv.mnist: its entry in the index stays as it was") == 1
    assert "notes.txt does not belong to a checkpoint: move it elsewhere" in printed
    assert index.read_text() == before


class TestVerification:
    def test_runs_after_the_training(self, trained_once):
        assert trained_once.verified == [["cnv.mnist"]]

    def test_reports_a_difference_and_returns_1(self, trained_once, capsys):
        trained_once.problem = "model.safetensors: damaged"
        assert trained_once.run("--table", "mnist", "--seeds", "0") == 1
        assert "cnv.mnist fails its verification: model.safetensors: damaged" in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", [["--time-limit", "0"], ["--seeds", "1"], ["--epochs", "2"]])
    def test_does_not_run_when_no_run_of_seed_0_was_requested(self, trained_once, arguments):
        trained_once.run("--table", "mnist", *arguments)
        assert len(trained_once.verified) == 1


def test_weights_that_differ_from_the_record_do_not_become_a_checkpoint(bench):
    bench.recipe(NAME)
    bench.run("--table", "mnist", "--seeds", "1")
    bench.put(NAME, 0, weights_sha256="1" * 64)  # a record from another machine, without its weights
    bench.run("--table", "mnist", "--seeds", "0")
    assert not bench.hub.exists()


def test_a_record_whose_weights_are_not_those_of_the_checkpoint_is_reported(trained_once, tmp_path, capsys):
    """As when the record of another machine is copied here, and the folder of its run is not."""
    shutil.rmtree(trained_once.runs)
    trained_once.put(NAME, 0, accuracy=95.0, weights_sha256="1" * 64)
    command = ("--table", "mnist", "--seeds", "0", "--publish", str(tmp_path / "store"))
    assert trained_once.run(*command) == 1
    said = capsys.readouterr().err
    weights = trained_once.runs / NAME / "seed0" / "weights.safetensors"
    assert f"its weights are not those of {trained_once.result(NAME)}: copy those of that run to {weights}" in said
    assert f"not published, because the checkpoint is not that of the record, see above: {NAME}" in said
    assert not (tmp_path / "store").exists()


def test_a_float_start_that_is_trained_for_another_entry_becomes_a_checkpoint_too(bench):
    bench.recipe("cifar10_cnv")
    bench.recipe("cifar10_quant_cnv_w4a4", float_start="cifar10_cnv")
    assert bench.run("--table", "cifar10", "--entry", "cifar10_quant_cnv_w4a4", "--seeds", "0") == 0
    assert sorted(path.name for path in bench.hub.iterdir()) == ["cnv.cifar10", "quant_cnv_w4a4.cifar10"]


def test_the_index_is_kept_where_the_checkpoints_are_missing(trained_once, capsys):
    index = trained_once.home.parent / "src" / "cnvzoo" / "checkpoints" / "index.json"
    before = index.read_text()
    shutil.rmtree(trained_once.hub)
    shutil.rmtree(trained_once.runs)
    assert trained_once.run("--table", "mnist", "--seeds", "1") == 0
    said = capsys.readouterr().err
    assert f"{trained_once.hub} is missing, and the index lists 1 checkpoints in it: restore it" in said
    assert index.read_text() == before


def test_a_trial_does_not_become_a_checkpoint(bench):
    bench.recipe(NAME)
    bench.run("--table", "mnist", "--seeds", "0", "--epochs", "2")
    assert not bench.hub.exists()


def test_an_accuracy_that_the_weights_do_not_confirm_is_not_published(bench, capsys):
    bench.recipe("mnist_cnv")
    bench.unproven = "9,000 correct images, published 9,999, allowed difference 0"
    bench.training.accuracy = lambda name, seed: 99.99
    assert bench.run("--table", "mnist", "--seeds", "0") == 1
    message = capsys.readouterr().err
    assert "mnist_cnv/seed0.json: not published, because its weights do not confirm it: 9,000 correct images" in message
    assert not (bench.hub / "cnv.mnist").exists()


def test_a_record_that_differs_from_the_published_checkpoint_of_the_same_weights_is_refused(bench, capsys):
    bench.recipe("mnist_cnv")
    assert bench.run("--table", "mnist", "--seeds", "0") == 0
    record = RunRecord.read(bench.result("mnist_cnv"))
    edited = record.model_copy(update={"correct": 9999, "accuracy": 99.99})
    edited.write(bench.result("mnist_cnv"))
    (bench.runs / "mnist_cnv" / "seed0" / "record.json").unlink()
    capsys.readouterr()
    assert bench.run("--table", "mnist", "--seeds", "0", "--time-limit", "0") == 3
    assert "9999 of 10000 right, and the published checkpoint of the same weights says 9000" in capsys.readouterr().err
    assert "99.99" not in bench.page
