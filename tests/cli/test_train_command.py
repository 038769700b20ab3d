"""`cnvzoo train`: its output, exit statuses and error messages."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

from cnvzoo.errors import CnvzooError
from cnvzoo.files import sha256_of
from cnvzoo.training import Recipe, RunRecord


@pytest.mark.usefixtures("uncompiled")
class TestTrain:
    @pytest.mark.parametrize(
        ("arguments", "folder"),
        [
            ((), "runs/mnist_resnet20/seed0"),
            (("--seed", 3), "runs/mnist_resnet20/seed3"),
            (("--epochs", 2), "runs/mnist_resnet20/seed0"),
            (("--epochs", 1), "runs/trials/mnist_resnet20/seed0-1epochs"),
            (("--epochs", 5, "--seed", 1), "runs/trials/mnist_resnet20/seed1-5epochs"),
            (("--holdout", 20), "runs/trials/mnist_resnet20/seed0-holdout20"),
            (("--epochs", 1, "--holdout", 20), "runs/trials/mnist_resnet20/seed0-1epochs-holdout20"),
            (("--dataset", "mnist"), "runs/mnist_resnet20/seed0"),
            (("--dataset", "fashion_mnist"), "runs/mnist_resnet20-on-fashion_mnist/seed0"),
            (("--dataset", "./my photos/", "--epochs", 1), "runs/trials/mnist_resnet20-on-my_photos/seed0-1epochs"),
            (("--start", "resnet20.mnist"), "runs/mnist_resnet20-from-resnet20.mnist/seed0"),
        ],
    )
    def test_trials_and_other_images_or_starts_have_own_folders(self, cnvzoo, recipe, monkeypatch, arguments, folder):
        asked: list[Path] = []

        def train(*_: object, run_dir: Path, **__: object) -> None:
            asked.append(run_dir)
            raise CnvzooError("stopped by the test")

        monkeypatch.setattr(sys.modules["cnvzoo"], "train", train)
        assert "stopped by the test" in cnvzoo("train", recipe(), *arguments).said
        assert asked == [Path(folder)]

    @pytest.mark.filterwarnings("default")
    def test_a_teacher_of_another_dataset_is_left_out_with_a_line(self, cnvzoo, recipe, monkeypatch):
        def run_recipe(wanted: Recipe, **_: object) -> None:
            raise CnvzooError(f"teachers {wanted.teacher}, float start {wanted.float_start}")

        monkeypatch.setattr("cnvzoo.train_and_save.run_recipe", run_recipe)
        result = cnvzoo("train", "cifar10_quant_cnv_w4a4", "--dataset", "cifar100")
        assert result.err.splitlines() == [
            "warning: cifar10_quant_cnv_w4a4: trains on cifar100 without float_start cifar10_cnv and teacher "
            "cifar10_cnv, of cifar10",
            "error: teachers (), float start None",
        ]

    def test_a_run_writes_its_record(self, cnvzoo, recipe, small_datasets, tmp_path):
        small_datasets()
        result = cnvzoo("train", recipe(), "--device", "cpu")
        assert result.status == 0
        record = RunRecord.read(tmp_path / "runs" / "mnist_resnet20" / "seed0" / "record.json")
        assert (record.trial, record.total) == (False, 50)
        assert result.out.startswith(f"mnist_resnet20, seed 0: {record.accuracy:.2f} % on the test set of mnist")
        assert "runs/mnist_resnet20/seed0" in result.out

    def test_a_run_stopped_at_the_time_limit_resumes(self, cnvzoo, recipe, small_datasets, tmp_path):
        small_datasets()
        path = recipe()
        train = ("train", path, "--device", "cpu", "--run-dir")
        assert cnvzoo(*train, "whole").status == 0

        stopped = cnvzoo(*train, "parts", "--time-limit", 0)
        assert stopped.status == 3
        assert "resumes there" in stopped.err
        assert not (tmp_path / "parts" / "record.json").exists()
        assert cnvzoo(*train, "parts").status == 0
        weights = "weights.safetensors"
        assert sha256_of(tmp_path / "parts" / weights) == sha256_of(tmp_path / "whole" / weights)

    def test_holdout_scores_on_training_images(self, cnvzoo, recipe, small_datasets, tmp_path):
        small_datasets()
        options = ("--epochs", 1, "--holdout", 40, "--seed", 7, "--device", "cpu")
        result = cnvzoo("train", recipe(), *options)
        assert result.status == 0
        assert "on 40 held-out training images, a trial" in result.out
        record = RunRecord.read(
            tmp_path / "runs" / "trials" / "mnist_resnet20" / "seed7-1epochs-holdout40" / "record.json"
        )
        assert (record.seed, record.holdout, record.total, record.trial) == (7, 40, 40, True)

    def test_watching(self, cnvzoo, recipe, small_datasets, tmp_path):
        small_datasets(train=64, test=10)
        before = torch.get_num_threads()
        watched = ("--holdout", 20, "--validate", 10, "--log", "log.csv", "--threads", before + 1, "--run-dir", "run")
        result = cnvzoo("train", recipe(), "--device", "cpu", *watched)
        assert result.status == 0, result.err
        record = RunRecord.read(tmp_path / "run" / "record.json")
        assert record.device["threads"] == before + 1
        assert torch.get_num_threads() == before
        accuracies = [epoch["validation_accuracy"] for epoch in record.history]
        lines = (tmp_path / "log.csv").read_text().splitlines()
        assert [float(line.split(",")[-1]) for line in lines[1:]] == accuracies
        assert f"validation {accuracies[-1]:.2f} %" in result.err

    def test_validation_without_held_out_images(self, cnvzoo, recipe):
        result = cnvzoo("train", recipe(), "--validate", 10)
        assert result.status == 1
        assert "validate=10 needs held-out images" in result.err
        assert "give holdout=10 too" in result.err

    @pytest.mark.parametrize("seed", [-1, 2**63])
    def test_a_seed_out_of_range(self, cnvzoo, recipe, seed, tmp_path):
        result = cnvzoo("train", recipe(), "--seed", seed)
        assert result.status == 1
        said = f"seed={seed}: a seed is a whole number from 0 to 9223372036854775807 (2**63 - 1)"
        assert result.err == f"error: mnist_resnet20: {said}\n"
        assert not (tmp_path / "runs").exists()

    def test_a_recipe_that_does_not_fit_the_images(self, cnvzoo, recipe):
        result = cnvzoo("train", recipe("cnv", "augmentation: {cutout: 33}"))
        assert result.status == 1
        assert "augmentation.cutout: 33: must be at most 32, the side of the images" in result.err
        assert "Traceback" not in result.err

    def test_a_holdout_of_all_images(self, cnvzoo, recipe, small_datasets):
        small_datasets()
        result = cnvzoo("train", recipe(), "--holdout", 300)
        assert result.status == 1
        assert "holdout(300): mnist has 300 training images" in result.err
        assert "expected a whole number from 1 to 299" in result.err
        assert "Traceback" not in result.err

    @pytest.mark.parametrize(("purpose", "says"), [("float_start", "starts from"), ("teacher", "learns from")])
    def test_weights_that_a_recipe_needs(self, cnvzoo, recipe, small_datasets, purpose, says):
        small_datasets(train=64, test=10)
        one_epoch = ("--epochs", 1, "--device", "cpu", "--run-dir")
        assert cnvzoo("train", recipe("cnv", "schedule: {warmup_epochs: 0}"), *one_epoch, "cnv").status == 0
        quant = recipe("quant_cnv", "w_bits: 4", "a_bits: 4", f"{purpose}: mnist_cnv")

        refused = cnvzoo("train", quant, *one_epoch, "quant")
        assert refused.status == 1
        assert f"{says} the weights of mnist_cnv" in refused.err
        weights = Path("cnv") / "weights.safetensors"
        option = "--" + purpose.replace("_", "-")
        assert cnvzoo("train", quant, *one_epoch, "quant", option, weights).status == 0
        facts = getattr(RunRecord.read(Path("quant") / "record.json"), purpose)
        assert facts["weights_sha256"] == sha256_of(weights)

    @pytest.mark.parametrize("purpose", ["float_start", "teacher"])
    def test_a_checkpoint_as_float_start_or_teacher(
        self, cnvzoo, recipe, small_datasets, make_checkpoint, monkeypatch, tmp_path, purpose
    ):
        small_datasets(train=64, test=10)
        folder = make_checkpoint(tmp_path / "hub", "cnv", "mnist")
        recipe("cnv")
        path = recipe("quant_cnv", "w_bits: 4", "a_bits: 4", f"{purpose}: mnist_cnv")
        asked: list[dict[str, object]] = []

        def run_recipe(*_: object, **arguments: object) -> None:
            asked.append(arguments)
            raise CnvzooError("stopped by the test")

        monkeypatch.setattr("cnvzoo.train_and_save.run_recipe", run_recipe)
        option = "--" + purpose.replace("_", "-")
        for source in ("cnv.mnist", "hub/cnv.mnist", folder / "model.safetensors"):
            assert cnvzoo("train", path, option, source, "--hub", "hub").err == "error: stopped by the test\n"
            given = asked.pop()[purpose]
            (file,) = given if isinstance(given, list) else [given]
            assert sha256_of(Path(str(file))) == sha256_of(folder / "model.safetensors")

        make_checkpoint(tmp_path / "hub", "quant_cnv", "mnist", w_bits=4, a_bits=4)
        make_checkpoint(tmp_path / "hub", "cnv", "cifar10")
        for other, is_a in (
            ("quant_cnv_w4a4.mnist", "quant_cnv trained on mnist"),
            ("hub/cnv.cifar10", "cnv trained on cifar10"),
        ):
            refused = cnvzoo("train", path, option, other, "--hub", "hub")
            assert refused.err == (
                f"error: mnist_quant_cnv: {purpose}: {other} is a {is_a} with seed 0: "
                "give the checkpoint of a cnv trained on mnist with seed 0\n"
            )
        (folder / "model.safetensors").write_bytes(b"damaged")
        assert "expected" in cnvzoo("train", path, option, "cnv.mnist", "--hub", "hub").err
        assert not asked

    def test_the_record_names_the_checkpoint_that_a_run_started_from(
        self, cnvzoo, recipe, small_datasets, make_checkpoint, tmp_path
    ):
        small_datasets(train=64, test=10)
        folder = make_checkpoint(tmp_path / "hub", "cnv", "mnist")
        recipe("cnv")
        path = recipe("quant_cnv", "w_bits: 4", "a_bits: 4", "float_start: mnist_cnv", "schedule: {warmup_epochs: 0}")
        options = ("--epochs", 1, "--device", "cpu", "--run-dir", "run", "--hub", "hub")
        result = cnvzoo("train", path, "--float-start", "cnv.mnist", *options)
        assert result.status == 0, result.err
        assert RunRecord.read(Path("run") / "record.json").float_start == {
            "entry": "mnist_cnv", "seed": 0, "weights_sha256": sha256_of(folder / "model.safetensors"),
        }  # fmt: skip

    def test_a_full_disk_keeps_the_saved_state(self, cnvzoo, recipe, small_datasets, tmp_path, full_disk):
        small_datasets(train=64, test=10)
        train = ("train", recipe(), "--device", "cpu", "--run-dir", "run")
        assert cnvzoo(*train, "--time-limit", 0).status == 3
        before = sha256_of(state := tmp_path / "run" / "state.safetensors")
        with full_disk(100_000):
            result = cnvzoo(*train)
        assert result.status == 1
        last = result.err.splitlines()[-1]
        assert last.startswith("error: run/state.safetensors: cannot be written: File too large: raise the limit")
        assert "Traceback" not in result.err
        assert sha256_of(state) == before
        assert sorted(path.name for path in state.parent.iterdir()) == [".lock", state.name]

    @pytest.mark.parametrize(
        ("folder", "says"),
        [
            ("file", "file: cannot be written: file is a file, not a folder: choose another folder"),
            ("file/x/y", "file/x/y: cannot be written: file is a file, not a folder: choose another folder"),
            ("/proc", "/proc: cannot be written: No such file or directory: choose another folder"),
            ("/proc/x", "/proc/x: cannot be written: No such file or directory: choose another folder"),
            ("~no-such-user/x", "~no-such-user/x: ~no-such-user is not a known home folder: write the path without ~"),
        ],
    )
    def test_an_invalid_run_folder(self, cnvzoo, recipe, folder, says):
        if folder.startswith("/proc") and not Path("/proc/self").is_dir():
            pytest.skip("needs /proc")
        Path("file").write_text("kept")
        result = cnvzoo("train", recipe(), "--device", "cpu", "--run-dir", folder)
        assert (result.status, result.err) == (1, f"error: {says}\n")
        assert Path("file").read_text() == "kept"
        assert not Path("~no-such-user").exists()

    @pytest.mark.parametrize("where", [(os, "mkdir"), (os, "open")])
    def test_a_run_folder_on_a_read_only_disk(self, cnvzoo, recipe, monkeypatch, where):
        command = ("train", recipe(), "--device", "cpu", "--run-dir", "disk/run")
        real = getattr(*where)

        def fail(path, *arguments, **options):
            if "disk" in str(path):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return real(path, *arguments, **options)

        monkeypatch.setattr(*where, fail)
        result = cnvzoo(*command)
        says = "disk/run: cannot be written: Read-only file system: mount it for writing, or choose another folder"
        assert (result.status, result.err) == (1, f"error: {says}\n")

    def test_home_is_expanded_in_the_run_folder(self, cnvzoo, recipe, small_datasets, tmp_path, monkeypatch):
        small_datasets(train=64, test=10)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert cnvzoo("train", recipe(), "--device", "cpu", "--time-limit", 0, "--run-dir", "~/run").status == 3
        assert (tmp_path / "home" / "run" / "state.safetensors").exists()

    def test_a_file_that_cannot_be_read(self, cnvzoo, recipe, monkeypatch):
        def fail(*_):
            raise PermissionError(errno.EACCES, "Permission denied", "weights.safetensors")

        monkeypatch.setattr(importlib.import_module("cnvzoo.training.run"), "current_commit", fail)
        result = cnvzoo("train", recipe(), "--device", "cpu")
        assert (result.status, result.err) == (1, "error: weights.safetensors: Permission denied\n")

    def test_a_missing_recipe(self, cnvzoo):
        result = cnvzoo("train", "nothing.yaml")
        assert (result.status, result.err) == (1, "error: nothing.yaml: no such recipe\n")

    def test_a_mistake_in_a_recipe_is_named_with_its_line(self, cnvzoo, recipe):
        path = recipe("resnet20", "lable_smoothing: 0.1")
        line = path.read_text().splitlines().index("lable_smoothing: 0.1") + 1
        result = cnvzoo("train", path)
        assert result.status == 1
        assert f"{path}:{line}: lable_smoothing: unknown key: did you mean 'label_smoothing'" in result.err

    def test_the_name_of_a_checkpoint_is_checked_before_the_run(self, cnvzoo, recipe, monkeypatch):
        monkeypatch.setattr(sys.modules["cnvzoo"], "train", lambda *_, **__: pytest.fail("it was trained"))
        result = cnvzoo("train", recipe(), "--checkpoint", "mein Modell")
        assert result.status == 2
        assert "'mein Modell' is not the name of a checkpoint" in " ".join(result.said.replace("│", " ").split())

    def test_a_folder_of_something_else_is_refused_before_the_run(self, cnvzoo, recipe, monkeypatch, tmp_path):
        monkeypatch.setattr(sys.modules["cnvzoo"], "train", lambda *_, **__: pytest.fail("it was trained"))
        (tmp_path / "project").mkdir()
        (tmp_path / "project" / "README.md").write_text("precious")
        result = cnvzoo("train", recipe(), "--checkpoint", tmp_path / "project")
        says = "README.md would be replaced, and this is not the folder of a checkpoint that this cnvzoo reads"
        assert (result.status, result.err) == (1, f"error: {tmp_path / 'project'}: {says}: choose another folder\n")

    def test_an_unknown_device(self, cnvzoo, recipe, small_datasets):
        small_datasets()
        result = cnvzoo("train", recipe(), "--device", "gpu")
        assert result.status == 1
        assert "use auto, cpu or cuda" in result.err
