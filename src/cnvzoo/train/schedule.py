"""The learning rate as a function of the step, and nothing else: no state to save, nothing to get out of step."""

from __future__ import annotations

import math

from .recipe import Schedule


def lr_factor(schedule: Schedule, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """What to multiply the peak learning rate with at `step` (0 to total_steps - 1): above 0, at most 1."""
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total_steps - warmup, 1)
    decay = 1 - progress if schedule.name == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return schedule.final + (1 - schedule.final) * decay
