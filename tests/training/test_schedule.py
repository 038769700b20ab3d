"""`lr_factor`: the numbers of short schedules worked out by hand, and the shape of any."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnvzoo.training import Schedule
from cnvzoo.training.optimizers import lr_factor


def curve(schedule: Schedule, total_steps: int, steps_per_epoch: int) -> list[float]:
    return [lr_factor(schedule, step, total_steps, steps_per_epoch) for step in range(total_steps)]


@pytest.mark.parametrize(
    ("warmup_epochs", "expected"),
    [
        # 12 steps, 4 of them warm-up: a fifth, two fifths ... then down over the 8 that are left
        (1, [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        (0, [step / 12 for step in range(12, 0, -1)]),
        # a warm-up of a step and a half; the peak lies between two steps
        (0.375, [1 / 2.5, 2 / 2.5, *(1 - (k - 1.5) / 10.5 for k in range(2, 12))]),
    ],
)
def test_values_worked_out_by_hand(warmup_epochs: float, expected: list[float]) -> None:
    assert curve(Schedule(warmup_epochs=warmup_epochs), 12, 4) == pytest.approx(expected)


@given(epochs=st.integers(1, 30), steps_per_epoch=st.integers(1, 20), warmup_share=st.floats(0, 0.99))
def test_every_schedule_rises_to_the_peak_and_falls_towards_zero(
    epochs: int, steps_per_epoch: int, warmup_share: float
) -> None:
    schedule = Schedule(warmup_epochs=warmup_share * epochs)
    factors = curve(schedule, epochs * steps_per_epoch, steps_per_epoch)
    assert all(0 < factor <= 1 for factor in factors)
    top = math.ceil(schedule.warmup_epochs * steps_per_epoch)
    rise, fall = factors[:top], factors[top:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
