"""Schedules: the field's numbers at key points, torch's schedulers as oracle, and properties; what is due at a step."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import small_run as small
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from resnet_dist.config.loading import bare_profile
from resnet_dist.config.recipe import (
    CosineSchedule,
    EarlyStopConfig,
    LinearSchedule,
    PlateauSchedule,
    ScheduleConfig,
    StepSchedule,
    Warmup,
    steps_per_epoch,
)
from resnet_dist.errors import UserError
from resnet_dist.training.schedule import EarlyStop, Plateau, RunPlan, lr_at, plan_run


def curve(schedule: ScheduleConfig, base_lr: float, per_epoch: int, epochs: int) -> list[float]:
    total = per_epoch * epochs
    return [
        lr_at(step, schedule, base_lr=base_lr, steps_per_epoch=per_epoch, total_steps=total) for step in range(total)
    ]


def torch_curve(make: type[lr_scheduler.LRScheduler], base_lr: float, num_steps: int, **options: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base_lr)
    scheduler = make(optimizer, **options)
    rates = []
    for _ in range(num_steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def step_schedule(*milestone_fractions: float, warmup: Warmup | None = None) -> StepSchedule:
    return StepSchedule(kind="step", milestone_fractions=milestone_fractions, warmup=warmup or Warmup())


def test_steps_per_epoch() -> None:
    assert steps_per_epoch(1_281_167, 256) == 5_004
    assert steps_per_epoch(50_000, 128) == 390
    assert steps_per_epoch(128, 128) == 1
    with pytest.raises(UserError, match=r"global_batch_size \(129\).*128 samples"):
        steps_per_epoch(128, 129)


def test_goyal_large_batch() -> None:
    """Batch 8,192: 3.2, five epochs up from 0.1, a tenth at epochs 30, 60 and 80 of 90."""
    schedule = step_schedule(30 / 90, 60 / 90, 80 / 90, warmup=Warmup(epochs=5, start_factor=1 / 32))
    rates = curve(schedule, 3.2, per_epoch=156, epochs=90)
    assert rates[0] == pytest.approx(0.1)
    assert rates[390] == pytest.approx((0.1 + 3.2) / 2)
    assert rates[780] == rates[30 * 156 - 1] == 3.2
    assert [rates[epoch * 156] for epoch in (30, 60, 80)] == pytest.approx([0.32, 0.032, 0.0032])
    assert [rates[epoch * 156 - 1] for epoch in (60, 80, 90)] == pytest.approx([0.32, 0.032, 0.0032])
    assert np.diff(rates[:781]) == pytest.approx((3.2 - 0.1) / 780)


def test_ffcv_triangle() -> None:
    """ffcv-imagenet's rn50_88: linear from 0 to 1.7 over two epochs, then linear to 0."""
    rates = curve(LinearSchedule(kind="linear", warmup=Warmup(epochs=2)), 1.7, per_epoch=312, epochs=88)
    steps = np.arange(88 * 312)
    np.testing.assert_allclose(rates, 1.7 * np.interp(steps / 312, [0, 2, 88], [0, 1, 0]), atol=1e-12)


def test_torchvision_v2() -> None:
    """lr 0.5, 600 epochs, five epochs up from 0.01 of it, cosine to 0 (there by epoch, here by step)."""
    schedule = CosineSchedule(kind="cosine", warmup=Warmup(epochs=5, start_factor=0.01))
    rates = curve(schedule, 0.5, per_epoch=10, epochs=600)
    warmup = torch_curve(lr_scheduler.LinearLR, 0.5, 50, start_factor=0.01, total_iters=50)
    cosine = torch_curve(lr_scheduler.CosineAnnealingLR, 0.5, 5950, T_max=5950)
    np.testing.assert_allclose(rates, warmup + cosine, rtol=1e-9, atol=1e-12)


