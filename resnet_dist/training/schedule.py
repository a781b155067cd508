"""What is due at a step: learning rate, evaluation, checkpoint, points of the curves. Pure functions, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import (
    EarlyStopConfig,
    PlateauSchedule,
    Recipe,
    ScheduleConfig,
    cooldown_steps,
    steps_per_epoch,
)
from resnet_dist.errors import UserError


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
        plateau   gamma ** num_drops, the drops so far (`Plateau`)
        cosine    f + (1 - f) * (1 + cos(pi * p)) / 2   (torch's CosineAnnealingLR)
        linear    1 - (1 - f) * p

    the first multiplied by one of the others.

    Raises:
        UserError: the warm-up leaves no step.
        ValueError: `step` is outside the run.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside the run's steps 0 .. {total_steps - 1}")
    warmup_steps = round(schedule.warmup.epochs * steps_per_epoch)
    if warmup_steps >= total_steps:
        raise UserError(
            f"schedule.warmup.epochs ({schedule.warmup.epochs:g}) takes {warmup_steps} of the run's {total_steps} "
            f"steps; make it shorter than train.total_epochs ({total_steps / steps_per_epoch:g})"
        )
    # 0 until the warm-up ends; it would be 1 at step `total_steps`, so the last step is just before the final factor.
    progress = max(0, step - warmup_steps) / (total_steps - warmup_steps)
    match schedule.kind:
        case "step":  # milestones count from step 0, so a longer warm-up does not move them
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


@dataclass(frozen=True)
class Plateau:
    """The progress of a plateau schedule, from the evaluations so far; part of the checkpoint."""

    best_error: float = math.inf
    """Lowest top-1 error so far, percent."""
    num_without_best: int = 0
    num_drops: int = 0

    def after(self, error: float, schedule: PlateauSchedule) -> Plateau:
        """After one more evaluation, with this top-1 error in percent. The count starts again after a drop."""
        # `<` too: with min_improvement 0, an equal error is no new best
        if error <= self.best_error - schedule.min_improvement and error < self.best_error:
            return Plateau(error, 0, self.num_drops)
        waited = self.num_without_best + 1
        if waited < schedule.patience or self.num_drops == schedule.max_drops:
            return replace(self, num_without_best=waited)
        return Plateau(self.best_error, 0, self.num_drops + 1)


@dataclass(frozen=True)
class EarlyStop:
    """The progress towards an early stop, from the evaluations so far; part of the checkpoint."""

    best: float | None = None
    best_step: int = 0
    num_without_best: int = 0

    def after(self, value: float, step: int, config: EarlyStopConfig) -> EarlyStop:
        """After one more evaluation, which gave `value` of the metric."""
        gain = math.inf if self.best is None else self.best - value
        if self.best is not None and config.metric != "val/loss":
            gain = -gain
        if gain > 0 and gain >= config.min_delta:
            return EarlyStop(value, step)
        return replace(self, num_without_best=self.num_without_best + 1)

    def reason(self, config: EarlyStopConfig | None) -> str:
        """Why the run ends here; "" if it does not."""
        if config is None or self.best is None or self.num_without_best < config.patience:
            return ""
        better = f" by {config.min_delta:g}" if config.min_delta else ""
        evaluations = "evaluation" if self.num_without_best == 1 else f"{self.num_without_best} evaluations"
        return (
            f"{config.metric} was best at step {self.best_step} ({self.best:.5g}) and not better{better} in the "
            f"{evaluations} since (train.early_stop)"
        )


@dataclass(frozen=True)
class RunPlan:
    """What is due when: functions of the number of optimizer steps done, so a resumed run needs nothing else."""

    steps_per_epoch: int
    total_steps: int
    """Length of the schedule."""
    last_step: int
    """Where the run ends: `total_steps`, or `train.max_steps` if that is less; or where a cooldown ends."""
    eval_every_epochs: int
    save_every_epochs: int
    save_every_steps: int | None
    log_every_steps: int
    save_first: bool = False
    """Whether the initial weights are saved too, so that there is always a checkpoint to go back to."""
    first_step: int = 0
    """Where the run starts: a fork has its parent's steps behind it."""
    schedule_start: int = 0
    """The step at which the schedule begins."""
    cooldown_steps: int = 0
    """Steps from `first_step` to `last_step` in which the rate goes to zero; 0: the run follows the schedule."""

    def learning_rate(self, step: int, recipe: Recipe, num_drops: int = 0) -> float:
        """The rate of step number `step`, in a cooldown (1 - i / n) times that at the fork in its step i of n.

        `num_drops`: see `lr_at`.
        """
        at, left = step, 1.0
        if self.cooldown_steps:
            at = min(self.first_step, self.total_steps - 1)  # a run at its end is cooled down from its last rate
            left = 1 - (step - self.first_step) / self.cooldown_steps
        rate = lr_at(
            at - self.schedule_start,
            recipe.schedule,
            base_lr=recipe.optim.lr,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps - self.schedule_start,
            num_drops=num_drops,
        )
        return rate * left

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def at_epoch_end(self, step: int) -> bool:
        return step > 0 and step % self.steps_per_epoch == 0

    def epoch_ends_at(self, step: int) -> int:
        """The step at which the epoch of step number `step` ends, or the run, if that comes first."""
        return min((self.epoch_of(step) + 1) * self.steps_per_epoch, self.last_step)

    def evaluation_due(self, step: int) -> bool:
        return step == self.last_step or self._every_epochs(step, self.eval_every_epochs)

    def checkpoint_due(self, step: int) -> bool:
        by_steps = self.save_every_steps is not None and step > 0 and step % self.save_every_steps == 0
        first = self.save_first and step == 0
        return first or step == self.last_step or by_steps or self._every_epochs(step, self.save_every_epochs)

    def point_due(self, step: int) -> bool:
        """Whether a point is added to the training curves after `step`."""
        by_steps = step % self.log_every_steps == 0
        # Always at a checkpoint: a point checks the losses, and only a checked state is saved.
        return by_steps or self.at_epoch_end(step) or step == self.last_step or self.checkpoint_due(step)

    def _every_epochs(self, step: int, every: int) -> bool:
        return self.at_epoch_end(step) and self.epoch_of(step) % every == 0


