"""`resnet-dist schedules`: what recipes plan, as curves over epochs."""

from __future__ import annotations

from pathlib import Path

from resnet_dist.config.image_size import train_size
from resnet_dist.config.recipe import Recipe
from resnet_dist.tracking.schedule_plot import ScheduleCurve
from resnet_dist.training.schedule import lr_at

_POINTS_PER_EPOCH = 20


def schedule_curve(path: Path, recipe: Recipe) -> ScheduleCurve:
    """The rate at 20 points of every epoch. Where a plateau decides, the rate before it is met, and a note."""
    epochs, total = recipe.train.total_epochs, recipe.train.total_epochs * _POINTS_PER_EPOCH
    steps = range(total)
    rates = [
        lr_at(step, recipe.schedule, base_lr=recipe.optim.lr, steps_per_epoch=_POINTS_PER_EPOCH, total_steps=total)
        for step in steps
    ]
    sizes = [train_size(recipe.data, step // _POINTS_PER_EPOCH, epochs) for step in steps]
    note = f"x {recipe.schedule.gamma:g} whenever the\nerror stops falling" if recipe.schedule.kind == "plateau" else ""
    return ScheduleCurve(path.stem, [step / _POINTS_PER_EPOCH for step in steps], rates, sizes, note)
