"""From a ledger to ranking, figures, the best recipe and the next space."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_dist.config.loading import load_recipe, read_tree
from resnet_dist.config.space import Space
from resnet_dist.sweeps.analysis.report import write_report
from resnet_dist.sweeps.ledger import Event, encode, ledger_file
from resnet_dist.sweeps.points import planned_points
from tests.resnet_dist.sweeps.ledgers import RecordedRun, events_of

ROOT = Path(__file__).parents[3]
BASE = ROOT / "resnet_dist/recipes/digits_resnet20.yaml"
GRID = {
    "optim.lr": {"kind": "grid", "values": [0.01, 0.03, 0.1, 0.3, 1.0]},
    "optim.weight_decay": {"kind": "grid", "values": [1e-4, 1e-3, 1e-2, 1e-1]},
}
RANGES = {
    "lr_per_256": {"kind": "loguniform", "low": 0.03, "high": 1},
    "tau_epochs": {"kind": "loguniform", "low": 1, "high": 15},
}


def a_space(space: dict[str, Any], **more: Any) -> Space:
    return Space.model_validate(
        {
            "base": str(BASE),
            "proxy": {"model.name": "resnet8", "train.total_epochs": 6},
            "space": space,
            "scheduler": {"kind": "asha", "first_rung": 0.34, "rungs": 1, "reduction_factor": 2},
            "search": {"kind": "grid" if space is GRID else "sobol"},
            "trials": None if space is GRID else 16,
            **more,
        }
    )


def top1(rate: float, decay_or_tau: float) -> float:
    return 95 - 8 * abs(math.log10(rate / 0.1)) - 3 * abs(math.log10(decay_or_tau / 2e-3))


def played(space: Space, seeds: int = 1, noise: float = 0.1) -> list[Event]:
    """The largest rate diverges, the lower half ends at the rung, the others run to their end."""
    points = planned_points(space, space.trials or 1_000) or []
    finals = [top1(*point.values()) for point in points]
    runs: list[RecordedRun] = []
    for number, (point, final) in enumerate(zip(points, finals, strict=True)):
        if next(iter(point.values())) >= 0.9:
            runs.append(RecordedRun(number, 0, point, "diverged", []))
        elif final < sorted(finals)[len(finals) // 2]:
            runs.append(RecordedRun(number, 0, point, "stopped", [final - 20, final - 10]))
        else:
            for seed in range(seeds):
                scores = [final - 20 / epoch + (noise if seed else 0) for epoch in range(1, 7)]
                runs.append(RecordedRun(number, seed, point, "finished", scores))
    return events_of(space, runs, read_tree(BASE))


def write(folder: Path, events: Sequence[Event]) -> Path:
    folder.mkdir(exist_ok=True)
    ledger_file(folder).write_bytes(b"".join(map(encode, events)))
    return folder


def test_the_report_has_all_its_parts_and_the_best_recipe_is_a_recipe(tmp_path: Path) -> None:
    report = write_report(write(tmp_path, played(a_space(GRID))))
    names = {path.name for path in report.folder.iterdir()}
    assert names == {
        *("ranking.md", "ranking.csv", "index.html"),
        *("score_map.png", "learning_curves.png", "by_parameter.png", "best_so_far.png"),
    }
    assert "Trials: 20: 10 finished, 6 stopped, 4 diverged" in report.text
    assert "Epochs: 74 spent; 24 saved by stopping early" in report.text
    assert report.text.splitlines()[2].startswith("Best: optim.lr 0.1, optim.weight_decay 0.001 (t0009) with")
    rows = list(csv.DictReader((report.folder / "ranking.csv").open()))
    assert [row["status"] for row in rows] == ["finished"] * 10 + ["stopped"] * 6 + ["diverged"] * 4
    assert (rows[0]["optim.lr"], rows[0]["optim.weight_decay"]) == ("0.1", "0.001")
    assert report.best_recipe is not None
    best = load_recipe(report.best_recipe)
    assert (best.optim.lr, best.optim.weight_decay, best.train.total_epochs) == (0.1, 1e-3, 15)
    head = report.best_recipe.read_text()
    for part in ("# Found by the sweep played", "# Proxy", "model.name resnet8", "run-t0009", "resnet-dist train"):
        assert part in head
