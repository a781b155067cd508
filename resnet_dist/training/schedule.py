"""The learning rate as a pure function of the step (on a plateau also of the drops so far), and the counts it needs."""

from __future__ import annotations

import math

from resnet_dist.config.recipe_optim import ScheduleConfig
from resnet_dist.errors import UserError


def steps_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Whole global batches in one epoch; the incomplete last one is dropped. UserError if there is not even one."""
    if num_samples < global_batch_size:
        raise UserError(
            f"train.global_batch_size ({global_batch_size}) is larger than the training set ({num_samples} samples): "
            f"an epoch would have no step; lower it to {num_samples} or below"
        )
    return num_samples // global_batch_size


def total_steps(steps_per_epoch: int, total_epochs: int) -> int:
    """Optimizer steps of the whole run, over which the schedule runs."""
    return steps_per_epoch * total_epochs


def lr_at(
    step: int, schedule: ScheduleConfig, *, base_lr: float, steps_per_epoch: int, total_steps: int, num_drops: int = 0
) -> float:
    """The learning rate that optimizer step number `step` uses; steps count from 0, so 0 <= step < total_steps.

    With T = total_steps, W = round(warmup.epochs * steps_per_epoch), s = warmup.start_factor, f = final_factor and
    p = max(0, step - W) / (T - W), the rate is base_lr times

        warm-up   s + (1 - s) * step / W         before step W (1 afterwards): step 0 uses s, step W the whole rate
                                                 (Goyal et al. 2017, section 2.2; torch's LinearLR);
                                                 with warmup.shape "constant", s until step W
        step      gamma ** (number of milestones, in shares of T, with step >= round(share * T)); counted from
                  step 0, warm-up included (torch's MultiStepLR)
        plateau   gamma ** num_drops, the drops that the evaluations so far have decided (`plateau.py`)
        cosine    f + (1 - f) * (1 + cos(pi * p)) / 2   (torch's CosineAnnealingLR)
        linear    1 - (1 - f) * p

    the first multiplied by one of the others. p would be 1 at step T, which is never taken: no step is spent at rate 0.
    Raises UserError if the warm-up leaves no step, ValueError if `step` lies outside the run.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} lies outside the run's steps 0 .. {total_steps - 1}")
    warmup_steps = round(schedule.warmup.epochs * steps_per_epoch)
    if warmup_steps >= total_steps:
        raise UserError(
            f"schedule.warmup.epochs ({schedule.warmup.epochs:g}) takes {warmup_steps} of the run's {total_steps} "
            f"steps; make it shorter than train.total_epochs ({total_steps / steps_per_epoch:g})"
        )
    progress = max(0, step - warmup_steps) / (total_steps - warmup_steps)
    match schedule.kind:
        case "step":
            num_drops = sum(step >= round(fraction * total_steps) for fraction in schedule.milestone_fractions)
            factor = schedule.gamma**num_drops
        case "plateau":
            factor = schedule.gamma**num_drops
        case "cosine":
            factor = schedule.final_factor + (1 - schedule.final_factor) * (1 + math.cos(math.pi * progress)) / 2
        case "linear":
            factor = 1 - (1 - schedule.final_factor) * progress
    if step < warmup_steps:
        start = schedule.warmup.start_factor
        factor *= start if schedule.warmup.shape == "constant" else start + (1 - start) * step / warmup_steps
    return base_lr * factor
