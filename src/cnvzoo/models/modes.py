"""Using a model and restoring it: its modes, device and memory layout are as before afterwards.

`nn.Module.train(was_training)` would give every layer the mode of the root, so a frozen BatchNorm would be unfrozen;
and a model that was moved to channels_last has a state_dict that safetensors refuses to save.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cnvzoo.errors import ModelError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating-point parameter; float32 without one."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def memory_format_of(model: nn.Module) -> torch.memory_format:
    """What `model.to(memory_format=)` takes: channels_last, which torch refuses for tensors of five dimensions."""
    tensors = (*model.parameters(), *model.buffers())
    return torch.preserve_format if any(t.dim() == 5 for t in tensors) else torch.channels_last


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every layer is in eval mode; afterwards each has the mode that it had, also after an error.

    Raises:
        ModelError: the model refuses to change its mode, as the programs of torch.export do.
    """
    before = [(module, module.training) for module in model.modules()]
    try:
        try:
            model.eval()
        except NotImplementedError:
            raise ModelError(
                f"{type(model).__name__} has no eval mode, as a program of torch.export: give the model that it was "
                "exported from"
            ) from None
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def moved(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the model is on `device`, in channels_last where it can be; afterwards it has the tensors that it had.

    It keeps them meanwhile, so nothing is copied back, and tensors that share their memory still do.
    """
    parameters = [(p, p.data) for p in model.parameters()]
    gradients = [(p, p.grad, p.grad.data) for p, _ in parameters if p.grad is not None]
    registered = [
        (tensors, name, tensor)
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
    ]
    try:
        target: Any = model
        target.to(device, memory_format=memory_format_of(model))
        yield
    finally:
        for tensors, name, tensor in registered:
            tensors[name] = tensor  # type: ignore[assignment]
        for parameter, data in parameters:
            parameter.data = data
        for parameter, gradient, data in gradients:
            gradient.data = data
            parameter.grad = gradient
