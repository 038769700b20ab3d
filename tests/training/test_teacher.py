"""Learning from a teacher: the loss, the preprocessing of its images, and runs with a teacher."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import StepHook, coloured, interrupted, noise, recipe, run
from torch import Tensor, nn

from cnvzoo.files import sha256_of
from cnvzoo.training import Distillation, RunError, RunRecord, preprocessing_of
from cnvzoo.training.distillation import Teacher

PIXELS = preprocessing_of("quant_cnv", "cifar10")
NORMALISED = preprocessing_of("cnv", "cifar10")
TAUGHT = {"name": "mnist_resnet8", "teacher": "mnist_resnet14"}


class Constant(nn.Module):
    """A network that gives these logits for every image."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), -1)


# --- the loss


def test_the_loss_of_a_case_done_by_hand() -> None:
    """Softened by 2, the teacher's probabilities are 3/4 and 1/4, the student's 1/2 and 1/2."""
    teacher = Teacher([(Constant(2 * math.log(3), 0), PIXELS)], PIXELS, Distillation(temperature=2, weight=0.25))
    found = teacher.loss(torch.zeros(5, 3, 32, 32), torch.arange(5), torch.zeros(5, 2), torch.tensor(2.0))
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(found) == pytest.approx(0.75 * 2.0 + 0.25 * 4 * divergence, rel=1e-6)


def test_the_gradient_of_the_loss_is_the_difference_of_probabilities() -> None:
    """Of KL(p || q) softened by T, times T^2: T (q - p), which Hinton et al. say keeps its size as T grows."""
    logits = torch.tensor([[0.3, -1.0, 2.0]], requires_grad=True)
    teacher = Teacher([(Constant(1.0, 0.5, -0.5), PIXELS)], PIXELS, Distillation(temperature=3, weight=1))
    teacher.loss(torch.zeros(1, 3, 32, 32), torch.arange(1), logits, torch.tensor(0.0)).backward()
    student, other = (torch.softmax(x / 3, 1) for x in (logits.detach(), torch.tensor([[1.0, 0.5, -0.5]])))
    torch.testing.assert_close(logits.grad, 3 * (student - other))


STANDARDIZED = Distillation(temperature=2, weight=0.25, standardize=True)


def standardized_loss(teacher: list[float], logits: Tensor) -> Tensor:
    images = torch.zeros(len(logits), 3, 32, 32)
    nets = [(Constant(*teacher), PIXELS)]
    return Teacher(nets, PIXELS, STANDARDIZED).loss(images, torch.arange(len(logits)), logits, torch.tensor(2.0))


def test_the_loss_of_standardized_logits_done_by_hand() -> None:
    """The teacher's logits 6 and 0 have a standard deviation of 3; both pairs become 1 and -1, the student's reversed.

    Divided by the temperature of 2 they are 1 apart: the probabilities are e/(e + 1) and 1/(e + 1), and the reverse.
    """
    p = math.e / (math.e + 1)
    divergence = p * math.log(p / (1 - p)) + (1 - p) * math.log((1 - p) / p)
    found = standardized_loss([6.0, 0.0], torch.tensor([[-0.1, 0.3], [7.0, 9.0]]))
    assert float(found) == pytest.approx(0.75 * 2.0 + 0.25 * (2 * 3) ** 2 * divergence, rel=1e-5)


def test_a_student_of_standardized_logits_may_have_any_scale_and_shift() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0]])
    same = [standardized_loss([1.0, 0.5, -0.5], scaled) for scaled in (logits, 5 * logits, logits - 40)]
    torch.testing.assert_close(torch.stack(same), same[0].expand(3), rtol=1e-4, atol=0)
    reached = standardized_loss([1.0, 0.5, -0.5], 8 * torch.tensor([[1.0, 0.5, -0.5]]) + 2)
    assert float(reached) == pytest.approx(0.75 * 2.0, rel=1e-4)  # the same ranking, so the labels' part is left


def test_equal_logits_are_standardized_with_finite_gradients() -> None:
    logits = torch.full((2, 3), 0.7, requires_grad=True)
    standardized_loss([1.0, 0.5, -0.5], logits).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(("own", "student"), [(NORMALISED, PIXELS), (PIXELS, NORMALISED), (PIXELS, PIXELS)])
def test_a_teacher_gets_images_in_its_own_preprocessing(own: Any, student: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 900, 10))
    images = noise("cifar10").test_images
    expected = model(own(images)).detach()
    teacher = Teacher([(model, own)], student, Distillation(weight=1))
    shown, ignored = torch.arange(len(images)), torch.tensor(9.0)
    assert abs(float(teacher.loss(student(images), shown, expected, ignored))) < 1e-6
    assert float(teacher.loss(student(images), shown, expected.roll(1, 1), ignored)) > 1e-3


def test_probabilities_of_several_teachers_are_combined_by_their_geometric_mean() -> None:
    """Of odds 9 : 1 and 1 : 4 that is sqrt(9 * 1) : sqrt(1 * 4) = 3 : 2, so a student with these has no loss."""
    nets = [(Constant(math.log(9), 0), PIXELS), (Constant(0, math.log(4)), PIXELS)]
    teacher = Teacher(nets, PIXELS, Distillation(temperature=1, weight=1))
    images, ignored = torch.zeros(5, 3, 32, 32), torch.tensor(9.0)
    learned = torch.tensor([[0.6, 0.4]]).log().expand(5, -1)
    assert abs(float(teacher.loss(images, torch.arange(5), learned, ignored))) < 1e-6
    between = torch.tensor([[0.55, 0.45]]).log().expand(5, -1)  # the arithmetic mean of 0.9 and 0.2
    assert float(teacher.loss(images, torch.arange(5), between, ignored)) > 1e-3


