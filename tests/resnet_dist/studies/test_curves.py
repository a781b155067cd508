"""Curves of runs: what is averaged, where they are read from, and that they can be drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from resnet_dist.errors import UserError
from resnet_dist.studies.curves import ErrorCurves, averaged, curve_of, draw_depths, draw_errors, read_curves
from resnet_dist.tracking.mlflow_run import open_run
from resnet_dist.tracking.spool import History
from resnet_dist.tracking.tracker import SpoolTracker


def test_training_points_are_averaged_between_evaluations() -> None:
    points = [(5, 80.0), (10, 60.0), (15, 40.0), (20, 20.0), (25, 10.0)]
    assert averaged(points, [10, 20]) == [(10, 70.0), (20, 30.0), (25, 10.0)]
    assert averaged(points, []) == points
    assert averaged([], [10]) == []


def test_values_that_are_not_numbers_are_left_out() -> None:
    history = History({"train/top1_error": [(1, float("nan")), (2, 50.0)], "val/top1_error": [(2, 60.0)]})
    assert curve_of(history, "run", "plain20") == ErrorCurves("run", "plain20", [(2, 50.0)], [(2, 60.0)])


@pytest.mark.parametrize(
    ("net", "is_plain", "depth"), [("plain56", True, 56), ("resnet110", False, 110), ("googlenet", False, None)]
)
def test_the_meaning_of_a_nets_name(net: str, is_plain: bool, depth: int | None) -> None:
    curve = ErrorCurves("x", net, [], [])
    assert (curve.is_plain, curve.depth) == (is_plain, depth)


def test_a_run_is_read_from_its_folder_and_from_mlflow(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    folder = tmp_path / "plain20-run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("model: {name: plain20}\n")
    handle = open_run(uri, "e", "plain20-run", folder, {}, {"model.name": "plain20"})
    tracker = SpoolTracker(folder, handle.run_id, uri)
    for step, train, val in ((5, 90.0, None), (10, 70.0, 75.0), (20, 50.0, 55.0)):
        tracker.metrics({"train/top1_error": train, **({"val/top1_error": val} if val else {})}, step)
    assert tracker.flush(60.0)
    tracker.close()
    wanted = [ErrorCurves("plain20-run", "plain20", [(10, 80.0), (20, 50.0)], [(10, 75.0), (20, 55.0)])]
    assert read_curves([str(folder)], None) == wanted
    assert read_curves(["plain20-run"], uri) == wanted
    assert read_curves([handle.run_id[:12]], uri) == wanted
    with pytest.raises(UserError, match="nothing: no run of this name or id"):
        read_curves(["nothing"], uri)
    with pytest.raises(UserError, match="give --tracking-uri"):
        read_curves(["nothing"], None)


def test_figures_are_drawn_for_one_kind_and_for_both(tmp_path: Path) -> None:
    curves = [
        ErrorCurves(f"{net}-{k}", net, [(1, 90.0), (2, 30.0)], [(1, 80.0), (2, 40.0)])
        for net in ("plain20", "resnet20", "resnet56", "googlenet")
        for k in range(2)
    ]
    one = Image.open(draw_errors(curves[:2], tmp_path / "sub" / "one.png"))
    both = Image.open(draw_errors(curves, tmp_path / "both.png", max_error=50.0))
    assert both.width > one.width > 300
    draw_depths(curves[:2], tmp_path / "depths.png")
    assert (tmp_path / "depths.png").stat().st_size > 5000
