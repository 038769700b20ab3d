"""Precomputed teacher logits: equal to those computed in every step, looked up correctly, and resumed after a stop."""

from __future__ import annotations

import importlib
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from synthetic import StepHook, interrupted, noise, recipe, run
from torch import Tensor

from cnvzoo.data import TrainBatches
from cnvzoo.models import build_model
from cnvzoo.training import Distillation, Recipe, RunInterrupted, RunRecord, Trainer, distillation, preprocessing_of
from cnvzoo.training.distillation import Teacher, precompute_logits
from cnvzoo.training.trainer import CapturedSteps

VIEWS = 2
EPOCHS = 5
CROPS = {"crop_padding": 2, "flip": True}
TAUGHT: dict[str, Any] = {
    "name": "mnist_resnet8",
    "teacher": "mnist_resnet14",
    "epochs": EPOCHS,
    "augmentation": CROPS,
}


def taught(views: int | None = VIEWS, **changes: Any) -> Recipe:
    return recipe(**TAUGHT | changes, distillation={"views": views} if views else {})


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    run(recipe(name="mnist_resnet14", model="resnet14"), folder, epochs=1)
    return folder / "weights.safetensors"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of images in each call of Teacher.logits."""
    sizes: list[int] = []
    original = Teacher.logits

    def logits(self: Teacher, images: Tensor) -> Tensor:
        sizes.append(len(images))
        return original(self, images)

    monkeypatch.setattr(Teacher, "logits", logits)
    return sizes


def new_trainer(weights: Path) -> Trainer:
    torch.manual_seed(0)
    data, wanted, normalised = noise(), taught(), preprocessing_of("resnet8", "mnist")
    batches = TrainBatches(
        data.train_images, data.train_labels, num_classes=10, preprocessing=normalised,
        augmentation=wanted.augmentation, batch_size=8, seed=0, device="cpu", views=VIEWS,
    )  # fmt: skip
    net = build_model("resnet14", in_chans=1)
    net.load_state_dict(load_file(weights))
    teacher = Teacher([(net, normalised)], normalised, Distillation())
    return Trainer(build_model("resnet8", in_chans=1), batches, wanted, EPOCHS, teacher)


def precompute(trainer: Trainer, path: Path, views: dict[int, int | None]) -> bool:
    assert trainer.teacher is not None
    return precompute_logits(
        trainer.teacher, trainer.batches, path, {}, views=views, autocast=nullcontext,
        should_stop=lambda: False, label="views", quiet=True,
    )  # fmt: skip


@pytest.mark.parametrize("side", [None, 16])
def test_precomputed_logits_are_those_that_the_teacher_computes_for_each_batch(
    weights: Path, tmp_path: Path, side: int | None
) -> None:
    trainer = new_trainer(weights)
    batches, teacher = trainer.batches, trainer.teacher
    assert teacher is not None
    first = 0 if side is None else VIEWS
    assert precompute(trainer, tmp_path / "teacher_logits.safetensors", {first: side, first + 1: side})
    assert teacher.precomputed is not None
    assert teacher.precomputed.logits.shape == ((first + VIEWS) * 48, 10)
    for epoch in range(EPOCHS):
        plan = batches.plan(epoch, side)
        for step, (images, _) in enumerate(batches.epoch(epoch, side=side)):
            precomputed = teacher.precomputed.logits[plan.rows[step, -1]].float()
            torch.testing.assert_close(precomputed, teacher.logits(images), rtol=2e-3, atol=2e-3)
    assert teacher.precomputed.logits.float().std(0).min() > 0.02  # the teacher tells images apart


def test_replayed_steps_look_up_the_logits_of_their_own_images(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is repeated with other inputs, as a CUDA graph is, looks up the logits of those inputs."""
    looked_up: dict[int, list[Tensor]] = {}
    original = Teacher.loss

    def loss(self: Teacher, images: Tensor, logit_rows: Tensor, *others: Tensor) -> Tensor:
        looked_up.setdefault(id(self), []).append(logit_rows.clone())
        return original(self, images, logit_rows, *others)

    monkeypatch.setattr(Teacher, "loss", loss)
    one_by_one, replayed = new_trainer(weights), new_trainer(weights)
    replayed.steps = CapturedSteps(replayed, lambda step: step)
    for trainer in (one_by_one, replayed):
        assert precompute(trainer, tmp_path / "teacher_logits.safetensors", {0: None, 1: None})
        trainer.train(lambda: False, lambda _: None)
    shown = [torch.stack(looked_up[id(trainer.teacher)]) for trainer in (one_by_one, replayed)]
    assert torch.equal(shown[0], shown[1])
    assert len(shown[0]) == EPOCHS * 6
    assert len(shown[0][:12].unique()) == VIEWS * 48  # each image in either view, in two epochs
    # learning rates are rounded to float32 on the device, a difference that grows from epoch to epoch
    losses = [[epoch["loss"] for epoch in trainer.history] for trainer in (one_by_one, replayed)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-3)
    assert losses[0] == pytest.approx(losses[1], rel=5e-2)