def test_steps_and_a_cosine_to_a_floor_are_torchs() -> None:
    # 39 steps: milestones at round(19.5) = 20 and round(29.25) = 29
    expected = torch_curve(lr_scheduler.MultiStepLR, 0.1, 39, milestones=[20, 29])
    np.testing.assert_allclose(curve(step_schedule(0.5, 0.75), 0.1, per_epoch=13, epochs=3), expected, rtol=1e-12)
    cosine = CosineSchedule(kind="cosine", final_factor=0.1)
    expected = torch_curve(lr_scheduler.CosineAnnealingLR, 0.2, 63, T_max=63, eta_min=0.02)
    np.testing.assert_allclose(curve(cosine, 0.2, per_epoch=7, epochs=9), expected, rtol=1e-12)


def test_warmup_of_a_part_of_an_epoch_and_a_constant_one() -> None:
    rates = curve(step_schedule(0.5, warmup=Warmup(epochs=0.4, start_factor=0.5)), 1.0, per_epoch=10, epochs=2)
    assert rates == pytest.approx([0.5, 0.625, 0.75, 0.875] + [1.0] * 6 + [0.1] * 10)
    # He et al. 2015, section 4.2: 110 layers, 0.01 for about 400 steps, then 0.1
    warmup = Warmup(epochs=400 / 390, start_factor=0.1, shape="constant")
    rates = curve(step_schedule(0.5, 0.75, warmup=warmup), 0.1, per_epoch=390, epochs=164)
    assert rates[:401] == pytest.approx([0.01] * 400 + [0.1])


def test_a_warmup_as_long_as_the_run_is_the_users_mistake() -> None:
    schedule = CosineSchedule(kind="cosine", warmup=Warmup(epochs=5))
    with pytest.raises(UserError, match=r"schedule\.warmup\.epochs \(5\).*train\.total_epochs \(5\)"):
        lr_at(0, schedule, base_lr=0.1, steps_per_epoch=10, total_steps=50)
    assert lr_at(0, schedule, base_lr=0.1, steps_per_epoch=10, total_steps=51) == 0.0


@pytest.mark.parametrize("step", [-1, 50])
def test_a_step_outside_the_run_is_an_error(step: int) -> None:
    with pytest.raises(ValueError, match=r"0 \.\. 49"):
        lr_at(step, CosineSchedule(kind="cosine"), base_lr=0.1, steps_per_epoch=10, total_steps=50)


warmups = st.builds(Warmup, epochs=st.floats(0, 3), start_factor=st.floats(0, 1))
smooth_schedules = st.one_of(
    st.builds(CosineSchedule, kind=st.just("cosine"), final_factor=st.floats(0, 1), warmup=warmups),
    st.builds(LinearSchedule, kind=st.just("linear"), final_factor=st.floats(0, 1), warmup=warmups),
)
step_schedules = st.builds(
    StepSchedule,
    kind=st.just("step"),
    milestone_fractions=st.lists(st.floats(0.01, 0.99), unique=True, max_size=4).map(lambda f: tuple(sorted(f))),
    gamma=st.floats(0.01, 0.99),
    warmup=warmups,
)


@given(smooth_schedules, st.floats(1e-3, 10), st.integers(1, 12), st.integers(4, 15))
def test_smooth_schedules_have_no_jump(
    schedule: CosineSchedule | LinearSchedule, lr: float, per_epoch: int, epochs: int
) -> None:
    rates = curve(schedule, lr, per_epoch, epochs)
    warmup_steps, slack = round(schedule.warmup.epochs * per_epoch), 1e-9 * lr
    steepest = math.pi / 2 if schedule.kind == "cosine" else 1.0
    largest_fall = lr * steepest * (1 - schedule.final_factor) / (len(rates) - warmup_steps)
    largest_rise = lr * (1 - schedule.warmup.start_factor) / warmup_steps if warmup_steps else 0.0
    changes = np.diff(rates)
    assert all(0 <= rate <= lr + slack for rate in rates)
    assert np.all(changes[:warmup_steps] >= -slack)
    assert np.all(changes[:warmup_steps] <= largest_rise + slack)
    assert np.all(changes[warmup_steps:] <= slack)
    assert np.all(changes[warmup_steps:] >= -largest_fall - slack)
    assert rates[warmup_steps] == pytest.approx(lr)
    assert 0 <= rates[-1] - lr * schedule.final_factor + slack <= largest_fall + 2 * slack


