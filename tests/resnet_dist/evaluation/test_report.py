"""Calibration, per-class lines and files of an evaluation: numbers that can be checked by hand."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_dist.evaluation.report import as_csv, as_json, class_lines, draw_calibration, draw_classes
from resnet_dist.training.evaluate import Calibration, calibration_of, calibration_row, judge

CONFUSION = np.array([[3, 1, 0], [0, 0, 0], [2, 0, 2]])
COUNTS = (4, 0, 4)
NAMES = ("cat, tabby", "dog", "owl")


def calibration(probabilities: list[list[float]], labels: list[int]) -> Calibration:
    return calibration_of(calibration_row(judge(torch.tensor(probabilities).log(), torch.tensor(labels))))


def test_expected_calibration_error_by_hand() -> None:
    # two samples in the bin of 0.6, one right: |1 - 1.2|; one of 0.9 right: |1 - 0.9|; the mean over three samples
    found = calibration([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9]], [0, 1, 1])
    assert found.ece == pytest.approx(100 * (0.2 + 0.1) / 3, rel=1e-5)
    assert sum(found.num_samples) == 3
    assert sum(found.num_right) == 2


def test_a_net_that_is_always_sure_and_right_is_calibrated() -> None:
    found = calibration([[1.0, 1e-30], [1e-30, 1.0]], [0, 1])
    assert found.ece == pytest.approx(0.0, abs=1e-6)
    assert found.num_samples[-1] == 2


def test_every_class_has_a_line() -> None:
    cat, dog, owl = class_lines(CONFUSION, NAMES, COUNTS)
    assert (cat.samples, cat.right, cat.top1_error, cat.most_confused_with, cat.times) == (4, 3, 25.0, "dog", 1)
    assert (dog.samples, dog.top1_error, dog.answers, dog.most_confused_with) == (0, None, 1, "")
    assert (owl.top1_error, owl.answers, owl.most_confused_with, owl.times) == (50.0, 2, "cat, tabby", 2)
    assert (cat.precision, dog.precision, owl.precision) == (60.0, 0.0, 100.0)
    assert (cat.f1, dog.f1, owl.f1) == pytest.approx((200 * 3 / 9, 0.0, 200 * 2 / 6))
    rows = list(csv.DictReader(io.StringIO(as_csv([cat, dog, owl]))))
    assert [row["name"] for row in rows] == list(NAMES)
    assert [row["top1_error"] for row in rows] == ["25.00", "", "50.00"]
    assert [row["f1"] for row in rows] == ["66.67", "0.00", "66.67"]


def test_samples_without_a_prediction_count_as_wrong() -> None:
    cat, dog, _ = class_lines(CONFUSION, NAMES, (6, 2, 4))
    assert (cat.samples, cat.right, cat.top1_error) == (6, 3, 50.0)
    assert (dog.samples, dog.right, dog.top1_error) == (2, 0, 100.0)


def test_json_has_no_nan() -> None:
    text = as_json({}, {"val/loss": float("nan"), "val/top1": 50.0}, calibration([[0.6, 0.4]], [0]))
    assert json.loads(text, parse_constant=pytest.fail)["metrics"] == {"val/loss": None, "val/top1": 50.0}


def test_files_and_figures(tmp_path: Path) -> None:
    found = calibration([[0.6, 0.4], [0.1, 0.9]], [0, 1])
    tree = json.loads(as_json({"protocol": "flip"}, {"val/top1": 50.0}, found))
    assert tree["metrics"] == {"val/top1": 50.0}
    assert [row["samples"] for row in tree["calibration"]] == [1, 1]
    assert tree["calibration"][1]["accuracy"] == 100.0
    for path in (
        draw_calibration(found, tmp_path / "calibration.png"),
        draw_classes(class_lines(CONFUSION, NAMES, COUNTS), tmp_path / "per_class.png"),
    ):
        assert Image.open(path).width > 400
