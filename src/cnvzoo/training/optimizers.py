"""The learning rate as a function of the step, and nothing else: no state to save, nothing to get out of step.

Which parameter moves how: decay groups, and Muon for the filters.

Muon: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; for convolution filters as
in its use on CIFAR-10, each flattened to [out_channels, in_channels * height * width].
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnvzoo.training.recipe import Optimizer, Schedule


def lr_factor(schedule: Schedule, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """What to multiply the peak learning rate with at `step` (0 to total_steps - 1): above 0, at most 1."""
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total_steps - warmup, 1)
    return 1 - progress


# Newton-Schulz iteration for the nearest semi-orthogonal matrix: coefficients of the quintic, from the source above
_NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NS_STEPS = 5


def build_optimizers(model: nn.Module, config: Optimizer) -> list[torch.optim.Optimizer]:
    """The optimizers of a model, their groups with `peak_lr` set for the schedule to scale.

    Only weights of convolution and linear layers decay. With Muon, it moves those but the first and the last.
    """
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    ids = {id(w) for w in weights}
    rest = [p for p in model.parameters() if id(p) not in ids]
    sgd: dict[str, Any] = {"momentum": config.momentum, "nesterov": config.momentum > 0, "fused": True}
    if config.name == "sgd":
        groups = [_group(weights, config.lr, config.weight_decay), _group(rest, config.lr, 0.0)]
        return [torch.optim.SGD(groups, **sgd)]
    assert config.sgd_lr is not None
    hidden, ends = weights[1:-1], [weights[0], weights[-1]]
    ends_decay = config.weight_decay if config.sgd_weight_decay is None else config.sgd_weight_decay
    groups = [_group(ends, config.sgd_lr, ends_decay), _group(rest, config.sgd_lr, 0.0)]
    muon = Muon([_group(hidden, config.lr, config.weight_decay)], momentum=config.momentum)
    return [muon, torch.optim.SGD(groups, **sgd)]


def _group(params: Sequence[Tensor], lr: float, weight_decay: float) -> dict[str, Any]:
    return {"params": list(params), "lr": lr, "peak_lr": lr, "weight_decay": weight_decay}


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: each filter bank moves by a step whose singular values are all about 1.

    The step has the root-mean-square size `lr * 0.2`, about that of AdamW with the same lr (Liu et al. 2025,
    arXiv:2502.16982, section 2.2). Weight decay is decoupled.

    Args:
        params: parameters or groups; every parameter has two or more dimensions, the first is the output's.
        lr: learning rate.
        momentum: of the Nesterov momentum.
        weight_decay: decoupled; each step multiplies weights by 1 - lr * weight_decay.
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
    """Replace each update [out, ...], seen as a matrix, by about its nearest semi-orthogonal one of RMS 0.2.

    Updates of one shape go through the iteration as one batch, in bfloat16. The columns of a filter bank's matrix are
    in the order of channels_last, which changes nothing but their places, and there saves a copy of each.
    """
    by_shape: dict[torch.Size, list[int]] = defaultdict(list)
    for index, update in enumerate(updates):
        by_shape[update.shape].append(index)
    results = list(updates)
    a, b, c = _NS_COEFFICIENTS
    for indices in by_shape.values():
        banks = torch.stack([updates[i].movedim(1, -1) for i in indices])
        x = banks.flatten(2).bfloat16()
        tall = x.shape[1] > x.shape[2]
        x = x.mT if tall else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(_NS_STEPS):
            gram = x @ x.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, polynomial, x, beta=a)
        x = (x.mT if tall else x).float() * (0.2 * max(x.shape[1], x.shape[2]) ** 0.5)
        for index, direction in zip(indices, x.reshape(banks.shape), strict=True):
            results[index] = direction.movedim(-1, 1)
    return results
