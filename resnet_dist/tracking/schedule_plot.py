"""The schedules of some recipes side by side: learning rate and size of training images by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.tracking.figures import new_figure, save, style

_COLUMNS = 3


@dataclass(frozen=True)
class ScheduleCurve:
    title: str
    epochs: Sequence[float]
    rates: Sequence[float]
    """Learning rate at each of `epochs`."""
    sizes: Sequence[int]
    """Side of training images, px, at each of `epochs`; drawn where it changes."""
    note: str = ""


def draw_schedules(curves: Sequence[ScheduleCurve], path: Path) -> Path:
    """One small plot each, three in a row, as one PNG."""
    num_rows = -(-len(curves) // _COLUMNS)
    figure = new_figure((3.1 * min(_COLUMNS, len(curves)), 2.1 * num_rows))
    for number, curve in enumerate(curves, start=1):
        axes = style(figure.add_subplot(num_rows, min(_COLUMNS, len(curves)), number), "epoch", "learning rate")
        axes.set_title(curve.title, fontsize=9)
        axes.plot(curve.epochs, curve.rates, color="tab:blue", linewidth=1.4)
        axes.set_ylim(0, 1.08 * max(curve.rates))
        if len(set(curve.sizes)) > 1:
            right = axes.twinx()
            right.plot(curve.epochs, curve.sizes, color="tab:orange", linewidth=1.2, drawstyle="steps-post")
            right.set_ylabel("image, px", color="tab:orange")
            right.set_ylim(0, 1.08 * max(curve.sizes))
            right.spines["top"].set_visible(False)
        if curve.note:
            axes.text(0.5, 0.5, curve.note, transform=axes.transAxes, ha="center", fontsize=8)
    return save(figure, path)
