"""Optimizers and learning rate schedule: SGD, or Muon for hidden weights with SGD for all other parameters.

Muon: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
(https://kellerjordan.github.io/posts/muon). torch.optim.Muon takes matrices only, and convolutional networks consist of
filters [out, in, height, width]. So this Muon orthogonalises each filter bank as a matrix [out, in * height * width],
as in the authors' CIFAR-10 runs, and batches the iteration over weights of one shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnvzoo.errors import ModelError
from cnvzoo.training.device import training_dtype
from cnvzoo.training.recipe import Optimizer, Schedule


def lr_factor(schedule: Schedule, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """Learning rate at `step` (0 to total_steps - 1) as a share of the peak: above 0, at most 1.

    A function of the step alone, so there is no scheduler state to save.
    """
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return 1 - progress


# Newton-Schulz iteration for the nearest semi-orthogonal matrix: coefficients of the quintic by Jordan et al.
_NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NS_STEPS = 5


def build_optimizers(model: nn.Module, config: Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers of a model. Each group has a key `peak_lr`, which the schedule scales.

    Weight decay applies to the weights of convolution and linear layers only, if they are parameters themselves. With
    `muon`, Muon updates those except the first, the last and those of grouped layers (depthwise ones), and SGD
    everything else. The filters of a grouped layer do not form a matrix that maps one vector to another: each group has
    inputs of its own.

    Raises:
        ModelError: with `muon`, the model has fewer than two convolution or linear layers with weights of their own.
    """
    by_weight: dict[int, nn.Conv2d | nn.Linear] = {}
    for layer in model.modules():
        # a weight that is computed from others, as parametrizations do, is another tensor at each access
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer._parameters.get("weight") is not None:
            by_weight.setdefault(id(layer.weight), layer)  # layers may share a weight
    layers = list(by_weight.values())
    weights = [layer.weight for layer in layers]
    ids = {id(w) for w in weights}
    rest = [p for p in model.parameters() if id(p) not in ids]
    sgd: dict[str, Any] = {"momentum": config.momentum, "nesterov": config.momentum > 0, "fused": True}
    if config.name == "sgd":
        groups = [_group(weights, config.lr, config.weight_decay), _group(rest, config.lr, 0.0)]
        return [torch.optim.SGD(groups, **sgd)]
    assert config.sgd_lr is not None
    if len(layers) < 2:
        raise ModelError(
            f"{type(model).__name__} has {len(layers)} convolution or linear layers: Muon is for the hidden ones of "
            "several whose weight is a parameter, so use `optimizer: {name: sgd}`"
        )
    hidden = [layer.weight for layer in layers[1:-1] if not _is_grouped(layer)]
    others = [weights[0], weights[-1], *(layer.weight for layer in layers[1:-1] if _is_grouped(layer))]
    sgd_decay = config.weight_decay if config.sgd_weight_decay is None else config.sgd_weight_decay
    groups = [_group(others, config.sgd_lr, sgd_decay), _group(rest, config.sgd_lr, 0.0)]
    muon = Muon([_group(hidden, config.lr, config.weight_decay)], momentum=config.momentum)
    return [muon, torch.optim.SGD(groups, **sgd)]


def _is_grouped(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups > 1


def _group(params: Sequence[Tensor], lr: float, weight_decay: float) -> dict[str, Any]:
    return {"params": list(params), "lr": lr, "peak_lr": lr, "weight_decay": weight_decay}


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose updates are orthogonalised: all singular values of an update are about equal.

    Updates have a root mean square of about `0.2 * lr` (Liu et al. 2025, arXiv:2502.16982, section 2.2). Unlike
    torch.optim.Muon, which takes matrices only, it also takes convolution filters.

    Args:
        params: parameters or groups; a parameter has at least two dimensions, output channels first.
        lr: learning rate.
        momentum: Nesterov momentum, 0 to below 1.
        weight_decay: decoupled: each step multiplies weights by 1 - lr * weight_decay.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            updates = torch._foreach_lerp(grads, buffers, group["momentum"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            directions = orthogonalize(updates)
            torch._foreach_mul_(directions, group["lr"])
            torch._foreach_sub_(params, directions)


def orthogonalize(updates: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """Approximate the nearest semi-orthogonal matrix of each update [out, ...], scaled to a root mean square of 0.2.

    An update is taken as a matrix [out, rest]. Updates of one shape are iterated as one batch, in `training_dtype`. The
    columns of a filter bank are in the order of channels_last: that permutes the columns of the result alike, and saves
    a copy.
    """
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, update in enumerate(updates):
        by_shape[update.shape].append(index)
    results = list(updates)
    a, b, c = _NS_COEFFICIENTS
    for indices in by_shape.values():
        stacked = torch.stack([updates[i].movedim(1, -1) for i in indices])
        x = stacked.flatten(2).to(training_dtype(stacked.device))
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(_NS_STEPS):
            gram = x @ x.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
        x = (x.mT if tall else x).float() * (0.2 * max(x.shape[1], x.shape[2]) ** 0.5)
        for index, direction in zip(indices, x.reshape(stacked.shape), strict=True):
            results[index] = direction.movedim(-1, 1)
    return results
