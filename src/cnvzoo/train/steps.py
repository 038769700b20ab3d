"""How the steps of an epoch are taken: one by one, or as replays of one captured CUDA graph.

Networks this small leave a GPU idle while the host launches their hundreds of kernels. A captured step is one launch,
from the augmentation of the images to the average of the weights: what changes from step to step is copied to fixed
places on the device before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .trainer import Trainer

_WARM_UP_STEPS = 3  # compilers, cuDNN and allocator settle before a capture
_one_capture = threading.Lock()


class Steps:
    """Takes the steps of a trainer one by one."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._epoch: int | None = None

    def take(self, epoch: int, index: int) -> None:
        """Take step `index` of an epoch."""
        if epoch != self._epoch:
            self._begin(epoch)
        self._take(epoch, index)

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        self._plan = self._trainer.batches.plan(epoch, self._trainer.side(epoch))

    def _take(self, epoch: int, index: int) -> None:
        trainer = self._trainer
        factor, average_weight = trainer.scalars(epoch * trainer.steps_per_epoch + index)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        images, targets = trainer.batches.make(self._plan, index)
        trainer.learn(images, targets, self._plan.rows[index, -1], average_weight)


class CapturedSteps(Steps):
    """Takes the first step of a trainer by capturing it, and every step by replaying that, until the images' side is
    another.

    TrivialAugment chooses its kernels by how many images it gives to each, so batches with it are made outside.

    Args:
        trainer: in the state from which to go on when the first step is taken.
        capture: runs the function that it is given a few times, and returns another that does what it does.
    """

    def __init__(
        self, trainer: Trainer, capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None
    ) -> None:
        super().__init__(trainer)
        self._capture = capture or _capture_cuda_graph
        self._replay: Callable[[], None] | None = None
        self._captured_side = 0

    def _begin(self, epoch: int) -> None:
        super()._begin(epoch)
        trainer, steps = self._trainer, self._trainer.steps_per_epoch
        if self._plan.side != self._captured_side:
            self._replay = None  # and let go of its memory
        scalars = [trainer.scalars(epoch * steps + index) for index in range(steps)]
        self._scalars = torch.tensor(scalars, dtype=torch.float32).to(trainer.device)

    def _take(self, epoch: int, index: int) -> None:
        if self._replay is None:
            self._prepare(index)
        self._copy_inputs(index)
        assert self._replay is not None
        self._replay()

    def _prepare(self, index: int) -> None:
        """Capture a step, and put everything back that the capture's own steps moved."""
        trainer = self._trainer
        self._captured_side = self._plan.side
        self._now = self._scalars[index].clone()
        self._inputs = tuple(t.clone() for t in self._step_inputs(index))
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = torch.zeros((), device=trainer.device)
        before = {name: tensor.clone() for name, tensor in trainer.state()[0].items()}
        self._replay = self._capture(self._take_from_inputs)
        for name, tensor in trainer.state()[0].items():
            if name in before:
                tensor.copy_(before[name])
            else:  # of an optimizer that had not taken a step: its momentum starts from zero
                tensor.zero_()

    def _step_inputs(self, index: int) -> tuple[Tensor, ...]:
        batches, plan = self._trainer.batches, self._plan
        if plan.trivial is not None:
            return plan.rows[index], *batches.make(plan, index)
        return (plan.rows[index],) if plan.mix is None else (plan.rows[index], plan.mix[index])

    def _copy_inputs(self, index: int) -> None:
        self._now.copy_(self._scalars[index])
        for place, value in zip(self._inputs, self._step_inputs(index), strict=True):
            place.copy_(value)

    def _take_from_inputs(self) -> None:
        trainer = self._trainer
        factor, average_weight = self._now
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                torch.mul(factor, group["peak_lr"], out=group["lr"])
        rows, *more = self._inputs
        mixing = more[0] if more else None
        if self._plan.trivial is None:
            images, targets = trainer.batches.make_from(rows, mixing, side=self._captured_side)
        else:
            images, targets = more
        trainer.learn(images, targets, rows[-1], average_weight)


def _capture_cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_STEPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # other threads may train other runs, and capture theirs
    with _one_capture, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        step()
    return graph.replay
