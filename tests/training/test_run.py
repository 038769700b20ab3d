"""Training one recipe: what a run is and leaves behind, the held-out split, and what stops it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import CNV_BITS, EVERY_AUGMENTATION, STEPS, StepHook, coloured, interrupted, noise, recipe, run

from cnvzoo.data import Dataset
from cnvzoo.errors import CnvzooError
from cnvzoo.files import sha256_of
from cnvzoo.models import build_model
from cnvzoo.models.resnet import ResNet
from cnvzoo.training import (
    NUMERICS,
    RecipeError,
    RunError,
    RunRecord,
    Trainer,
    TrainingDiverged,
    count_correct,
    preprocessing_of,
)
from cnvzoo.training.state import load_checked

# --- what a run is and leaves behind


def test_a_record_describes_the_run(tmp_path: Path) -> None:
    wanted = recipe(label_smoothing=0.1, augmentation=EVERY_AUGMENTATION)
    record = run(wanted, tmp_path, seed=3)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == ["record.json", "weights.safetensors"]
    assert RunRecord.read(tmp_path / "record.json") == record
    assert (record.entry, record.seed, record.trial, record.holdout) == ("mnist_resnet8", 3, False, 0)
    assert (record.total, record.float_start) == (40, None)
    assert record.accuracy == pytest.approx(100 * record.correct / 40)
    assert record.recipe == wanted.model_dump(mode="json") | {"seed": 3}
    assert record.recipe_sha256 == wanted.fingerprint()
    assert record.weights_sha256 == sha256_of(tmp_path / "weights.safetensors")
    assert record.device["kind"] in ("cpu", "cuda")
    assert record.versions["torch"] == torch.__version__
    assert {"python", "cnvzoo"} <= record.versions.keys()
    assert record.finished.endswith("+00:00")
    assert [entry["epoch"] for entry in record.history] == [1, 2]
    assert record.seconds == pytest.approx(sum(entry["seconds"] for entry in record.history), abs=0.06)


def test_the_saved_weights_are_those_that_were_scored(tmp_path: Path) -> None:
    data = coloured(train=48, test=40)
    record = run(recipe(dataset="cifar10"), tmp_path, data)
    model = build_model("resnet8")
    model.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=True)
    preprocessing = preprocessing_of("resnet8", "cifar10")
    assert count_correct(model, data.test_images, data.test_labels, preprocessing, quiet=True) == record.correct


@pytest.mark.parametrize("changes", [{}, CNV_BITS], ids=["float", "quantized"])
def test_a_learnable_dataset_is_learned(tmp_path: Path, uncompiled: None, changes: dict[str, Any]) -> None:
    optimizer = {"lr": 0.05}
    wanted = recipe(**{"dataset": "cifar10", "epochs": 4, "batch_size": 16, "optimizer": optimizer} | changes)
    record = run(wanted, tmp_path, coloured(train=128, test=100))
    losses = [entry["loss"] for entry in record.history]
    assert losses[-1] < losses[0] * 0.7
    assert record.accuracy > 60  # chance is 10


@pytest.mark.parametrize("epochs", [1, 3])
def test_another_number_of_epochs_makes_a_trial(tmp_path: Path, epochs: int) -> None:
    record = run(recipe(), tmp_path, epochs=epochs)
    assert record.trial
    assert len(record.history) == epochs
    assert (record.epochs, record.recipe["epochs"]) == (epochs, 2)
    assert record.recipe_sha256 == recipe().fingerprint()


def test_as_many_epochs_as_the_recipe_make_no_trial(tmp_path: Path, whole: RunRecord) -> None:
    record = run(recipe(), tmp_path, epochs=2)
    assert not record.trial
    assert record.weights_sha256 == whole.weights_sha256


@pytest.mark.parametrize("epochs", [0, -1])
def test_no_epochs_at_all_are_refused(tmp_path: Path, epochs: int) -> None:
    with pytest.raises(CnvzooError, match="epochs"):
        run(recipe(), tmp_path, epochs=epochs)
    assert not (tmp_path / "record.json").exists()


# --- the held-out split


def test_a_holdout_reads_no_test_image_and_trains_on_no_held_out_one(tmp_path: Path) -> None:
    data = noise("mnist", train=60)
    split = data.holdout(12)
    other_test = replace(data, test_images=255 - data.test_images, test_labels=(data.test_labels + 1) % 10)
    held = (data.train_images[:, None] == split.test_images[None]).flatten(2).all(2).any(1)
    assert held.sum() == 12
    inverted = torch.where(held[:, None, None, None], 255 - data.train_images, data.train_images)
    other_held = replace(data, train_images=inverted)

    records = [run(recipe(), tmp_path / str(i), d, holdout=12) for i, d in enumerate((data, other_test, other_held))]
    assert all((r.trial, r.holdout, r.total) == (True, 12, 12) for r in records)
    assert len({r.weights_sha256 for r in records}) == 1
    assert records[0].correct == records[1].correct

    model = build_model("resnet8", in_chans=1)
    model.load_state_dict(load_file(tmp_path / "0" / "weights.safetensors"))
    preprocessing = preprocessing_of("resnet8", "mnist")
    for record, part in ((records[0], split), (records[2], other_held.holdout(12))):
        assert count_correct(model, part.test_images, part.test_labels, preprocessing, quiet=True) == record.correct


def test_a_holdout_leaves_other_weights_than_the_whole_set(whole: RunRecord, tmp_path: Path) -> None:
    assert run(recipe(), tmp_path, holdout=8).weights_sha256 != whole.weights_sha256


@pytest.mark.parametrize("n", [-1, 48])
def test_an_impossible_holdout_is_refused(tmp_path: Path, n: int) -> None:
    with pytest.raises(CnvzooError, match=rf"holdout\D{{1,2}}{n}\b"):
        run(recipe(), tmp_path, holdout=n)


# --- what goes wrong


def test_a_loss_that_is_no_number_stops_the_run_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged) as caught:
        run(recipe(optimizer={"lr": 1e30}, schedule={"warmup_epochs": 0.0}), tmp_path, seed=4)
    said = str(caught.value)
    assert said.startswith("mnist_resnet8, seed 4: the training loss is ")
    assert "in epoch 1: lower optimizer.lr (1e+30) or lengthen schedule.warmup_epochs" in said
    assert not (tmp_path / "record.json").exists()


NO_WARM_UP = {"warmup_epochs": 0.0}


@pytest.mark.parametrize("bits", [2, 8])
def test_weights_beyond_a_million_stop_the_run_though_the_loss_is_finite(
    bits: int, tmp_path: Path, uncompiled: None
) -> None:
    wanted = recipe(**CNV_BITS | {"w_bits": bits, "a_bits": bits}, optimizer={"lr": 1e6}, schedule=NO_WARM_UP)
    with pytest.raises(TrainingDiverged) as caught:
        run(wanted, tmp_path)
    said = str(caught.value)
    assert re.match(r"^mnist_resnet8, seed 0: \w+\.\d+\.\w+ has grown to \d\.?\d*e\+\d+ in epoch 1: lower", said), said
    assert said.endswith("optimizer.lr (1000000.0) or lengthen schedule.warmup_epochs")
    assert not (tmp_path / "record.json").exists()


DAMAGES: dict[str, tuple[str, Callable[[torch.nn.Module], torch.Tensor], float]] = {
    "parameter": ("fc.weight has values that are not finite", lambda m: m.get_parameter("fc.weight"), float("nan")),
    "infinite": ("fc.weight has values that are not finite", lambda m: m.get_parameter("fc.weight"), float("-inf")),
    "buffer": ("norm.running_var has values that are", lambda m: m.get_buffer("norm.running_var"), float("inf")),
    "large": ("fc.bias has grown to 1.1e+06", lambda m: m.get_parameter("fc.bias"), -1.1e6),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_last_step_that_breaks_weights_stops_the_run_and_leaves_its_state(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of all steps are finite: each is that of the weights before the step."""
    says, tensor, value = DAMAGES[damage]
    take = Trainer.take_step

    def take_and_break(trainer: Trainer) -> None:
        take(trainer)
        if trainer.step == trainer.total_steps:
            tensor(trainer.model).data.view(-1)[3] = value

    monkeypatch.setattr(Trainer, "take_step", take_and_break)
    with pytest.raises(TrainingDiverged, match=re.escape(f"mnist_resnet8, seed 0: {says}")) as caught:
        run(recipe(), tmp_path, save_every=0)
    assert "in epoch 2: lower optimizer.lr (0.05)" in str(caught.value)
    assert not (tmp_path / "record.json").exists()
    assert load_checked(tmp_path / "state.safetensors")[1]["values"]["step"] == STEPS - 1


