"""The model against published figures: the README's errors, and that nothing was fitted on what is tested."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.models import summarise
from resnet_dist.planner.hardware import FP32, GPUS, HALF, JITTER
from resnet_dist.planner.published import (
    SCALINGS,
    mean_error,
    pair_rows,
    predicted_efficiency,
    report,
    scaling_rows,
    single_rows,
)

README = Path(__file__).parents[3] / "resnet_dist/planner/README.md"


def test_the_readmes_tables_are_the_commands_output() -> None:
    assert report().strip() in README.read_text()


def test_rows_that_fitted_nothing_are_within_the_aim() -> None:
    scaling = [row for row in scaling_rows() if not row.fitted]
    pairs = [row for row in pair_rows() if not row.fitted]
    assert len(scaling) >= 30
    assert mean_error(scaling) < 0.05
    assert mean_error(pairs) < 0.05
    assert mean_error([*scaling, *pairs, *single_rows()]) < 0.10


@pytest.mark.parametrize(
    ("roofline", "peak", "rates"), [(HALF, GPUS["v100"].half_tflops, (1276, 518)), (FP32, 15.7, (432, 167))]
)
def test_the_rooflines_are_the_two_rows_they_were_fitted_on(roofline, peak, rates) -> None:
    """Two equations, two unknowns."""
    a, b = summarise("resnet50"), summarise("resnet152")
    ta, tb = (1 / rate for rate in rates)
    determinant = a.macs * b.activations - b.macs * a.activations
    per_mac = (ta * b.activations - tb * a.activations) / determinant
    per_activation = (a.macs * tb - b.macs * ta) / determinant
    assert roofline.efficiency == pytest.approx(6 / per_mac / (peak * 1e12), rel=0.01)
    assert roofline.bytes_per_activation == pytest.approx(per_activation * 900e9, rel=0.01)


def test_jitter_is_the_best_on_its_rows() -> None:
    rows = [s for s in SCALINGS if s.fitted == "JITTER"]

    def error(jitter: float) -> float:
        return sum((predicted_efficiency(s, jitter) - s.efficiency) ** 2 for s in rows)

    best = min((i / 1000 for i in range(41)), key=error)
    assert best == pytest.approx(JITTER, abs=0.0051)
