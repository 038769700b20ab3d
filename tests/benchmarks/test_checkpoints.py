"""Which runs become a checkpoint of the hub: those of seed 0 that are in the table, with the very weights."""

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
def run_once(bench: Bench) -> Bench:
    bench.recipe(NAME)
    assert bench.run("--table", "mnist", "--seeds", "0", "1") == 0
    return bench


def test_seed_0_is_kept_with_its_number_and_weights(run_once):
    folder = run_once.hub / "cnv.mnist"
    assert [path.name for path in run_once.hub.iterdir()] == ["cnv.mnist"]
    config = read_config(folder)
    assert (config.correct, config.total, config.recipe["seed"]) == (9000, 10000, 0)
    assert config.model == {"name": "cnv", "num_classes": 10, "in_chans": 1}
    assert config.preprocessing["size"] == 32
    run = run_once.runs / NAME / "seed0"
    assert (folder / "model.safetensors").read_bytes() == (run / "weights.safetensors").read_bytes()


def test_one_that_is_kept_is_not_written_again(run_once):
    weights = run_once.hub / "cnv.mnist" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    run_once.run("--table", "mnist", "--seeds", "0")
    assert weights.stat().st_mtime_ns == before


def test_one_that_was_lost_is_written_again_without_training(run_once):
    (run_once.hub / "cnv.mnist" / "config.json").unlink()
    calls = len(run_once.training.calls)
    run_once.run("--table", "mnist", "--seeds", "0")
    assert read_config(run_once.hub / "cnv.mnist").correct == 9000
    assert len(run_once.training.calls) == calls


def test_a_new_run_takes_the_place_of_the_old(run_once):
    run_once.training.variant = "new "
    run_once.training.accuracy = lambda name, seed: 95.0
    run_once.run("--table", "mnist", "--seeds", "0", "--retrain")
    assert read_config(run_once.hub / "cnv.mnist").correct == 9500
    run = run_once.runs / NAME / "seed0"
    kept = (run_once.hub / "cnv.mnist" / "model.safetensors").read_bytes()
    assert kept == (run / "weights.safetensors").read_bytes()
    assert b"new " in kept[:2000]


def test_the_results_of_all_seeds_are_in_it(bench):
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


def test_the_index_follows(run_once):
    index = read_index(run_once.home.parent / "src" / "cnvzoo" / "checkpoints" / "index.json")
    entry = index.checkpoints["cnv.mnist"]
    assert (entry.correct, entry.total, entry.dataset, entry.parameters) == (9000, 10000, "mnist", 1_545_536)
    for file in (run_once.hub / "cnv.mnist").iterdir():
        content = file.read_bytes()
        assert entry.files[file.name] == FileFacts(hashlib.sha256(content).hexdigest(), len(content))


def test_quantized_weights_are_packed(bench):
    bench.recipe("cifar10_quant_cnv_w2a2")
    assert bench.run("--table", "cifar10", "--seeds", "0") == 0
    folder = bench.hub / "quant_cnv_w2a2.cifar10"
    run = bench.runs / "cifar10_quant_cnv_w2a2" / "seed0" / "weights.safetensors"
    assert read_config(folder).weights_sha256 == sha256_of(run)
    assert (folder / "model.safetensors").stat().st_size < run.stat().st_size / 14


def test_a_stray_file_is_not_published(run_once, capsys):
    index = run_once.home.parent / "src" / "cnvzoo" / "checkpoints" / "index.json"
    before = index.read_text()
    (run_once.hub / "cnv.mnist" / "notes.txt").touch()
    run_once.run("--table", "mnist", "--seeds", "0")
    said = capsys.readouterr().err
    assert said.count("cnv.mnist: its entry in the index stays as it was") == 1
    assert "notes.txt does not belong to a checkpoint: move it elsewhere" in said
    assert index.read_text() == before


class TestVerification:
    def test_follows_the_training(self, run_once):
        assert run_once.verified == [["cnv.mnist"]]

    def test_a_difference_fails(self, run_once, capsys):
        run_once.problem = "model.safetensors: damaged"
        assert run_once.run("--table", "mnist", "--seeds", "0") == 1
        assert "cnv.mnist: not as published: model.safetensors: damaged" in capsys.readouterr().err

    @pytest.mark.parametrize("arguments", [["--time-limit", "0"], ["--seeds", "1"], ["--epochs", "2"]])
    def test_not_where_nothing_was_asked_of_it(self, run_once, arguments):
        run_once.run("--table", "mnist", *arguments)
        assert len(run_once.verified) == 1


def test_weights_that_are_not_those_of_the_record_are_not_kept(bench):
    bench.recipe(NAME)
    bench.run("--table", "mnist", "--seeds", "1")
    bench.put(NAME, 0, weights_sha256="1" * 64)  # a record from another machine, without its weights
    bench.run("--table", "mnist", "--seeds", "0")
    assert not bench.hub.exists()


def test_a_trial_is_not_kept(bench):
    bench.recipe(NAME)
    bench.run("--table", "mnist", "--seeds", "0", "--epochs", "2")
    assert not bench.hub.exists()


def test_an_accuracy_that_the_weights_do_not_bear_out_is_not_published(bench, capsys):
    bench.recipe("mnist_cnv")
    bench.unproven = "9,000 correct images, published 9,999, allowed difference 0"
    bench.training.accuracy = lambda name, seed: 99.99
    assert bench.run("--table", "mnist", "--seeds", "0") == 1
    message = capsys.readouterr().err
    assert "mnist_cnv/seed0.json: not published, because its weights do not confirm it: 9,000 correct images" in message
    assert not (bench.hub / "cnv.mnist").exists()


def test_a_number_that_differs_from_the_published_checkpoint_of_the_same_weights_is_refused(bench, capsys):
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
