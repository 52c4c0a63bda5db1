"""Schedules against their closed forms and PyTorch's own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import MultiStepLR, OneCycleLR

from compress_search.recipe import SCHEDULES, FineTune
from compress_search.training import schedules
from compress_search.training.schedules import learning_rate_factor


def factors(steps, **settings):
    return [learning_rate_factor(step, steps, FineTune(**settings)) for step in range(steps)]


def rates_of(make_scheduler, steps):
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make_scheduler(optimiser)
    rates = []
    for _ in range(steps):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return rates


def test_every_schedule_that_can_be_named_exists():
    assert set(schedules.SCHEDULES) == set(SCHEDULES)


def test_the_cosine_rises_linearly_then_falls():
    found = factors(10, warmup=0.2)
    assert found[:3] == [1 / 3, 2 / 3, 1]
    assert found[6] == pytest.approx(0.5)
    assert found[9] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)


@given(steps=st.integers(1, 300), warmup=st.floats(0, 1, exclude_max=True))
def test_the_cosine_peaks_once_and_never_stands_still(steps, warmup):
    found = factors(steps, warmup=warmup)
    peak = found.index(1)
    assert peak == min(round(warmup * steps), steps - 1)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    assert len(set(found[peak:])) == steps - peak
    assert min(found) > 0


@pytest.mark.parametrize(("steps", "warmup"), [(50, 0.3), (40, 0.1), (7, 0.5)])
def test_one_cycle_is_that_of_pytorch(steps, warmup):
    # PyTorch says by which share of the steps the peak is reached; here it is said which step it is.
    share = (round(warmup * steps) + 1) / steps
    # After the last step, PyTorch's scheduler refuses to go on.
    wanted = rates_of(
        lambda o: OneCycleLR(o, max_lr=1.0, total_steps=steps, pct_start=share, cycle_momentum=False),
        steps - 1,
    )
    assert factors(steps, schedule="one_cycle", warmup=warmup)[: steps - 1] == pytest.approx(wanted)


def test_milestones_are_not_a_step_late_for_rounding():
    found = factors(25, schedule="multi_step", warmup=0.0, milestones=(0.28,), gamma=0.1)
    assert 0.28 * 25 > 7
    assert found == [1.0] * 7 + [0.1] * 18


def test_multi_step_is_that_of_pytorch():
    wanted = rates_of(lambda o: MultiStepLR(o, milestones=[20, 30], gamma=0.2), 40)
    found = factors(40, schedule="multi_step", warmup=0.0, milestones=(0.75, 0.5), gamma=0.2)
    assert found == pytest.approx(wanted)


@given(
    steps=st.integers(1, 100),
    warmup=st.floats(0, 1, exclude_max=True),
    schedule=st.sampled_from(SCHEDULES),
)
def test_every_factor_is_a_share_and_one_is_reached(steps, warmup, schedule):
    found = factors(steps, schedule=schedule, warmup=warmup, milestones=(0.999,))
    assert all(0 < factor <= 1 for factor in found)
    assert max(found) == pytest.approx(1)