def plan_run(recipe: Recipe, profile: Profile, num_train_samples: int) -> RunPlan:
    """Raises UserError if the data set is smaller than one global batch, or the warm-up as long as the run."""
    per_epoch = steps_per_epoch(num_train_samples, recipe.train.global_batch_size)
    total, fork = per_epoch * recipe.train.total_epochs, recipe.fork
    first = (fork.step or 0) if fork else 0
    last = min(total, recipe.train.max_steps or total)
    num_cooldown = cooldown_steps(fork.cooldown, first) if fork and fork.cooldown else 0
    if num_cooldown:
        last = first + num_cooldown
    elif first and first >= last:
        key = "train.max_steps" if last < total else "train.total_epochs"
        raise UserError(
            f"fork: its parent has done {first} steps, this run ends after {last}; raise {key}, or fork an earlier "
            "checkpoint (RUN@EPOCH)"
        )
    begins = first if fork and fork.schedule == "rest" else 0
    # Checks the warm-up, before a worker starts
    lr_at(0, recipe.schedule, base_lr=recipe.optim.lr, steps_per_epoch=per_epoch, total_steps=total - begins)
    return RunPlan(
        steps_per_epoch=per_epoch,
        total_steps=total,
        last_step=last,
        eval_every_epochs=recipe.eval.every_epochs,
        save_every_epochs=profile.checkpoint.every_epochs,
        save_every_steps=profile.checkpoint.every_steps,
        log_every_steps=profile.log_every_steps,
        save_first=recipe.train.divergence.action == "skip",  # or a divergence in the first steps had no way back
        first_step=first,
        schedule_start=begins,
        cooldown_steps=num_cooldown,
    )