def test_each_of_several_teachers_gets_images_in_its_own_preprocessing() -> None:
    torch.manual_seed(0)
    nets = [(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)), own) for own in (NORMALISED, PIXELS)]
    images = noise("cifar10").test_images
    expected = torch.stack([model(own(images)).detach() for model, own in nets]).mean(0)
    teacher = Teacher(nets, PIXELS, Distillation(weight=1))
    assert abs(float(teacher.loss(PIXELS(images), torch.arange(len(images)), expected, torch.tensor(9.0)))) < 1e-6


# --- runs


pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    folder = tmp_path_factory.mktemp("teacher")
    return folder / "weights.safetensors", run(recipe(name="mnist_resnet14", model="resnet14"), folder, epochs=1)


def test_a_student_learns_from_its_teacher_where_all_labels_are_wrong(tmp_path: Path) -> None:
    optimizer = {"lr": 0.05}
    common = {"dataset": "cifar10", "epochs": 4, "batch_size": 16, "optimizer": optimizer}
    data = coloured(train=256, test=100)
    run(recipe(**common | {"name": "cifar10_resnet8"}), tmp_path / "teacher", data)
    wrong = replace(data, train_labels=(data.train_labels + 1) % 10)
    quantized = {"model": "quant_resnet4", "w_bits": 2, "a_bits": 2}
    taught = recipe(**common | quantized | {"teacher": "cifar10_resnet8", "distillation": {"weight": 1.0}})
    record = run(taught, tmp_path / "student", wrong, teacher=tmp_path / "teacher" / "weights.safetensors")
    assert record.accuracy > 60  # of the test set's right labels


def test_a_record_names_the_teacher(teacher_run: tuple[Path, RunRecord], tmp_path: Path) -> None:
    weights, teacher = teacher_run
    record = run(recipe(**TAUGHT), tmp_path / "taught", teacher=weights)
    assert record.teacher == {"entry": "mnist_resnet14", "seed": 0, "weights_sha256": teacher.weights_sha256}
    assert RunRecord.read(tmp_path / "taught" / "record.json") == record
    assert sha256_of(weights) == teacher.weights_sha256
    alone = run(recipe(), tmp_path / "alone")
    assert alone.teacher is None
    assert alone.weights_sha256 != record.weights_sha256


def test_a_record_names_several_teachers(teacher_run: tuple[Path, RunRecord], tmp_path: Path) -> None:
    first, _ = teacher_run
    other = run(recipe(name="mnist_mobilenet_v1", model="mobilenet_v1"), tmp_path / "other", epochs=1)
    second = tmp_path / "other" / "weights.safetensors"
    both = recipe(**TAUGHT | {"teacher": ["mnist_resnet14", "mnist_mobilenet_v1"]})
    record = run(both, tmp_path / "taught", teacher=[first, second])
    assert record.teacher == [
        {"entry": "mnist_resnet14", "seed": 0, "weights_sha256": sha256_of(first)},
        {"entry": "mnist_mobilenet_v1", "seed": 0, "weights_sha256": other.weights_sha256},
    ]
    assert run(both, tmp_path / "taught", teacher=[first, second]) == record  # found again, not trained again
    alone = run(recipe(**TAUGHT), tmp_path / "alone", teacher=[first])
    assert record.weights_sha256 != alone.weights_sha256
    assert record.recipe_sha256 != alone.recipe_sha256

    with pytest.raises(RunError, match=r"learns from the weights of mnist_mobilenet_v1, seed 0, and no file was given"):
        run(both, tmp_path / "run", teacher=[first])
    many = r"learns from mnist_resnet14, mnist_mobilenet_v1: .*state\.x is one file too many for teacher"
    with pytest.raises(RunError, match=many):
        run(both, tmp_path / "run", teacher=[first, second, tmp_path / "state.x"])
    with pytest.raises(RunError, match=r"mnist_resnet8 has no teacher: .* is one file too many for teacher: leave it"):
        run(recipe(), tmp_path / "run", teacher=first)


def test_a_stopped_run_with_a_teacher_ends_with_the_same_bits(
    teacher_run: tuple[Path, RunRecord], tmp_path: Path, each_step: StepHook
) -> None:
    weights, _ = teacher_run
    whole = run(recipe(**TAUGHT), tmp_path / "whole", teacher=weights)
    interrupted(recipe(**TAUGHT), tmp_path / "stopped", each_step, teacher=weights)
    assert run(recipe(**TAUGHT), tmp_path / "stopped", teacher=weights).weights_sha256 == whole.weights_sha256


def test_the_teachers_weights_are_part_of_the_identity_of_a_run(
    teacher_run: tuple[Path, RunRecord], tmp_path: Path
) -> None:
    weights, _ = teacher_run
    other = tmp_path / "other.safetensors"
    save_file({name: t * 2 if t.is_floating_point() else t for name, t in load_file(weights).items()}, other)
    first = run(recipe(**TAUGHT), tmp_path / "run", teacher=weights)
    with pytest.raises(RunError, match="which differs in teacher"):
        run(recipe(**TAUGHT), tmp_path / "run", teacher=other)
    assert run(recipe(**TAUGHT), tmp_path / "other", teacher=other).weights_sha256 != first.weights_sha256