def test_a_run_computes_the_logits_of_each_view_once(weights: Path, tmp_path: Path, asked: list[int]) -> None:
    record = run(taught(), tmp_path / "run", teacher=weights)
    assert sum(asked) == VIEWS * 48
    assert record.recipe["distillation"]["views"] == VIEWS
    assert sorted(path.name for path in (tmp_path / "run").glob("*.*")) == [
        ".lock", "record.json", "weights.safetensors",
    ]  # fmt: skip
    asked.clear()
    run(taught(), tmp_path / "short", teacher=weights, epochs=1)
    assert sum(asked) == 48
    asked.clear()
    run(taught(None), tmp_path / "computed", teacher=weights)
    assert sum(asked) == EPOCHS * 48
    asked.clear()
    run(taught(early_crops={"side": 16, "epochs": 1}), tmp_path / "cropped", teacher=weights)
    assert sum(asked) == (1 + VIEWS) * 48


def test_the_seconds_of_a_run_include_precomputation(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Teacher.logits

    def slow(self: Teacher, images: Tensor) -> Tensor:
        time.sleep(0.3)
        return original(self, images)

    monkeypatch.setattr(Teacher, "logits", slow)
    stopped_after(1, taught(), tmp_path, weights)  # one view is computed before the stop, the other after it
    record = run(taught(), tmp_path, teacher=weights)
    assert record.seconds > sum(epoch["seconds"] for epoch in record.history) + 0.5


def test_training_with_precomputed_logits_equals_training_with_logits_computed_in_every_step(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up = run(taught(), tmp_path / "looked_up", teacher=weights)
    cropped: dict[str, Any] = {"early_crops": {"side": 16, "epochs": 3}}
    crops_looked_up = run(taught(**cropped), tmp_path / "crops_looked_up", teacher=weights)
    monkeypatch.setattr(importlib.import_module("cnvzoo.training.run"), "precompute_logits", lambda *_, **__: True)
    computed = run(taught(), tmp_path / "computed", teacher=weights)
    losses = [[epoch["loss"] for epoch in record.history] for record in (looked_up, computed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    crops_computed = run(taught(**cropped), tmp_path / "crops_computed", teacher=weights)
    crop_losses = [[epoch["loss"] for epoch in record.history] for record in (crops_looked_up, crops_computed)]
    assert crop_losses[0] == pytest.approx(crop_losses[1], rel=1e-3)
    assert crop_losses[0] != pytest.approx(losses[0], rel=4e-3)
    fresh = run(taught(None), tmp_path / "fresh", teacher=weights)
    assert [epoch["loss"] for epoch in fresh.history] != pytest.approx(losses[0], rel=4e-3)


def stopped_after(batches: int, wanted: Recipe, folder: Path, weights: Path) -> RunInterrupted:
    """Run until so many batches, of steps or of views, have been started."""
    asked = iter(range(10**6))
    with pytest.raises(RunInterrupted) as caught:
        run(wanted, folder, teacher=weights, stop=lambda: "enough" if next(asked) >= batches else None)
    return caught.value


@pytest.fixture(scope="module")
def whole(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return run(taught(), tmp_path_factory.mktemp("whole"), teacher=weights)


def test_views_that_were_computed_before_a_stop_are_not_computed_again(
    weights: Path, tmp_path: Path, whole: RunRecord, asked: list[int]
) -> None:
    assert stopped_after(1, taught(), tmp_path, weights).step == 0
    assert asked == [48]
    assert run(taught(), tmp_path, teacher=weights).weights_sha256 == whole.weights_sha256
    assert asked == [48, 48]


def test_logits_that_were_read_share_no_memory_with_the_file_that_is_replaced(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are mapped from it, and Windows cannot replace a file while it is mapped."""
    read: list[Tensor] = []
    written: list[Tensor] = []
    load, save = distillation.load_checked, distillation.save_checked

    def load_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = load(path)
        read.extend(tensors.values())
        return tensors, facts

    def save_checked(tensors: dict[str, Tensor], *others: Any) -> None:
        written.extend(tensors.values())
        save(tensors, *others)

    path = tmp_path / "teacher_logits.safetensors"
    precompute(new_trainer(weights), path, {0: None})
    monkeypatch.setattr(distillation, "load_checked", load_checked)
    monkeypatch.setattr(distillation, "save_checked", save_checked)
    precompute(new_trainer(weights), path, {0: None, 1: None})
    assert (len(read), len(written)) == (1, 2)
    assert read[0].data_ptr() not in {tensor.data_ptr() for tensor in written}


def test_a_stop_between_steps_ends_with_the_same_bits(
    weights: Path, tmp_path: Path, whole: RunRecord, each_step: StepHook, asked: list[int]
) -> None:
    interrupted(taught(), tmp_path, each_step, teacher=weights)
    assert run(taught(), tmp_path, teacher=weights).weights_sha256 == whole.weights_sha256
    assert asked == [48, 48]


@pytest.mark.parametrize("damage", [b"", b"half a file", None], ids=["empty", "damaged", "of another seed"])
def test_a_file_of_logits_that_is_damaged_or_of_another_run_is_replaced(
    weights: Path, tmp_path: Path, whole: RunRecord, damage: bytes | None
) -> None:
    if damage is None:
        with pytest.raises(RunInterrupted):
            run(taught(), tmp_path, teacher=weights, seed=1, deadline=time.monotonic())
        stopped_after(2, taught().model_copy(update={"seed": 1}), tmp_path, weights)
    else:
        (tmp_path / "teacher_logits.safetensors").write_bytes(damage)
    assert run(taught(), tmp_path, teacher=weights).weights_sha256 == whole.weights_sha256
