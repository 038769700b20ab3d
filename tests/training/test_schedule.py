"""`lr_factor`: the numbers of short schedules worked out by hand, and the shape of any."""

from __future__ import annotations

import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnvzoo.training import Schedule
from cnvzoo.training.optimizers import lr_factor


def curve(schedule: Schedule, total_steps: int, steps_per_epoch: int) -> list[float]:
    return [lr_factor(schedule, step, total_steps, steps_per_epoch) for step in range(total_steps)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 12 steps, 4 of them warm-up: a fifth, two fifths ... then down over the 8 that are left
        (
            Schedule(name="linear", warmup_epochs=1),
            [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8],
        ),
        (
            Schedule(name="linear", warmup_epochs=1, final=0.5),
            [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 15 / 16, 14 / 16, 13 / 16, 12 / 16, 11 / 16, 10 / 16, 9 / 16],
        ),
        # no warm-up: cosine of 0, 15, 30 ... 165 degrees, moved to 0..1
        (
            Schedule(name="cosine", warmup_epochs=0),
            [0.5 + 0.5 * math.cos(math.radians(degrees)) for degrees in range(0, 180, 15)],
        ),
        (
            Schedule(name="cosine", warmup_epochs=0, final=0.2),
            [0.6 + 0.4 * math.cos(math.radians(degrees)) for degrees in range(0, 180, 15)],
        ),
        # a warm-up of a step and a half; the peak lies between two steps
        (
            Schedule(name="linear", warmup_epochs=0.375),
            [1 / 2.5, 2 / 2.5, *(1 - (k - 1.5) / 10.5 for k in range(2, 12))],
        ),
    ],
)
def test_values_worked_out_by_hand(schedule: Schedule, expected: list[float]) -> None:
    assert curve(schedule, 12, 4) == pytest.approx(expected)


def test_cosine_is_halfway_down_in_the_middle() -> None:
    schedule = Schedule(name="cosine", warmup_epochs=2, final=0.1)
    assert lr_factor(schedule, 20, 220, 10) == 1
    assert lr_factor(schedule, 120, 220, 10) == pytest.approx(0.55)


@given(
    name=st.sampled_from(["linear", "cosine"]),
    epochs=st.integers(1, 30),
    steps_per_epoch=st.integers(1, 20),
    warmup_share=st.floats(0, 0.99),
    final=st.floats(0, 1),
)
def test_every_schedule_rises_to_the_peak_and_falls_to_its_end(
    name: Literal["linear", "cosine"], epochs: int, steps_per_epoch: int, warmup_share: float, final: float
) -> None:
    schedule = Schedule(name=name, warmup_epochs=warmup_share * epochs, final=final)
    factors = curve(schedule, epochs * steps_per_epoch, steps_per_epoch)
    assert all(0 < factor <= 1 for factor in factors)
    top = math.ceil(schedule.warmup_epochs * steps_per_epoch)
    rise, fall = factors[:top], factors[top:]
    assert rise == sorted(rise)
    assert fall == sorted(fall, reverse=True)
    assert not fall or fall[-1] >= final - 1e-12
