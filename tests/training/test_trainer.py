"""The training loop: its steps, the losses it reports, captured steps; and counting right answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from synthetic import noise, recipe
from torch import Tensor, nn
from torch.nn import functional as F

from cnvzoo.data import Augmentation, Preprocessing, TrainBatches
from cnvzoo.training import Trainer, count_correct
from cnvzoo.training.trainer import CapturedSteps

SMALL = Preprocessing(8, (0.0,), (1.0,))


class Tiny(nn.Module):
    """A BatchNorm and a linear layer: every kind of state, and trained at once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x).flatten(1))


def tiny() -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny()


def batches(n: int = 40) -> TrainBatches:
    data = noise("mnist", train=n)
    return TrainBatches(
        data.train_images[:, :8, :8],
        data.train_labels,
        num_classes=10,
        preprocessing=SMALL,
        augmentation=Augmentation(),
        batch_size=8,
        seed=3,
        device="cpu",
    )


# --- the loop


def train(trainer: Trainer, stop_at: int | None = None) -> list[int]:
    steps: list[int] = []
    trainer.train(lambda: trainer.step == stop_at, lambda t: steps.append(t.step))
    return steps


@pytest.mark.parametrize(("instructions", "bfloat16"), [("AVX512_CORE", True), ("AVX2", False)])
def test_training_is_plain_sgd_on_the_batches_of_each_epoch(
    instructions: str, bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a loop written out: Nesterov SGD, decay on the one filter, the rate of each step."""
    monkeypatch.setattr("cnvzoo.training.device.onednn_level", lambda: instructions)
    wanted = recipe(
        batch_size=8,
        label_smoothing=0.2,
        optimizer={"lr": 0.2, "momentum": 0.5, "weight_decay": 0.1},
        schedule={"warmup_epochs": 0.0},
    )
    model = tiny()
    trainer = Trainer(model, batches(), wanted, 2)
    assert (trainer.steps_per_epoch, trainer.total_steps) == (5, 10)
    assert train(trainer) == list(range(1, 11))

    by_hand, velocity, losses = tiny(), {}, []
    for epoch in (0, 1):
        for number, (x, y) in enumerate(batches().epoch(epoch)):
            by_hand.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                logits = by_hand(x)
            assert logits.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=0.2)
            loss.backward()
            losses.append(loss.item())
            lr = 0.2 * (1 - (5 * epoch + number) / 10)
            with torch.no_grad():
                for name, p in by_hand.named_parameters():
                    assert p.grad is not None
                    gradient = p.grad + (0.1 * p if name == "fc.weight" else 0)
                    velocity[name] = 0.5 * velocity[name] + gradient if name in velocity else gradient.clone()
                    p -= lr * (gradient + 0.5 * velocity[name])
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)

    assert [entry["epoch"] for entry in trainer.history] == [1, 2]
    for entry, mean in zip(trainer.history, (sum(losses[:5]) / 5, sum(losses[5:]) / 5), strict=True):
        assert entry["loss"] == pytest.approx(mean, abs=1e-4)
    assert [entry["lr"] for entry in trainer.history] == pytest.approx([0.2 * 0.6, 0.2 * 0.1])  # of the last step


@pytest.mark.parametrize("stop", [0, 3, 5, 8])
@pytest.mark.parametrize(
    "optimizer",
    [{"lr": 0.1}, {"name": "muon", "lr": 0.02, "sgd_lr": 0.1}],
    ids=lambda o: o.get("name", "sgd"),
)
def test_training_from_a_state_takes_the_steps_of_an_uninterrupted_run(stop: int, optimizer: dict[str, Any]) -> None:
    wanted = recipe(batch_size=8, optimizer=optimizer)

    def new() -> Trainer:
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 10)
        )
        torch.manual_seed(0)
        for p in model.parameters():
            nn.init.uniform_(p, -0.3, 0.3)
        return Trainer(model.to(memory_format=torch.channels_last), batches(), wanted, 2)  # type: ignore[call-overload]

    with torch.random.fork_rng():
        whole, first, second = new(), new(), new()
    train(whole)
    train(first, stop)
    assert first.step == stop
    tensors, values = first.state()
    second.load_state({name: tensor.clone() for name, tensor in tensors.items()}, values)
    assert train(second) == list(range(stop + 1, 11))
    for (name, value), other in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert [e["loss"] for e in second.history] == [e["loss"] for e in whole.history]


def test_a_state_that_was_loaded_shares_no_memory_with_its_file() -> None:
    """The tensors that are read are mapped from the file, which Windows cannot replace while they are in use."""
    first, second = (Trainer(tiny(), batches(), recipe(batch_size=8), 2) for _ in range(2))
    train(first, 3)
    tensors, values = first.state()
    read = {name: tensor.clone() for name, tensor in tensors.items()}
    second.load_state(read, values)
    mapped = {tensor.untyped_storage().data_ptr() for tensor in read.values()}
    assert not mapped & {tensor.untyped_storage().data_ptr() for tensor in second.state()[0].values()}


class Anchored(Tiny):
    """Has empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors = nn.Parameter(torch.empty(0))
        self.register_buffer("boxes", torch.empty(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.anchors.sum()


def test_a_model_with_empty_tensors_is_trained() -> None:
    trainer = Trainer(Anchored(), batches(), recipe(batch_size=8), 2)
    train(trainer)
    assert len(trainer.history) == 2


def captured_twice(step: Callable[[], None]) -> Callable[[], None]:
    """Replaces a CUDA graph: takes some steps to warm up, then repeats the step that it was given."""
    step()
    step()
    return step


@pytest.mark.parametrize("augmentation", [{}, {"mixup": 0.5, "flip": True}], ids=str)
@pytest.mark.parametrize(
    "optimizer",
    [{"lr": 0.1}, {"name": "muon", "lr": 0.02, "sgd_lr": 0.1, "weight_decay": 0.0}],
    ids=lambda o: o.get("name", "sgd"),
)
def test_replayed_steps_are_those_taken_one_by_one(optimizer: dict[str, Any], augmentation: dict[str, Any]) -> None:
    """From the first step, and from a state in the middle of an epoch."""
    wanted = recipe(batch_size=8, optimizer=optimizer)
    data = noise("mnist", train=40)
    mixed = TrainBatches(
        data.train_images[:, :8, :8], data.train_labels, num_classes=10, preprocessing=SMALL,
        augmentation=Augmentation.model_validate(augmentation), batch_size=8, seed=3, device="cpu",
    )  # fmt: skip

    def new(capture: bool) -> Trainer:
        torch.manual_seed(0)
        first, second = nn.Conv2d(1, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False)
        layers = [first, nn.BatchNorm2d(4), second, nn.Flatten(), nn.Linear(64, 10)]
        model = nn.Sequential(*layers).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        trainer = Trainer(model, mixed, wanted, 2)
        if capture:
            trainer.steps = CapturedSteps(trainer, captured_twice)
        return trainer

    with torch.random.fork_rng():
        one_by_one, replayed, first, second = new(False), new(True), new(True), new(True)
    train(one_by_one)
    train(replayed)
    train(first, 3)
    tensors, values = first.state()
    second.load_state({name: tensor.clone() for name, tensor in tensors.items()}, values)
    train(second)
    expected = one_by_one.state()
    for trainer in (replayed, second):
        found = trainer.state()
        assert found[0].keys() == expected[0].keys()
        for name, tensor in expected[0].items():
            # rates are rounded to float32 on the device, and Muon computes its directions in bfloat16
            rtol, atol = (2e-2, 2e-3) if optimizer.get("name") == "muon" else (1e-4, 1e-6)
            torch.testing.assert_close(found[0][name], tensor, rtol=rtol, atol=atol, msg=name)
        assert [e["lr"] for e in found[1]["history"]] == [e["lr"] for e in expected[1]["history"]]


def test_a_cuda_graph_is_captured_on_the_device_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda's functions without an argument are of the current device; each use is recorded with it."""
    current, uses = ["cuda:0"], []

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(str(chosen))
        yield
        current.pop()

    def used(name: str) -> Callable[..., Any]:
        return lambda *_, **__: uses.append((name, current[-1])) or MagicMock()

    monkeypatch.setattr(torch.cuda, "device", device)
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, used(name))
    trainer = Trainer(tiny(), batches(), recipe(batch_size=8), 2)
    trainer.device = torch.device("cuda:1")
    CapturedSteps(trainer)._capture(lambda: uses.append(("step", current[-1])))
    assert uses == [
        (name, "cuda:1")
        for name in (
            "Stream",
            "current_stream",
            "stream",
            *["step"] * 3,
            "current_stream",
            "CUDAGraph",
            "graph",
            "step",
        )
    ]


def pooled() -> nn.Module:
    """Takes images of any side."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)
        )
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def cropped(epochs: int, crops: int) -> Trainer:
    wanted = recipe(epochs=4, batch_size=8, early_crops={"side": 8, "epochs": crops}, optimizer={"lr": 0.05})
    data = noise("mnist", train=40)
    images = TrainBatches(
        data.train_images, data.train_labels, num_classes=10, preprocessing=Preprocessing(28, (0.0,), (1.0,)),
        augmentation=Augmentation(flip=True), batch_size=8, seed=3, device="cpu",
    )  # fmt: skip
    return Trainer(pooled(), images, wanted, epochs)


@pytest.mark.parametrize(("epochs", "crops", "early"), [(4, 1, 1), (4, 3, 3), (2, 2, 1), (1, 1, 0)])
def test_the_first_epochs_show_parts_of_images(epochs: int, crops: int, early: int) -> None:
    """Four epochs, or a trial of fewer."""
    trainer, sides = cropped(epochs, crops), []
    trainer.model.register_forward_pre_hook(lambda _, args: sides.append(args[0].shape[2:]))
    train(trainer)
    assert sides == [(8, 8)] * 5 * early + [(28, 28)] * 5 * (epochs - early)


def test_a_step_with_parts_of_images_counts_as_less_work_in_proportion() -> None:
    trainer = cropped(4, 2)
    assert [trainer.work(step) for step in (0, 5, 10, 11, 20)] == pytest.approx(
        [0, 5 * 4 / 49, 10 * 4 / 49, 10 * 4 / 49 + 1, 10 * 4 / 49 + 10]
    )
    assert Trainer(tiny(), batches(), recipe(batch_size=8), 2).work(7) == 7


def test_a_step_is_captured_once_for_each_side_of_images() -> None:
    captures: list[int] = []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        captures.append(replayed.step)
        return captured_twice(step)

    one_by_one, replayed = cropped(4, 2), cropped(4, 2)
    replayed.steps = CapturedSteps(replayed, capture)
    train(one_by_one)
    train(replayed)
    assert captures == [0, 10]
    for name, tensor in one_by_one.state()[0].items():
        torch.testing.assert_close(replayed.state()[0][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_a_trial_of_fewer_epochs_keeps_the_share_of_the_warm_up() -> None:
    wanted = recipe(epochs=4, batch_size=8, schedule={"warmup_epochs": 2.0})
    trial = Trainer(tiny(), batches(), wanted, 2)
    rates: list[float] = []
    trial.train(lambda: False, lambda t: rates.append(t.optimizers[0].param_groups[0]["lr"]))
    assert rates.index(max(rates)) == len(rates) // 2


# --- counting


class Brightest(nn.Module):
    """Predicts the index of the brightest pixel of the first row; in training mode, always 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        assert not torch.is_grad_enabled()
        return F.one_hot(torch.zeros(len(x)).long(), 8) if self.training else x[:, 0, 0, :] * self.weight


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_size", [7, 10, 1000])
def test_right_answers_are_counted_in_eval_mode_over_all_batches(training: bool, batch_size: int) -> None:
    answers = torch.randint(8, (50,), generator=torch.Generator().manual_seed(0))
    images = torch.zeros(50, 8, 8, 1, dtype=torch.uint8)
    images[torch.arange(50), 0, answers, 0] = 255
    labels = answers.clone()
    labels[::3] = (labels[::3] + 1) % 8  # 17 wrong ones
    model = Brightest().train(training)
    assert count_correct(model, images, labels.to(torch.uint8), SMALL, batch_size=batch_size) == 33
    assert model.training == training
