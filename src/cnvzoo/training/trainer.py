"""The training loop, and its complete state at any step.

The host does not wait for the device within an epoch: losses are summed on the device and read at the end of the epoch.

On a GPU a whole step, from augmentation to weight update, is captured once as a CUDA graph and replayed with one
launch: networks this small leave a GPU idle while the host launches their hundreds of kernels. The inputs that differ
between steps (random numbers, learning rate factor) are copied to fixed tensors on the device before each replay.
"""

from __future__ import annotations

import functools
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
from cnvzoo.models.compiled import compiles
from cnvzoo.models.norm_act import QuantizedActivation
from cnvzoo.training.device import training_dtype
from cnvzoo.training.distillation import Teacher
from cnvzoo.training.optimizers import build_optimizers, lr_factor
from cnvzoo.training.recipe import Recipe

# A parameter beyond this counts as diverged. Parameters of the published models are below 10. At a million,
# neighbouring float32 values are 1/16 apart and bfloat16 values 4096, so updates of the usual size are lost to
# rounding.
_LARGEST_WEIGHT = 1e6


class TrainingDiverged(CnvzooError):
    """The loss or a weight is not finite, or a parameter is beyond a million: says where, and what to change."""


class Trainer:
    """Trains `model` in place by `recipe`, step by step, from any step on.

    A step depends only on the state before it, the recipe, its seed and the step's number. So training that stops at a
    step and resumes from its `state()` ends with the same bits as training without a stop.

    Args:
        model: the network, on the device that it is trained on.
        batches: of the training set, on the same device.
        recipe: optimizer, schedule, loss and early crops.
        epochs: number of epochs; with fewer than the recipe's, warm-up and early crops are shortened in proportion, the
            crops to a whole number of epochs: a trial of one epoch may have nothing else.
        teacher: for recipes with a teacher.

    Attributes:
        step: number of steps taken so far.
        steps: what takes them: a `CapturedSteps` on a GPU, else a `Steps`.
        total_steps: number of steps of the whole training.
        history: one dict per finished epoch: epoch, loss, lr, seconds; and validation_accuracy, where a run adds it.
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
        share = min(1.0, epochs / recipe.epochs)
        self.schedule = recipe.schedule.model_copy(update={"warmup_epochs": recipe.schedule.warmup_epochs * share})
        self._early_epochs = round(recipe.early_crops.epochs * share) if recipe.early_crops else 0
        self.optimizers = build_optimizers(model, recipe.optimizer)
        self.device = next(model.parameters()).device
        self._dtype = training_dtype(self.device)
        self._forward = torch.compile(model, fullgraph=True, dynamic=False) if _compiles_on_gpu(model) else model
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._loss_sum = torch.zeros((), device=self.device)
        self._epoch_seconds = 0.0
        self.steps = CapturedSteps(self) if self.device.type == "cuda" else Steps(self)

    def train(self, should_stop: Callable[[], bool], after_step: Callable[[Trainer], None]) -> None:
        """Take the remaining steps, calling `after_step(self)` after each; return early when `should_stop()`.

        Raises:
            TrainingDiverged: at the end of an epoch, as `check_weights`, or when its mean loss is not finite.
        """
        self.model.train()
        while self.step < self.total_steps and not should_stop():
            began = time.monotonic()
            self.take_step()
            self._epoch_seconds += time.monotonic() - began
            if self.step % self.steps_per_epoch == 0:
                self._end_epoch()
            after_step(self)

    def take_step(self) -> None:
        """Take the next step."""
        self.steps.take(*divmod(self.step, self.steps_per_epoch))
        self.step += 1

    @property
    def seconds(self) -> float:
        """Seconds of all finished epochs, and of precomputing the teacher's logits."""
        precomputed = self.teacher.precomputed if self.teacher else None
        return sum(epoch["seconds"] for epoch in self.history) + (precomputed.seconds if precomputed else 0.0)

    @property
    def compiles(self) -> bool:
        """Whether the first step compiles code, which may take a minute."""
        return self._forward is not self.model or compiles(self.device)

    def crop_side(self, epoch: int) -> int | None:
        """Side in pixels of the crops that an epoch trains on; None for whole images."""
        crops = self.recipe.early_crops
        return crops.side if crops and epoch < self._early_epochs else None

    def work(self, step: int) -> float:
        """Cost of the first `step` steps, in steps on whole images; a step on crops costs their share of the pixels."""
        crops, early_steps = self.recipe.early_crops, min(step, self._early_epochs * self.steps_per_epoch)
        share = (crops.side / self.batches.preprocessing.size) ** 2 if crops else 1.0
        return early_steps * share + step - early_steps

    def update_weights(self, images: Tensor, targets: Tensor, logit_rows: Tensor) -> None:
        """Forward pass, loss, backward pass and optimizer step of one batch, without waiting for the device.

        Args:
            images: float32 [B, C, S, S].
            targets: int64 [B], or float32 [B, K] with mixup.
            logit_rows: int64 [B], rows of the images in the teacher's precomputed logits.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits = self._forward(images)
        logits = logits.float()
        loss = F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing)
        if self.teacher:
            with self.autocast():
                loss = self.teacher.loss(images, logit_rows, logits, loss)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self._loss_sum += loss.detach()

    def autocast(self) -> torch.autocast:
        """The context of forward passes in training: bfloat16 autocast, or none where `training_dtype` is float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16)

    def lr_factor(self, step: int) -> float:
        """Learning rate of a step as a share of the peak learning rate."""
        return lr_factor(self.schedule, step, self.total_steps, self.steps_per_epoch)

    def _end_epoch(self) -> None:
        began = time.monotonic()
        loss = float(self._loss_sum) / self.steps_per_epoch  # the host waits for the device here
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
        """Raise TrainingDiverged if a parameter or buffer is not finite, or a parameter is beyond a million.

        Args:
            when: ends the sentence of the message, such as `in epoch 3`.
        """
        parameters = dict(self.model.named_parameters())
        values = parameters | {name: t for name, t in self.model.named_buffers() if t.is_floating_point()}
        values = {name: t for name, t in values.items() if t.numel()}  # an empty tensor has no largest value
        maxima = torch.stack(torch._foreach_norm([t.detach() for t in values.values()], math.inf)).tolist()
        for name, maximum in zip(values, maxima, strict=True):
            if not math.isfinite(maximum):
                raise self._diverged(f"{name} has values that are not finite {when}")
            if name in parameters and maximum > _LARGEST_WEIGHT:
                raise self._diverged(f"{name} has grown to {maximum:.2g} {when}")

    def _diverged(self, what: str) -> TrainingDiverged:
        return TrainingDiverged(
            f"{self.recipe.run_name}: {what}: "
            f"lower optimizer.lr ({self.recipe.optimizer.lr}) or lengthen schedule.warmup_epochs"
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next steps depend on: tensors by name, and JSON values."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, optimizer in enumerate(self.optimizers):
            for number, values in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{number}.{k}": v for k, v in values.items() if v is not None}
        tensors["loss_sum"] = self._loss_sum
        return tensors, {"step": self.step, "history": self.history, "epoch_seconds": self._epoch_seconds}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Resume from the `state()` of a trainer of the same model and recipe."""

        def tensors_under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.model.load_state_dict(tensors_under("model."), strict=True)
        for index, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in tensors_under(f"optimizer.{index}.").items():
                number, key = name.split(".", 1)
                # the layout of the weights: optimizers convert another layout in every step; a copy, since these are
                # mapped from the file, which cannot be replaced on Windows while they are
                layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
                state.setdefault(int(number), {})[key] = tensor.clone(memory_format=layout)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self._loss_sum.copy_(tensors["loss_sum"])
        self.step, self.history = values["step"], values["history"]
        self._epoch_seconds = values["epoch_seconds"]


def _compiles_on_gpu(model: nn.Module) -> bool:
    """Whether torch.compile pays: for fake quantization on a GPU, which is a dozen small kernels per layer.

    For the deep float networks compilation takes longer than it saves, as it is repeated for each size of images.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    return on_gpu and any(isinstance(module, QuantizedActivation) for module in model.modules())


class Steps:
    """Takes the steps of a trainer, kernel by kernel."""

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
        self._plan = self._trainer.batches.plan(epoch, self._trainer.crop_side(epoch))

    def _take(self, epoch: int, index: int) -> None:
        trainer = self._trainer
        factor = trainer.lr_factor(epoch * trainer.steps_per_epoch + index)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
        images, targets = trainer.batches.make(self._plan, index)
        trainer.update_weights(images, targets, self._plan.rows[index, -1])


class CapturedSteps(Steps):
    """Captures a step of a trainer as a CUDA graph and takes every step by replaying it.

    A graph has fixed shapes, so a new one is captured when the size of the images changes.

    Args:
        trainer: whose steps are taken.
        capture: given the function of a step, calls it any number of times and returns a function that replays it;
            by default a CUDA graph. Tests replace it to run on a CPU.
    """

    def __init__(
        self, trainer: Trainer, capture: Callable[[Callable[[], None]], Callable[[], None]] | None = None
    ) -> None:
        super().__init__(trainer)
        self._capture = capture or functools.partial(_capture_cuda_graph, device=trainer.device)
        self._replay: Callable[[], None] | None = None
        self._captured_side = 0

    def _begin(self, epoch: int) -> None:
        super()._begin(epoch)
        trainer, steps = self._trainer, self._trainer.steps_per_epoch
        if self._plan.side != self._captured_side:
            self._replay = None  # frees the memory of the graph before the next capture
        factors = [trainer.lr_factor(epoch * steps + index) for index in range(steps)]
        self._factors = torch.tensor(factors, dtype=torch.float32).to(trainer.device)

    def _take(self, epoch: int, index: int) -> None:
        if self._replay is None:
            self._capture_step(index)
        self._copy_inputs(index)
        assert self._replay is not None
        self._replay()

    def _capture_step(self, index: int) -> None:
        """Capture a step, and restore the state that the steps of the capture changed."""
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
            else:  # momentum of an optimizer that had not taken a step
                tensor.zero_()

    def _step_inputs(self, index: int) -> tuple[Tensor, ...]:
        plan = self._plan
        return (plan.rows[index],) if plan.lam is None else (plan.rows[index], plan.lam[index])

    def _copy_inputs(self, index: int) -> None:
        self._factor.copy_(self._factors[index])
        for captured, value in zip(self._inputs, self._step_inputs(index), strict=True):
            captured.copy_(value)

    def _take_from_inputs(self) -> None:
        trainer = self._trainer
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                torch.mul(self._factor, group["peak_lr"], out=group["lr"])
        rows, *lam = self._inputs
        images, targets = trainer.batches.make_from(rows, *lam, side=self._captured_side)
        trainer.update_weights(images, targets, rows[-1])


_WARM_UP_STEPS = 3  # compilers, cuDNN and the allocator need a few before a capture
_one_capture = threading.Lock()


def _capture_cuda_graph(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    with torch.cuda.device(device):  # streams and graphs are made on the current device, which may be another
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_STEPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads may train and capture other runs
        with _one_capture, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    return graph.replay
