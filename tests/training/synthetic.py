"""Small stand-ins for the benchmark datasets, and recipes and runs that train on them within a second or a few."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cnvzoo.data import Dataset, dataset_info
from cnvzoo.models import register_model, unregister_model
from cnvzoo.models.layers import FloatLayers
from cnvzoo.models.resnet import ResNet
from cnvzoo.training import Recipe, RunInterrupted, RunRecord, Trainer, recipe_from_dict, run_recipe

StepHook = Callable[[Callable[[Trainer], object] | None], None]  # the fixture `each_step`

EVERY_AUGMENTATION = {
    "crop_padding": 2,
    "flip": True,
    "cutout": 8,
    "mixup": 0.4,
}
STEPS = 12  # of `recipe()` on `noise()`: two epochs of six
CNV_BITS = {"model": "quant_cnv", "w_bits": 2, "a_bits": 2}


@contextmanager
def small_resnets() -> Iterator[None]:
    """Register ResNet-8, ResNet-14 and a quantized one of one block: what does not depend on the model is fast on them.

    They cannot be registered on import, as other tests list the models.
    """
    summary = "CIFAR ResNet of few layers, for tests"
    for blocks in (1, 2):
        build = functools.partial(_small_resnet, blocks)
        register_model(f"resnet{6 * blocks + 2}", summary=summary, headless=True)(build)
    register_model("quant_resnet4", summary=summary, quantized=True, headless=True)(_quant_resnet4)
    try:
        yield
    finally:
        for name in ("resnet8", "resnet14", "quant_resnet4"):
            unregister_model(name)


def _small_resnet(blocks: int, num_classes: int, in_chans: int) -> ResNet:
    return ResNet((16, 32, 64), (blocks,) * 3, num_classes, in_chans, FloatLayers())


def _quant_resnet4(num_classes: int, in_chans: int, w_bits: int, a_bits: int) -> ResNet:
    from cnvzoo.models.quant_layers import QuantLayers  # Brevitas takes a second to import

    return ResNet((16,), (1,), num_classes, in_chans, QuantLayers(w_bits, a_bits, 8))


def noise(name: str = "mnist", train: int = 48, test: int = 40, seed: int = 0) -> Dataset:
    """Random pixels with random labels: enough for whatever does not depend on learning anything."""
    info = replace(dataset_info(name), train_size=train, test_size=test)
    generator = torch.Generator().manual_seed(seed)

    def images(n: int) -> Tensor:
        shape = (n, info.image_size, info.image_size, info.in_chans)
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)

    def labels(n: int) -> Tensor:
        return torch.randint(info.num_classes, (n,), generator=generator, dtype=torch.uint8)

    return Dataset(info, images(train), labels(train), images(test), labels(test))


def coloured(train: int, test: int) -> Dataset:
    """CIFAR-10 of noise tinted by class: ten colours that a network tells apart after a few dozen steps."""
    plain = noise("cifar10", train, test)
    tint = torch.tensor([[(c * 3) % 10, (c * 7) % 10, c] for c in range(10)]).mul(17).to(torch.uint8)

    def tinted(images: Tensor, labels: Tensor) -> Tensor:
        return images // 3 + tint[labels.long()][:, None, None, :]

    return replace(
        plain,
        train_images=tinted(plain.train_images, plain.train_labels),
        test_images=tinted(plain.test_images, plain.test_labels),
    )


def recipe(**changes: Any) -> Recipe:
    """ResNet-8 on `noise()`: two epochs of six steps. `changes` replace whole keys."""
    values: dict[str, Any] = {
        "name": "mnist_resnet8",
        "model": "resnet8",
        "dataset": "mnist",
        "epochs": 2,
        "batch_size": 8,
        "optimizer": {"lr": 0.05},
        "schedule": {"warmup_epochs": 0.5},
    }
    return recipe_from_dict(values | changes, "this test")


def run(wanted: Recipe, folder: Path, dataset: Dataset | None = None, **arguments: Any) -> RunRecord:
    return run_recipe(wanted, run_dir=folder, dataset=dataset or noise(wanted.dataset), quiet=True, **arguments)


def interrupted(wanted: Recipe, folder: Path, each_step: StepHook, **arguments: Any) -> Path:
    """A run that stopped at a step of its first epoch; the path of its state."""
    each_step(lambda trainer: trainer.step == 4 and os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunInterrupted):
        run(wanted, folder, **arguments)
    each_step(None)
    return folder / "state.safetensors"
