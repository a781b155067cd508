"""Figures of an evaluation: how the classes differ, and whether confidence can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resnet_dist.evaluation.report import ClassLine, calibration_table
from resnet_dist.tracking.plots import new_figure, save, style
from resnet_dist.training.calibration import NUM_BINS, Calibration

_NUM_WORST = 20


def draw_classes(lines: Sequence[ClassLine], path: Path) -> Path:
    """Top-1 error of all classes, sorted, and the worst ones by name with what they are taken for."""
    seen = sorted((line for line in lines if line.top1_error is not None), key=lambda line: line.top1_error or 0.0)
    worst = seen[-_NUM_WORST:]
    figure = new_figure((10.4, 1.6 + 0.22 * len(worst)))
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    style(left, "classes, best first", "top-1 error (%)")
    left.plot(range(1, len(seen) + 1), [line.top1_error for line in seen], marker=".", markersize=3, linewidth=1.2)
    left.set_ylim(0, 100)
    style(right, "top-1 error (%)", "")
    right.barh([_short(line.name) for line in worst], [line.top1_error for line in worst], color="tab:blue", alpha=0.7)
    for place, line in enumerate(worst):
        if line.most_confused_with:
            right.text(
                1.0, place, f"{line.times} as {_short(line.most_confused_with)}", va="center", fontsize=7, clip_on=True
            )
    right.set_xlim(0, 100)
    right.tick_params(axis="y", labelsize=8)
    return save(figure, path)


def draw_calibration(calibration: Calibration, path: Path) -> Path:
    """Accuracy over confidence; a net that is right as often as it is sure lies on the diagonal."""
    table = calibration_table(calibration)
    figure = new_figure((5.4, 5.0))
    axes = style(figure.add_subplot(), "confidence (%)", "accuracy (%)")
    axes.bar(
        [row["from"] for row in table],
        [row["accuracy"] for row in table],
        width=100.0 / NUM_BINS,
        align="edge",
        edgecolor="white",
        alpha=0.7,
    )
    axes.plot([0, 100], [0, 100], color="black", linewidth=0.8, linestyle="--")
    axes.plot(
        [row["confidence"] for row in table], [row["accuracy"] for row in table], "o", color="tab:red", markersize=3
    )
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    axes.set_title(f"expected calibration error {calibration.ece:.2f} %", fontsize=10)
    return save(figure, path)


def _short(name: str) -> str:
    return name if len(name) <= 28 else name[:27] + "…"