@given(step_schedules, st.floats(1e-3, 10), st.integers(1, 12), st.integers(4, 15))
def test_step_schedules_take_the_listed_rates_only(
    schedule: StepSchedule, lr: float, per_epoch: int, epochs: int
) -> None:
    rates = curve(schedule, lr, per_epoch, epochs)
    warmup_steps, total = round(schedule.warmup.epochs * per_epoch), len(rates)
    assert all(0 <= rate <= lr for rate in rates)
    drops = [round(fraction * total) for fraction in schedule.milestone_fractions]
    for step in range(warmup_steps, total):
        assert rates[step] == pytest.approx(lr * schedule.gamma ** len([d for d in drops if d <= step]))


def test_a_plateau_counts_evaluations_without_a_new_best_and_falls_by_its_drops_alone() -> None:
    schedule = PlateauSchedule(kind="plateau", patience=2, min_improvement=0.5, max_drops=2)
    drops, plateau = [], Plateau()
    for error in [50.0, 49.6, 49.5, 49.4, 49.2, 48.0, 48.0, 48.0, 48.0, 48.0, 10.0]:
        plateau = plateau.after(error, schedule)
        drops.append(plateau.num_drops)
    #      best  .1   best  .1   .3   best  -    -    -    -  best; max_drops is reached
    assert drops == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert plateau.best_error == 10.0
    schedule = PlateauSchedule(kind="plateau", warmup=Warmup(epochs=1, start_factor=0.5))
    rates = [
        lr_at(step, schedule, base_lr=0.1, steps_per_epoch=2, total_steps=8, num_drops=drops)
        for step, drops in ((0, 0), (1, 0), (2, 0), (7, 0), (7, 2))
    ]
    assert rates == pytest.approx([0.05, 0.075, 0.1, 0.1, 0.001])


@pytest.mark.parametrize(
    ("metric", "min_delta", "values", "stops"),
    [
        ("val/loss", 0.0, [3.0, 2.0, 2.0, 1.9, 1.9, 2.5], [0, 0, 0, 0, 0, 1]),  # an equal one is no new best
        ("val/loss", 0.5, [3.0, 2.6, 2.5, 2.4, 2.1], [0, 0, 0, 0, 1]),
        ("val/top1", 0.0, [50.0, 60.0, 55.0, 61.0, 61.0, 60.0], [0, 0, 0, 0, 0, 1]),
    ],
)
def test_an_early_stop_counts_evaluations_without_a_new_best(
    metric: Any, min_delta: float, values: list[float], stops: list[int]
) -> None:
    config, progress, stopped = EarlyStopConfig(metric=metric, patience=2, min_delta=min_delta), EarlyStop(), []
    for step, value in enumerate(values, 1):
        progress = progress.after(value, step, config)
        stopped.append(bool(progress.reason(config)))
    assert stopped == [bool(stop) for stop in stops]
    assert f"{metric} was best at step {progress.best_step} ({progress.best:.5g})" in progress.reason(config)
    assert not progress.reason(None)


def test_needs_no_torch() -> None:
    code = "import sys, resnet_dist.training.schedule; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# Cooldowns


def cooldown_plan(*, first_step: int, cooldown_steps: int, total_steps: int = 40) -> RunPlan:
    """Four steps an epoch."""
    return RunPlan(
        steps_per_epoch=4,
        total_steps=total_steps,
        last_step=first_step + cooldown_steps,
        eval_every_epochs=1,
        save_every_epochs=1,
        save_every_steps=None,
        log_every_steps=1,
        first_step=first_step,
        cooldown_steps=cooldown_steps,
    )


