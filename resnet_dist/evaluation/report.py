"""The outputs of an evaluation: numbers, a line for each class, the confusion matrix. Pure."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnet_dist.tracking.plots import new_figure, save, style
from resnet_dist.training.evaluate import NUM_BINS, Calibration


@dataclass(frozen=True)
class ClassLine:
    label: int
    name: str
    samples: int
    right: int
    top1_error: float | None
    """Percent; None without samples. 100 less this is the class's recall."""
    precision: float | None
    """Right predictions of this class as a share of all predictions of it, percent; None if there is none."""
    f1: float | None
    """Harmonic mean of recall and precision, 2 * right / (samples + answers), percent; None if both of these are 0."""
    answers: int
    """Number of predictions of this class."""
    most_confused_with: str
    """The most frequent wrong prediction; empty if there was none."""
    times: int


def class_lines(
    confusion: NDArray[np.int64], class_names: Sequence[str], class_counts: Sequence[int]
) -> list[ClassLine]:
    """One line for each class, by label. `confusion` [C, C]: samples by true class and prediction. `class_counts`:
    samples of each class; those without a prediction, because the net gave NaN, count as wrong.
    """
    lines = []
    for label, (row, name, samples) in enumerate(zip(confusion, class_names, class_counts, strict=True)):
        right, answers = int(row[label]), int(confusion[:, label].sum())
        wrong = row.copy()
        wrong[label] = 0
        rival = int(wrong.argmax())
        lines.append(
            ClassLine(
                label,
                name,
                samples,
                right,
                100.0 * (samples - right) / samples if samples else None,
                100.0 * right / answers if answers else None,
                200.0 * right / (samples + answers) if samples + answers else None,
                answers,
                class_names[rival] if wrong[rival] else "",
                int(wrong[rival]),
            )
        )
    return lines


def as_csv(lines: Sequence[ClassLine]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ClassLine.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    for line in lines:
        shares = {"top1_error": line.top1_error, "precision": line.precision, "f1": line.f1}
        writer.writerow(asdict(line) | {key: "" if share is None else f"{share:.2f}" for key, share in shares.items()})
    return text.getvalue()


def calibration_table(calibration: Calibration) -> list[dict[str, Any]]:
    """A row for each bin that has samples: its ends, mean confidence and accuracy, all in percent."""
    return [
        {
            "from": 100.0 * k / NUM_BINS,
            "to": 100.0 * (k + 1) / NUM_BINS,
            "samples": samples,
            "confidence": 100.0 * confidence / samples,
            "accuracy": 100.0 * right / samples,
        }
        for k, (samples, confidence, right) in enumerate(
            zip(calibration.num_samples, calibration.confidence_sums, calibration.num_right, strict=True)
        )
        if samples
    ]


def as_json(facts: Mapping[str, Any], metrics: Mapping[str, float], calibration: Calibration) -> str:
    """`result.json`: what was evaluated and how, the numbers, the calibration by bin."""
    tree = {**facts, "metrics": as_json_numbers(metrics), "calibration": calibration_table(calibration)}
    return json.dumps(tree, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def as_json_numbers(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN and no infinity: null."""
    return {key: value if math.isfinite(value) else None for key, value in metrics.items()}


# Figures of an evaluation: errors by class, and calibration.


_NUM_WORST = 20


def draw_classes(lines: Sequence[ClassLine], path: Path) -> Path:
    """Top-1 error of all classes, sorted, and the worst ones by name with what they are mistaken for."""
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
    """Accuracy over confidence; a calibrated net follows the diagonal."""
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
