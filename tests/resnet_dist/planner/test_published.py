"""The model against published figures: the README's errors, and that nothing was fitted on what is tested."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from resnet_dist.models import summarise
from resnet_dist.planner.hardware import FP32, GPUS, HALF, JITTER, KERNEL_S, LAUNCH_S, Roofline
from resnet_dist.planner.published import (
    PAIRS,
    SCALINGS,
    Row,
    batch_rows,
    mean_error,
    pair_rows,
    predicted_efficiency,
    report,
    scaling_rows,
    single_rows,
)
from resnet_dist.planner.step import train_kernels

README = Path(__file__).parents[3] / "resnet_dist/planner/README.md"


def test_the_readmes_tables_are_the_commands_output() -> None:
    assert report().strip() in README.read_text()


def test_rows_that_fitted_nothing_are_within_the_aim() -> None:
    scaling = [row for row in scaling_rows() if not row.fitted]
    pairs = [row for row in pair_rows() if not row.fitted]
    assert len(scaling) >= 30
    assert mean_error(scaling) < 0.05
    assert mean_error(pairs) < 0.05
    batches = [row for row in batch_rows() if not row.fitted]
    assert mean_error(batches) < 0.05
    held_out = [*scaling, *pairs, *batches, *single_rows()]
    assert mean_error(held_out) < 0.05
    stated = f"mean error {mean_error(held_out):.1%} over {len(held_out)} published figures".replace("%", " %")
    assert stated in (README.parents[2] / "README.md").read_text()


@pytest.mark.parametrize(("half", "roofline", "peak"), [(True, HALF, GPUS["v100"].half_tflops), (False, FP32, 15.7)])
def test_the_rooflines_are_the_two_rows_they_were_fitted_on(half: bool, roofline: Roofline, peak: float) -> None:
    """Two equations, two unknowns."""
    (row,) = [pair for pair in PAIRS if pair.fitted == ("HALF" if half else "FP32")]
    a, b = summarise("resnet50"), summarise("resnet152")
    ta, tb = (
        1 / speed.images_s - train_kernels(net, half=half).seconds() / speed.batch
        for net, speed in ((a, row.resnet50), (b, row.resnet152))
    )
    determinant = a.macs * b.activations - b.macs * a.activations
    per_mac = (ta * b.activations - tb * a.activations) / determinant
    per_activation = (a.macs * tb - b.macs * ta) / determinant
    assert roofline.efficiency == pytest.approx(6 / per_mac / (peak * 1e12), rel=0.01)
    assert roofline.bytes_per_activation == pytest.approx(per_activation * 900e9, rel=0.01)


def error_on(name: str, rows: list[Row]) -> float:
    return sum(math.log(row.predicted / row.published) ** 2 for row in rows if row.fitted == name)


def test_the_times_of_kernels_and_launches_are_the_best_on_their_rows() -> None:
    kernel_us = min(range(1, 40), key=lambda us: error_on("KERNEL_S", batch_rows(kernel_s=1e-6 * us)))
    launch_us = min(range(1, 400), key=lambda us: error_on("LAUNCH_S", batch_rows(launch_s=1e-7 * us))) / 10
    assert kernel_us == pytest.approx(1e6 * KERNEL_S, abs=0.6)
    assert launch_us == pytest.approx(1e6 * LAUNCH_S, abs=0.2)


def test_jitter_is_the_best_on_its_rows() -> None:
    rows = [s for s in SCALINGS if s.fitted == "JITTER"]

    def error(jitter: float) -> float:
        return sum((predicted_efficiency(s, jitter) - s.efficiency) ** 2 for s in rows)

    best = min((i / 1000 for i in range(41)), key=error)
    assert best == pytest.approx(JITTER, abs=0.0051)
