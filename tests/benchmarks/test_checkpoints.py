"""Which runs become a checkpoint of the hub: those of seed 0 that are in the table, with the very weights."""

from __future__ import annotations

import pytest
from workbench import Bench

from cnvzoo.hub import read_config

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
    run_once.training.flavour = "new "
    run_once.training.accuracy = lambda name, seed: 95.0
    run_once.run("--table", "mnist", "--seeds", "0", "--retrain")
    assert read_config(run_once.hub / "cnv.mnist").correct == 9500
    assert (run_once.hub / "cnv.mnist" / "model.safetensors").read_text().startswith("new ")


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