@pytest.mark.parametrize(
    ("schedule", "first_step", "num_drops", "at_fork"),
    [
        (LinearSchedule(kind="linear"), 10, 0, 0.4 * 30 / 40),
        (CosineSchedule(kind="cosine"), 20, 0, 0.4 / 2),
        (CosineSchedule(kind="cosine", warmup=Warmup(epochs=5)), 5, 0, 0.4 * 5 / 20),
        (step_schedule(0.25), 10, 0, 0.04),
        (step_schedule(0.25), 9, 0, 0.4),
        (PlateauSchedule(kind="plateau"), 10, 2, 0.004),
        (LinearSchedule(kind="linear"), 40, 0, 0.4 * 1 / 40),  # a run at its end, from its last rate
    ],
)
def test_a_cooldown_goes_to_zero_from_the_schedules_rate_at_the_fork(
    schedule: ScheduleConfig, first_step: int, num_drops: int, at_fork: float
) -> None:
    plan = cooldown_plan(first_step=first_step, cooldown_steps=4)
    config = small.recipe(schedule=schedule.model_dump(), optim={"lr": 0.4})
    rates = [plan.learning_rate(step, config, num_drops) for step in range(first_step, plan.last_step)]
    assert rates == pytest.approx([at_fork, at_fork * 3 / 4, at_fork * 2 / 4, at_fork / 4])


@given(step=st.integers(0, 60), cooldown=st.floats(0.001, 1))
def test_a_cooldown_runs_its_share_of_the_steps_whatever_else_would_end_the_run(step: int, cooldown: float) -> None:
    fork = {"checkpoint": "parent", "schedule": "cooldown", "cooldown": cooldown, "step": step}
    config = small.recipe(train={"total_epochs": 10, "max_steps": 7}, fork=fork)
    plan = plan_run(config, bare_profile((), workers=1, cpus_per_worker=1), num_train_samples=4 * 24)
    num_steps = plan.last_step - plan.first_step
    assert (plan.first_step, plan.total_steps) == (step, 40)
    assert num_steps == plan.cooldown_steps >= 1
    assert abs(num_steps - cooldown * step) <= (0.5 if num_steps > 1 else 1)
    assert plan.evaluation_due(plan.last_step)
    assert plan.checkpoint_due(plan.last_step)


# What is due at a step


def test_what_is_due_where() -> None:
    plan = RunPlan(
        steps_per_epoch=5,
        total_steps=20,
        last_step=18,
        eval_every_epochs=2,
        save_every_epochs=1,
        save_every_steps=3,
        log_every_steps=4,
    )
    steps = range(plan.last_step + 1)
    assert [s for s in steps if plan.evaluation_due(s)] == [10, 18]
    assert [s for s in steps if plan.checkpoint_due(s)] == [3, 5, 6, 9, 10, 12, 15, 18]
    assert [s for s in steps if s and plan.point_due(s)] == [3, 4, 5, 6, 8, 9, 10, 12, 15, 16, 18]
    assert [plan.epoch_ends_at(s) for s in (0, 4, 5, 16)] == [5, 5, 10, 18]


@given(
    st.builds(
        RunPlan,
        steps_per_epoch=st.integers(1, 12),
        total_steps=st.just(60),
        last_step=st.integers(1, 60),
        eval_every_epochs=st.integers(1, 4),
        save_every_epochs=st.integers(1, 4),
        save_every_steps=st.none() | st.integers(1, 9),
        log_every_steps=st.integers(1, 9),
    )
)
def test_every_plan_logs_what_it_saves_and_ends_evaluated_and_saved(plan: RunPlan) -> None:
    last = plan.last_step
    assert plan.evaluation_due(last)
    assert plan.checkpoint_due(last)
    assert not plan.evaluation_due(0)
    assert not plan.checkpoint_due(0)
    assert all(plan.point_due(step) for step in range(last + 1) if plan.checkpoint_due(step))
    assert all(step < plan.epoch_ends_at(step) <= last for step in range(last))
    assert all(plan.point_due(plan.epoch_ends_at(step)) for step in range(last))
