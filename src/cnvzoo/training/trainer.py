"""The training loop, and the state that a run is at any step.

Nothing in an epoch waits for the device: losses add up on it and are read once, at the epoch's end.


How the steps of an epoch are taken: one by one, or as replays of one captured CUDA graph.

Networks this small leave a GPU idle while the host launches their hundreds of kernels. A captured step is one launch,
from the augmentation of the images to the new weights: what changes from step to step is copied to fixed
places on the device before it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cnvzoo.data.batches import TrainBatches
from cnvzoo.errors import CnvzooError
from cnvzoo.models.norm_act import QuantizedActivation
from cnvzoo.training.distillation import Teacher
from cnvzoo.training.optimizers import build_optimizers, lr_factor
from cnvzoo.training.recipe import Recipe

# Of a parameter, from which on it counts as diverged. Those of the published models are below 10. At a million,
# neighbouring float32 values are 1/16 apart and bfloat16 values 4096: no gradient moves such a weight any more.
_LARGEST_WEIGHT = 1e6


class TrainingDiverged(CnvzooError):
    """The loss or a weight is not a number any more, or a weight has grown beyond all use."""


def _gains_from_compiler(model: nn.Module) -> bool:
    """Whether a GPU is to compile the model: fake quantization is a dozen small kernels. For the deep nets without it,
    compiling takes longer than it saves: each layer counts, and each side of the images."""
    return any(isinstance(module, QuantizedActivation) for module in model.modules())


class Trainer:
    """Trains `model` in place by `recipe`, step by step, from any step on.

    The steps taken depend on the recipe, its seed and the step's number alone, so training that stopped at a
    step and goes on from its `state()` gives the bits that it would have given without the stop.

    Args:
        model, batches, recipe: what learns, what from, and how.
        epochs: how many there are in all.
        teacher: whom the model learns from beside the labels, if the recipe has one.

    Attributes:
        step: steps taken so far, of `total_steps`.
        history: one dict per finished epoch: epoch, loss, lr, seconds.
    """

    def __init__(
        self, model: nn.Module, batches: TrainBatches, recipe: Recipe, epochs: int, teacher: Teacher | None = None
    ) -> None:
        self.model = model
        self.batches = batches
        self.recipe = recipe
        self.teacher = teacher
        self.steps_per_epoch = batches.steps_per_epoch
        self.total_steps = epochs * self.steps_per_epoch
        # a trial of fewer epochs warms up, and shows parts of images, for the same share of them
        share = min(1.0, epochs / recipe.epochs)
        self.schedule = recipe.schedule.model_copy(update={"warmup_epochs": recipe.schedule.warmup_epochs * share})
        self._early_epochs = round(recipe.early_crops.epochs * share) if recipe.early_crops else 0
        self.optimizers = build_optimizers(model, recipe.optimizer)
        self.device = next(model.parameters()).device
        compiled = self.device.type == "cuda" and _gains_from_compiler(model)
        self._forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._loss_sum = torch.zeros((), device=self.device)
        self._epoch_seconds = 0.0
        stepper = CapturedSteps if self.device.type == "cuda" else Steps
        self._stepper: Steps = stepper(self)

    def train(self, should_stop: Callable[[], bool], after_step: Callable[[Trainer], None]) -> None:
        """Take the remaining steps, or those until `should_stop()`; call `after_step(self)` after each."""
        self.model.train()
        while self.step < self.total_steps and not should_stop():
            began = time.monotonic()
            self.take_step()
            self._epoch_seconds += time.monotonic() - began
            if self.step % self.steps_per_epoch == 0:
                self._end_epoch()
            after_step(self)

    def take_step(self) -> None:
        """Take the next step, and do nothing else."""
        self._stepper.take(*divmod(self.step, self.steps_per_epoch))
        self.step += 1

    def side(self, epoch: int) -> int | None:
        """Of what an epoch shows of each image, in pixels; None: all of it."""
        crops = self.recipe.early_crops
        return crops.side if crops and epoch < self._early_epochs else None

    def work(self, step: int) -> float:
        """What the first `step` steps take, in steps with whole images: as much less as they show less of them."""
        crops, early = self.recipe.early_crops, min(step, self._early_epochs * self.steps_per_epoch)
        share = (crops.side / self.batches.preprocessing.size) ** 2 if crops else 1.0
        return early * share + step - early

    def learn(self, images: Tensor, targets: Tensor, shown: Tensor) -> None:
        """Move the weights by one batch: work for the device alone, which nothing here waits for.

        Args:
            images, targets: as TrainBatches makes them.
            shown: int64 [B], the numbers of the images in their views.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with self.precision():
            logits = self._forward(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing)
        if self.teacher:
            with self.precision():
                loss = self.teacher.loss(images, shown, logits, loss)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self._loss_sum += loss.detach()

    def precision(self) -> torch.autocast:
        """The context in which nets run while this one is trained."""
        return torch.autocast(self.device.type, torch.bfloat16)

    def lr_factor(self, step: int) -> float:
        """What the peak learning rates are multiplied by in a step."""
        return lr_factor(self.schedule, step, self.total_steps, self.steps_per_epoch)

    def _end_epoch(self) -> None:
        began = time.monotonic()
        loss = float(self._loss_sum) / self.steps_per_epoch  # waits for the device
        self._epoch_seconds += time.monotonic() - began
        epoch = self.step // self.steps_per_epoch
        if not math.isfinite(loss):
            raise self._diverged(f"the training loss is {loss} in epoch {epoch}")
        self.check_weights(f"in epoch {epoch}")
        lr = self.optimizers[0].param_groups[0]["peak_lr"] * self.lr_factor(self.step - 1)
        self.history.append(
            {"epoch": epoch, "loss": round(loss, 6), "lr": lr, "seconds": round(self._epoch_seconds, 2)}
        )
        self._loss_sum.zero_()
        self._epoch_seconds = 0.0

    @torch.no_grad()
    def check_weights(self, when: str) -> None:
        """Check that what the model has learned so far can be computed with.

        Args:
            when: for the message.

        Raises:
            TrainingDiverged: a parameter or buffer is not finite, or a parameter is beyond a million.
        """
        parameters = dict(self.model.named_parameters())
        values = parameters | {name: t for name, t in self.model.named_buffers() if t.is_floating_point()}
        largest = torch.stack(torch._foreach_norm([t.detach() for t in values.values()], math.inf)).tolist()
        for name, most in zip(values, largest, strict=True):
            if not math.isfinite(most):
                raise self._diverged(f"{name} has values that are not finite {when}")
            if name in parameters and most > _LARGEST_WEIGHT:
                raise self._diverged(f"{name} has grown to {most:.2g} {when}")

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{self.recipe.run_name}: {what}: "
            f"lower optimizer.lr ({self.recipe.optimizer.lr}) or lengthen schedule.warmup_epochs"
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the next steps depend on: tensors by name, and the rest as JSON values."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, optimizer in enumerate(self.optimizers):
            for number, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{number}.{k}": v for k, v in values.items() if v is not None}
        tensors["loss_sum"] = self._loss_sum
        return tensors, {"step": self.step, "history": self.history, "epoch_seconds": self._epoch_seconds}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on from a `state()` of a trainer of the same model and recipe."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.model.load_state_dict(under("model."), strict=True)
        for index, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in under(f"optimizer.{index}.").items():
                number, key = name.split(".", 1)
                # in the layout of the weights, or every further step would convert
                layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
                state.setdefault(int(number), {})[key] = tensor.contiguous(memory_format=layout)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self._loss_sum.copy_(tensors["loss_sum"])
        self.step, self.history = values["step"], values["history"]
        self._epoch_seconds = values["epoch_seconds"]


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
        factor = trainer.lr_factor(epoch * trainer.steps_per_epoch + index)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        images, targets = trainer.batches.make(self._plan, index)
        trainer.learn(images, targets, self._plan.rows[index, -1])


class CapturedSteps(Steps):
    """Takes the first step of a trainer by capturing it, and every step by replaying that, until the images' side is
    another.

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
        factors = [trainer.lr_factor(epoch * steps + index) for index in range(steps)]
        self._factors = torch.tensor(factors, dtype=torch.float32).to(trainer.device)

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
        self._factor = self._factors[index].clone()
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
        plan = self._plan
        return (plan.rows[index],) if plan.lam is None else (plan.rows[index], plan.lam[index])

    def _copy_inputs(self, index: int) -> None:
        self._factor.copy_(self._factors[index])
        for place, value in zip(self._inputs, self._step_inputs(index), strict=True):
            place.copy_(value)

    def _take_from_inputs(self) -> None:
        trainer = self._trainer
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                torch.mul(self._factor, group["peak_lr"], out=group["lr"])
        rows, *lam = self._inputs
        images, targets = trainer.batches.make_from(rows, *lam, side=self._captured_side)
        trainer.learn(images, targets, rows[-1])


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