def test_biases_that_break_when_they_are_quantized_are_not_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: torch.nn.Module) -> None:
        next(model.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr("cnvzoo.models.integers.quantize_bias", spoil)
    with pytest.raises(TrainingDiverged, match="has values that are not finite at the end: lower"):
        run(recipe(**CNV_BITS, quantize_bias=True), tmp_path, epochs=1)
    assert not (tmp_path / "record.json").exists()


@pytest.mark.parametrize("loss", [float("inf"), float("-inf"), float("nan")])
def test_a_loss_of_either_infinity_stops_the_run(loss: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Trainer.take_step

    def take_and_spoil(trainer: Trainer) -> None:
        take(trainer)
        trainer.state()[0]["loss_sum"].fill_(loss)

    monkeypatch.setattr(Trainer, "take_step", take_and_spoil)
    with pytest.raises(TrainingDiverged, match=f"the training loss is {loss} in epoch 1"):
        run(recipe(), tmp_path)


def test_bits_of_a_layer_that_the_model_lacks_are_refused_with_the_recipe(tmp_path: Path) -> None:
    wanted = recipe(**CNV_BITS, bits={"nolayer": [2, 2]})
    says = r"^mnist_resnet8: bits: 'nolayer' names no layer whose bit width can be chosen: .*Choices: features\.0, .*$"
    with pytest.raises(RunError, match=says):
        run(wanted, tmp_path)


@pytest.mark.parametrize("name", ["resnet8", "resnet14"], ids=["model", "teacher"])
def test_a_state_dict_of_more_than_tensors_is_refused_before_training(
    name: str, tmp_path: Path, each_step: StepHook, monkeypatch: pytest.MonkeyPatch
) -> None:
    def extra_state(model: ResNet) -> Any:
        return {"version": 1} if model.spec.name == name else torch.zeros(1)

    monkeypatch.setattr(ResNet, "get_extra_state", extra_state, raising=False)
    state, teacher = build_model("resnet14", in_chans=1).state_dict(), tmp_path / "teacher.safetensors"
    save_file({name: value for name, value in state.items() if isinstance(value, torch.Tensor)}, teacher)
    each_step(lambda _: pytest.fail("it must not train"))
    says = (
        "mnist_resnet8: ResNet: _extra_state in its state_dict is of type dict, and a run saves tensors alone: have "
        "get_extra_state return a tensor"
    )
    with pytest.raises(RunError, match=f"^{re.escape(says)}$"):
        run(recipe(teacher="mnist_resnet14"), tmp_path / "run", teacher=teacher)


def test_a_batch_larger_than_the_training_set_is_refused(tmp_path: Path) -> None:
    says = "mnist_resnet8: batch_size: 49: must be at most 48, the training images of mnist"
    with pytest.raises(RecipeError, match=f"^{says}$"):
        run(recipe(batch_size=49), tmp_path)
    with pytest.raises(RunError, match=r"^mnist_resnet8, seed 0: batch_size must be 1 to 40[^\n]*$"):
        run(recipe(batch_size=48), tmp_path, holdout=8)


@pytest.mark.parametrize("seed", [-3, 2**63, 2**64, True, 1.0, "1"])
@pytest.mark.parametrize("place", ["argument", "recipe"])
def test_an_impossible_seed_is_refused_before_anything_is_made(tmp_path: Path, seed: Any, place: str) -> None:
    wanted = recipe().model_copy(update={"seed": seed}) if place == "recipe" else recipe()
    says = f"mnist_resnet8: seed={seed!r}: a seed is a whole number from 0 to 9223372036854775807 (2**63 - 1)"
    with pytest.raises(RunError, match=f"^{re.escape(says)}$"):
        run(wanted, tmp_path / "run", **({"seed": seed} if place == "argument" else {}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argument", "value", "says"),
    [
        ("epochs", 1.5, "a run has at least 1"),
        ("epochs", True, "a run has at least 1"),
        ("epochs", 0, "a run has at least 1"),
        ("holdout", 8.0, "a number of training images, 0 for none"),
        ("validate", "3", "a number of held-out images, 0 for no validation"),
    ],
)
def test_an_impossible_count_is_refused_before_anything_is_made(
    tmp_path: Path, argument: str, value: Any, says: str
) -> None:
    with pytest.raises(RunError, match=f"^mnist_resnet8: {argument}={value!r}: {says}$"):
        run(recipe(), tmp_path / "run", **{argument: value})
    assert not (tmp_path / "run").exists()


def test_counts_of_numpy_are_those_of_python(tmp_path: Path) -> None:
    counts: dict[str, Any] = {
        "seed": np.int64(1), "epochs": np.int64(1), "holdout": np.uint8(8), "validate": np.int32(4)
    }  # fmt: skip
    record = run(recipe(), tmp_path / "numpy", **counts)
    assert record == run(recipe(), tmp_path / "numpy", seed=1, epochs=1, holdout=8, validate=4)


def test_images_that_the_recipe_does_not_fit_are_refused(tmp_path: Path) -> None:
    images = torch.zeros(48, 16, 16, 1, dtype=torch.uint8)
    small = Dataset.from_arrays(images, [0, 1] * 24, ["a", "b"], test_images=images, test_labels=[0, 1] * 24)
    with pytest.raises(RecipeError, match=r"^mnist_resnet8: early_crops\.side: 24: must be 8 to 15 for resnet8$"):
        run(recipe(early_crops={"side": 24, "epochs": 1}), tmp_path / "run", small)


def test_the_largest_seed_trains(tmp_path: Path) -> None:
    assert run(recipe(), tmp_path, seed=2**63 - 1, epochs=1).seed == 2**63 - 1


def test_an_unknown_device_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(CnvzooError, match="use auto, cpu or cuda"):
        run(recipe(), tmp_path / "run", device="tpu")
    assert not (tmp_path / "run").exists()


def test_a_state_names_its_run_in_plain_json(tmp_path: Path, each_step: StepHook) -> None:
    """So that a person can tell which run a file belongs to."""
    state = interrupted(recipe(), tmp_path, each_step, holdout=8)
    size = int.from_bytes(state.read_bytes()[:8], "little")
    metadata = json.loads(state.read_bytes()[8 : 8 + size])["__metadata__"]
    identity = json.loads(metadata["identity"])
    assert identity == {
        "recipe": recipe().fingerprint(),
        "seed": 0,
        "epochs": 2,
        "holdout": 8,
        "numerics": NUMERICS,
        "data": noise().sha256,
        "float_start": None,
        "teacher": None,
        "start": None,
    }
