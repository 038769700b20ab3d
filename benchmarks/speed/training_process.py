"""The processes whose training train.py measures: each trains one net by one program, and takes turns with the others.

The settings of the memory allocator and the threads of OpenMP belong to a process. In a process shared with this
library the baseline would run with what the library has set up. A process that waits for its turn is idle.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import Any

import baseline
import torch
from machine import wait

from cnvzoo.data import Dataset, TrainBatches
from cnvzoo.errors import CnvzooError
from cnvzoo.models import build_model
from cnvzoo.training import Recipe, Trainer, preprocessing_of
from cnvzoo.training.device import deterministic, keep_freed_memory

BASELINE, TUNED_BASELINE, OURS = "baseline", "tuned baseline", "ours"
PROGRAMS = (BASELINE, TUNED_BASELINE, OURS)
_WARM_UP_STEPS = 4
_UNCOUNTED_STEPS = 5  # at the start of a turn: they take the batches that the loader's queue holds (two per worker)


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
    with deterministic(device), keep_freed_memory() if program == OURS else nullcontext():
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
            wait(device)
            connection.send(steps * recipe.batch_size / (time.perf_counter() - began))


def _train(step: Callable[[], object], steps: int, device: torch.device) -> None:
    for _ in range(steps):
        step()
    wait(device)


def _start(program: str, recipe: Recipe, device: torch.device, data: Dataset) -> Callable[[], object]:
    """A function that takes one step."""
    if program == OURS:
        return _ours(recipe, device, data)
    model = baseline.build(recipe.model, recipe.w_bits)
    batches = baseline.loader(data, recipe.batch_size)
    steps: Iterator[None] = baseline.training(model, batches, device, tuned=program == TUNED_BASELINE)
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
