"""The processes that train.py measures, and the baseline: training as in PyTorch's tutorials.

Each process trains one net by one program and is idle until its turn. The settings of the memory allocator and the
threads of OpenMP belong to a process: in one that it shared with this library, the baseline would run with the settings
of the library. The baseline uses PIL transforms in a DataLoader with workers; its nets have the layers and parameters
of the library's, as layers of torch.nn and Brevitas with their default settings.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import torch
from PIL import Image
from shared import synchronize
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from cnvzoo.data import Dataset, TrainBatches
from cnvzoo.errors import CnvzooError
from cnvzoo.models import build_model
from cnvzoo.training import Recipe, Trainer, preprocessing_of
from cnvzoo.training.device import deterministic, keep_freed_memory, training_dtype

BASELINE, TUNED_BASELINE, OURS = "baseline", "tuned baseline", "ours"
PROGRAMS = (BASELINE, TUNED_BASELINE, OURS)
_WARM_UP_STEPS = 4
_UNCOUNTED_STEPS = 5  # at the start of a turn: they take the batches that the loader's queue holds (two per worker)
WORKERS = 2
_CNV = (64, 64, "pool", 128, 128, "pool", 256, 256)
_MOBILENET = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class TrainingProcess:
    """A process that trains by `recipe`, from its start to the end of a `with` block.

    Args:
        program: one of `PROGRAMS`.
        recipe: model, batch size, optimizer and augmentation.
        device: to train on.
        data: whose training images are used.

    Raises:
        CnvzooError: by `wait` and `take_turn`, if the process has ended.
    """

    def __init__(self, program: str, recipe: Recipe, device: torch.device, data: Dataset) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = f"{program}, {recipe.tag}"
        self._connection, there = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(there, program, recipe, device, data, torch.get_num_threads())
        )
        self._process.start()
        there.close()

    def __enter__(self) -> TrainingProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()

    def wait(self) -> None:
        """Until the process is ready for its first turn."""
        self._receive()

    def take_turn(self, seconds: float) -> float:
        """Train for so many seconds; returns images a second."""
        try:
            self._connection.send(seconds)
        except OSError:
            raise self._ended() from None
        return self._receive()

    def _receive(self) -> float:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None

    def _ended(self) -> CnvzooError:
        return CnvzooError(f"{self._name}: its process ended; its own error is printed above")


def _serve(
    connection: Connection, program: str, recipe: Recipe, device: torch.device, data: Dataset, threads: int
) -> None:
    """Warm up, then train for each number of seconds that is received, until the other end is closed."""
    torch.set_num_threads(threads)
    with ExitStack() as settings:
        if program == OURS:
            settings.enter_context(deterministic(device))
            settings.enter_context(keep_freed_memory())
        step = _start(program, recipe, device, data)
        _train(step, _WARM_UP_STEPS, device)
        connection.send(0.0)
        while True:
            try:
                seconds = connection.recv()
            except EOFError:
                return
            _train(step, _UNCOUNTED_STEPS, device)
            began, steps = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                step()
                steps += 1
            synchronize(device)
            connection.send(steps * recipe.batch_size / (time.perf_counter() - began))


def _train(step: Callable[[], object], steps: int, device: torch.device) -> None:
    for _ in range(steps):
        step()
    synchronize(device)


def _start(program: str, recipe: Recipe, device: torch.device, data: Dataset) -> Callable[[], object]:
    """A function that takes one step."""
    if program == OURS:
        return _ours(recipe, device, data)
    model = build(recipe.model, recipe.w_bits)
    batches = loader(data, recipe.batch_size)
    steps: Iterator[None] = training(model, batches, device, tuned=program == TUNED_BASELINE)
    return lambda: next(steps)


def _ours(recipe: Recipe, device: torch.device, data: Dataset) -> Callable[[], object]:
    model: Any = build_model(
        recipe.model, num_classes=data.info.num_classes, in_chans=data.info.in_chans,
        w_bits=recipe.w_bits, a_bits=recipe.a_bits,
    ).to(device)  # fmt: skip
    model.to(memory_format=torch.channels_last)
    batches = TrainBatches(
        data.train_images, data.train_labels, num_classes=data.info.num_classes,
        preprocessing=preprocessing_of(recipe.model, recipe.dataset), augmentation=recipe.augmentation,
        batch_size=recipe.batch_size, seed=0, device=device,
    )  # fmt: skip
    return Trainer(model.train(), batches, recipe, recipe.epochs).take_step


class _Images(TorchDataset[tuple[Tensor, int]]):
    """Images one by one, from array to PIL image to tensor, as torchvision.datasets.CIFAR10 does it."""

    def __init__(self, data: Dataset, transform: Any) -> None:
        self._images, self._labels = data.train_images.numpy(), data.train_labels.tolist()
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._images[index])), self._labels[index]


def loader(data: Dataset, batch_size: int) -> DataLoader[tuple[Tensor, int]]:
    """Random crop, flip and normalisation, by `WORKERS` processes."""
    steps = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    steps.append(transforms.Normalize(data.info.mean, data.info.std))
    return DataLoader(
        _Images(data, transforms.Compose(steps)),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        persistent_workers=True,
        # from this process, spawned by another, the default is to spawn workers too, which import torch anew
        multiprocessing_context="fork" if sys.platform == "linux" else None,
        pin_memory=torch.cuda.is_available(),
    )


def training(
    model: nn.Module, batches: DataLoader[tuple[Tensor, int]], device: torch.device, *, tuned: bool
) -> Iterator[None]:
    """Training without end, one step for each `next`.

    `tuned`: channels_last, and bfloat16 autocast except on CPUs without kernels for bfloat16, where it is slower.
    """
    autocast = tuned and training_dtype(device) == torch.bfloat16
    model = model.to(device).train()
    if tuned:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True)
    criterion = nn.CrossEntropyLoss()
    while True:
        for images, labels in batches:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            if tuned:
                images = images.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            yield


def build(name: str, bits: int | None, num_classes: int = 10) -> nn.Module:
    """The net that the library has under this name; `bits` of the weights and activations of cnv, None for float."""
    if name == "mobilenet_v1":
        return _mobilenet(num_classes)
    if name.startswith("resnet"):
        return _ResNet(int(name.removeprefix("resnet")) // 6, num_classes)
    return _cnv(bits, num_classes)


def _cnv(bits: int | None, num_classes: int) -> nn.Module:
    """The float net, or Brevitas' layers with weights and activations of `bits`; first weights have 8."""

    def conv(inputs: int, outputs: int) -> nn.Module:
        if bits is None:
            return nn.Conv2d(inputs, outputs, 3, bias=False)
        from brevitas.nn import QuantConv2d

        return QuantConv2d(inputs, outputs, 3, bias=False, weight_bit_width=8 if inputs == 3 else bits)

    def linear(inputs: int, outputs: int) -> nn.Module:
        if bits is None:
            return nn.Linear(inputs, outputs, bias=False)
        from brevitas.nn import QuantLinear

        return QuantLinear(inputs, outputs, bias=False, weight_bit_width=bits)

    def relu() -> nn.Module:
        if bits is None:
            return nn.ReLU()
        from brevitas.inject.enum import ScalingImplType
        from brevitas.nn import QuantReLU

        # Brevitas' default gathers percentiles for 300 steps first, which is slower still
        return QuantReLU(bit_width=bits, scaling_impl_type=ScalingImplType.PARAMETER, scaling_init=6.0)

    layers: list[nn.Module] = []
    if bits is not None:
        from brevitas.nn import QuantIdentity

        layers.append(QuantIdentity(bit_width=8))
    channels = 3
    for step in _CNV:
        if isinstance(step, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [conv(channels, step), nn.BatchNorm2d(step), relu()]
            channels = step
    layers.append(nn.Flatten())
    for width in (512, 512):
        layers += [linear(channels, width), nn.BatchNorm1d(width), relu()]
        channels = width
    return nn.Sequential(*layers, linear(channels, num_classes))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class _ResNet(nn.Sequential):
    def __init__(self, depth: int, num_classes: int) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        channels = 16
        for width in (16, 32, 64):
            for block in range(depth):
                layers.append(_Block(channels, width, 2 if block == 0 and width > 16 else 1))
                channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


def _mobilenet(num_classes: int) -> nn.Module:
    def unit(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    layers, channels = unit(3, 32, 3, 1, 1), 32
    for outputs, stride in _MOBILENET:
        layers += unit(channels, channels, 3, stride, channels) + unit(channels, outputs, 1, 1, 1)
        channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
