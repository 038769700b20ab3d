"""The ways to train a net that train.py compares, each in a process of its own.

An allocator's settings and OpenMP's threads belong to a process, so a tutorial's loop sharing one with this library
would run with what the library has set up. The processes take turns; those that wait for theirs are idle.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing.connection import Connection
from typing import Any

import textbook
import torch
from machine import wait

from cnvzoo.data import Dataset, TrainBatches
from cnvzoo.models import build_model
from cnvzoo.train import Recipe, Trainer, preprocessing_of
from cnvzoo.train.device import deterministic, keep_freed_memory

WAYS = ("textbook", "tuned textbook", "ours")
_WARM_UP_STEPS = 4
_UNCOUNTED_STEPS = 5  # of a turn: a loader's queue is used up, and caches hold what they hold


class Way:
    """A way to train by `recipe`, from the start of its process to the end of a `with` block.

    Args:
        name: one of `WAYS`.
        recipe: model, batch size, optimizer and augmentation.
        device: to train on.
        data: whose training images are used.
    """

    def __init__(self, name: str, recipe: Recipe, device: torch.device, data: Dataset) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = f"{name} of {recipe.model}"
        self._connection, there = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(there, name, recipe, device, data, torch.get_num_threads())
        )
        self._process.start()
        there.close()

    def __enter__(self) -> Way:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()

    def wait(self) -> None:
        """Until the process is ready for its first turn."""
        self._receive()

    def take_turn(self, seconds: float) -> float:
        """Train for so many seconds; images a second."""
        self._connection.send(seconds)
        return self._receive()

    def _receive(self) -> float:
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError(f"{self._name}: its process ended, see above") from None


def _serve(connection: Connection, way: str, recipe: Recipe, device: torch.device, data: Dataset, threads: int) -> None:
    """What a way's process does: warm up, then train for as many seconds as it is told, until it is told no more."""
    torch.set_num_threads(threads)
    with deterministic(device), keep_freed_memory() if way == "ours" else nullcontext():
        step = _start(way, recipe, device, data)
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


def _start(way: str, recipe: Recipe, device: torch.device, data: Dataset) -> Callable[[], object]:
    """A function that takes one step."""
    if way == "ours":
        return _ours(recipe, device, data)
    model = textbook.build(recipe.model, recipe.w_bits)
    batches = textbook.loader(data, recipe.batch_size)
    steps: Iterator[None] = textbook.training(model, batches, device, tuned=way == "tuned textbook")
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
