"""Where a run stands and what is due there: pure functions of the step, so a resumed run needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import Recipe
from resnet_dist.training.schedule import lr_at, steps_per_epoch, total_steps


@dataclass(frozen=True)
class RunPlan:
    """Steps are counted from 0; `step` below is the number of optimizer steps done."""

    steps_per_epoch: int
    total_steps: int
    """Length of the schedule."""
    last_step: int
    """Where the run ends: `total_steps`, or `train.max_steps` if that is less."""
    eval_every_epochs: int
    save_every_epochs: int
    save_every_steps: int | None
    log_every_steps: int
    save_first: bool = False
    """Whether the first weights are saved too, so that there is always something to go back to."""

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def at_epoch_end(self, step: int) -> bool:
        return step > 0 and step % self.steps_per_epoch == 0

    def epoch_ends_at(self, step: int) -> int:
        """The step at which the epoch that step number `step` belongs to is over, or the run, if that comes first."""
        return min((self.epoch_of(step) + 1) * self.steps_per_epoch, self.last_step)

    def evaluation_due(self, step: int) -> bool:
        return step == self.last_step or self._every_epochs(step, self.eval_every_epochs)

    def checkpoint_due(self, step: int) -> bool:
        by_steps = self.save_every_steps is not None and step > 0 and step % self.save_every_steps == 0
        first = self.save_first and step == 0
        return first or step == self.last_step or by_steps or self._every_epochs(step, self.save_every_epochs)

    def window_ends(self, step: int) -> bool:
        """Whether a point of the training curves is drawn after `step`.

        Always before a checkpoint: weights whose losses were not looked at are not saved.
        """
        by_steps = step % self.log_every_steps == 0
        return by_steps or self.at_epoch_end(step) or step == self.last_step or self.checkpoint_due(step)

    def _every_epochs(self, step: int, every: int) -> bool:
        return self.at_epoch_end(step) and self.epoch_of(step) % every == 0


def plan_run(recipe: Recipe, profile: Profile, num_train_samples: int) -> RunPlan:
    """Raises UserError if the data set is smaller than one global batch, or the warm-up as long as the run."""
    per_epoch = steps_per_epoch(num_train_samples, recipe.train.global_batch_size)
    total = total_steps(per_epoch, recipe.train.total_epochs)
    lr_at(0, recipe.schedule, base_lr=recipe.optim.lr, steps_per_epoch=per_epoch, total_steps=total)
    return RunPlan(
        steps_per_epoch=per_epoch,
        total_steps=total,
        last_step=min(total, recipe.train.max_steps or total),
        eval_every_epochs=recipe.eval.every_epochs,
        save_every_epochs=profile.checkpoint.every_epochs,
        save_every_steps=profile.checkpoint.every_steps,
        log_every_steps=profile.log_every_steps,
        save_first=recipe.train.divergence.action == "skip",
    )
