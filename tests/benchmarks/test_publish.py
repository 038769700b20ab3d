"""`reproduce.py --publish`: which checkpoints are published, when, and what is printed."""

from __future__ import annotations

import shutil

import pytest
from workbench import Bench

from cnvzoo.checkpoints.folder import read_config

FILES = "model.safetensors, README.md, config.json"


@pytest.fixture
def trained(bench: Bench) -> Bench:
    bench.recipe("mnist_cnv")
    bench.recipe("mnist_resnet20")
    assert bench.run("--table", "mnist", "--entry", "mnist_cnv", "--seeds", "0") == 0
    return bench


def test_it_trains_missing_runs_and_publishes_the_table(trained, tmp_path, capsys):
    store = tmp_path / "store"
    capsys.readouterr()
    assert trained.run("--table", "mnist", "--seeds", "0", "--publish", str(store)) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"resnet20.mnist to {store}: published new {FILES}",
        f"cnv.mnist to {store}: published new {FILES}",
    ]
    for name in ("cnv.mnist", "resnet20.mnist"):
        assert read_config(store / name) == read_config(trained.hub / name)
    assert trained.run("--table", "mnist", "--seeds", "0", "--publish", str(store)) == 0
    assert f"cnv.mnist to {store}: unchanged" in capsys.readouterr().out


def test_the_card_is_written_with_the_checkpoint_and_updated_with_another_seed(trained):
    card = trained.hub / "cnv.mnist" / "README.md"
    assert "Mean of one seed: 90.00 %" in card.read_text()
    trained.run("--table", "mnist", "--entry", "mnist_cnv", "--seeds", "0", "1")
    assert "Mean of 2 seeds: 90.50 %, standard deviation 0.71" in card.read_text()
    card.unlink()
    trained.run("--table", "mnist", "--time-limit", "0")
    assert "Mean of 2 seeds" in card.read_text()


def test_a_dry_run_trains_nothing_and_writes_nothing(trained, tmp_path, capsys):
    calls, store = len(trained.training.calls), tmp_path / "store"
    capsys.readouterr()
    assert trained.run("--table", "mnist", "--publish", str(store), "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [
        "no checkpoint to publish yet: mnist_resnet20",
        f"cnv.mnist to {store}: would publish new {FILES}",
    ]
    assert len(trained.training.calls) == calls
    assert not store.exists()


def test_a_folder_without_a_config_is_not_published(trained, tmp_path, capsys):
    (trained.hub / "resnet20.mnist").mkdir()
    (trained.hub / "resnet20.mnist" / ".model.safetensors.0a1b2c3d.tmp").touch()  # a writer was killed
    capsys.readouterr()
    assert trained.run("--table", "mnist", "--publish", str(tmp_path / "store"), "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[0] == "no checkpoint to publish yet: mnist_resnet20"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dry-run"], "--dry-run shows what --publish would send: give both"),
        (["--tag", "v1"], "--tag marks what --publish would send: give both"),
        (["--publish", "store", "--tag", "v1"], "store is a directory and has no tags: leave --tag out"),
        (["--publish", "hf:/org"], "'hf:/org' is not a store: give a directory, hf://ORG or hf://ORG@REVISION"),
        (["--epochs", "1", "--publish", "store"], "--publish sends the checkpoints of full runs: leave --epochs out"),
    ],
)
def test_options_that_need_or_contradict_publish_are_refused_before_training(trained, options, message, capsys):
    calls = len(trained.training.calls)
    assert trained.run("--table", "mnist", *options) == 2
    assert message in capsys.readouterr().err
    assert len(trained.training.calls) == calls


@pytest.mark.parametrize(("options", "status"), [(["--time-limit", "0"], 3), (["--seeds", "1"], 0)])
def test_checkpoints_that_this_command_did_not_train_are_verified_and_published(
    trained, tmp_path, options, status, capsys
):
    store, command = tmp_path / "store", ("--table", "mnist", "--entry", "mnist_cnv", *options, "--publish")
    trained.verified.clear()
    trained.problem = "17 images right, published 9000"
    assert trained.run(*command, str(store)) == 1
    assert not store.exists()
    assert "nothing is published" in capsys.readouterr().err
    trained.problem = None
    assert trained.run(*command, str(store)) == status
    assert f"cnv.mnist to {store}: published new {FILES}" in capsys.readouterr().out
    assert trained.verified == [["cnv.mnist"]] * 2


def test_nothing_is_published_after_an_interrupt_or_a_failed_verification(trained, tmp_path, capsys):
    store = tmp_path / "store"
    trained.training.stop_at[("mnist_resnet20", 0)] = "SIGINT"
    assert trained.run("--table", "mnist", "--seeds", "0", "--publish", str(store)) == 130
    assert not store.exists()
    trained.problem = "17 images right, published 9000"
    assert trained.run("--table", "mnist", "--seeds", "0", "--publish", str(store)) == 1
    assert "nothing is published" in capsys.readouterr().err
    assert not store.exists()


def test_after_a_store_that_cannot_be_written_the_failed_runs_are_listed(trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    trained.training.fail_at.add(("mnist_resnet20", 0))
    assert trained.run("--table", "mnist", "--seeds", "0", "--publish", str(tmp_path / "file" / "store")) == 1
    said = capsys.readouterr().err
    assert f"not published: cnv.mnist: {tmp_path / 'file' / 'store'}" in said
    assert "failed, see above: mnist_resnet20 seed 0" in said


def test_a_folder_that_was_left_without_a_config_does_not_end_the_command(trained, tmp_path, capsys):
    (trained.hub / "resnet20.mnist").mkdir()
    command = ("--table", "mnist", "--entry", "mnist_resnet20", "--time-limit", "0", "--publish")
    trained.verified.clear()
    assert trained.run(*command, str(tmp_path / "store")) == 3
    assert trained.verified == [[]]
    assert "no checkpoint to publish yet: mnist_resnet20" in capsys.readouterr().err


def test_an_invalid_store_is_one_line_of_error(trained, capsys):
    assert trained.run("--table", "mnist", "--seeds", "0", "--publish", "s3://bucket") == 2
    assert "'s3://bucket' is not a store" in capsys.readouterr().err


def test_a_record_without_a_checkpoint_is_not_published(trained, tmp_path, capsys):
    shutil.rmtree(trained.hub)
    shutil.rmtree(trained.runs)
    assert trained.run("--table", "mnist", "--entry", "mnist_cnv", "--seeds", "0", "--publish", str(tmp_path)) == 1
    assert "not published, because there is a record and no checkpoint: mnist_cnv" in capsys.readouterr().err


def test_everything_is_verified_on_the_device_of_the_runs(trained):
    assert trained.run("--table", "mnist", "--seeds", "0") == 0
    assert trained.devices == {"cpu"}


def test_weights_that_cannot_be_scored_are_not_said_to_differ(bench, capsys):
    bench.recipe("mnist_cnv")
    bench.missing_data = True
    bench.unproven = "mnist cannot be loaded"
    assert bench.run("--table", "mnist", "--seeds", "0") == 1
    assert "not published, because it could not be scored again: mnist cannot be loaded" in capsys.readouterr().err
