"""From a ledger to ranking, figures, the best recipe and the next space."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.config.loading import load_recipe, load_space, read_tree
from resnet_dist.config.space import Space
from resnet_dist.errors import UserError
from resnet_dist.sweeps.analysis.next_sweep import narrowed, next_space_text, warm_start
from resnet_dist.sweeps.analysis.ranking import Ranked, Ranking, rank
from resnet_dist.sweeps.analysis.report import write_report
from resnet_dist.sweeps.ledger import Event, encode, ledger_file, replay
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


def test_the_next_space_is_finer_and_begins_with_what_is_known(tmp_path: Path) -> None:
    space = a_space(RANGES)
    output = tmp_path / "next.yaml"
    text, words = next_space_text(write(tmp_path / "sweep", played(space)), 0.25, output)
    output.write_text(text)
    finer = load_space(output)
    for key in RANGES:
        old, new = space.space[key], finer.space[key]
        assert math.log(new.high / new.low) < math.log(old.high / old.low)  # type: ignore[union-attr]
    assert len(words) == 2
    assert read_tree(output.parent / finer.base) == read_tree(BASE)
    folders = [output.parent / folder for folder in finer.warm_start]
    for overrides, data_digest, are_scores_known in (
        ([], "data", False),  # sobol has no model to teach
        (["search={kind: tpe}"], "data", True),
        (["search={kind: tpe}"], "other", False),  # scores do not compare, points do
    ):
        first, known = warm_start(load_space(output, overrides), read_tree(BASE), data_digest, folders)
        assert (bool(first), bool(known)) == (not are_scores_known, are_scores_known)


def test_a_model_is_taught_the_mean_over_seeds(tmp_path: Path) -> None:
    space = a_space(RANGES, search={"kind": "tpe"}, seeds=2)
    events = played(a_space(RANGES, seeds=2), seeds=2, noise=8.0)
    best = rank(space, replay(events)).best
    _, known = warm_start(space, read_tree(BASE), "data", [write(tmp_path, events)])
    assert best is not None
    assert best.num_runs == 2
    assert (best.point, pytest.approx(best.score)) in known


def test_a_grid_is_narrowed_around_its_best_cell(tmp_path: Path) -> None:
    text, _ = next_space_text(write(tmp_path / "sweep", played(a_space(GRID))), 0.25, tmp_path / "next.yaml")
    (tmp_path / "next.yaml").write_text(text)
    grid = load_space(tmp_path / "next.yaml").space
    assert grid["optim.lr"].all_values() == pytest.approx([0.03, 0.0548, 0.1, 0.173, 0.3])  # type: ignore[union-attr]
    assert grid["optim.weight_decay"].all_values()[0] == 1e-4  # type: ignore[union-attr]


def ranked(number: int, point: dict[str, Any], loss: float) -> Ranked:
    return Ranked(
        number=number,
        point=point,
        trials=(),
        status="finished",
        epoch=6,
        score=loss,
        num_runs=1,
        num_diverged=0,
        spread=None,
    )


def test_a_value_of_the_old_grid_is_not_written_another_way() -> None:
    """0.0949 beside 0.0948683 would be one trial paid twice."""
    grid = [0.03, 0.0948683, 0.3]
    rows = [ranked(number, {"optim.lr": lr}, float(number)) for number, lr in enumerate([0.3, *grid])]
    space = a_space({"optim.lr": {"kind": "grid", "values": grid}}, search={"kind": "grid"}, trials=None)
    parameters, words = narrowed(space, Ranking("val/loss", tuple(rows), None), 0.9, lambda *_: True)
    values = parameters["optim.lr"]["values"]
    assert all(b / a > 1.01 for a, b in itertools.pairwise(values))
    assert 0.3 in values
    assert " became 0.03 .. 0.3" not in words[0]


@pytest.mark.parametrize(
    ("key", "grid", "best", "expected"),
    [
        ("train.global_batch_size", [64, 128, 256, 512], 128, [64, 91, 128, 181, 256]),
        ("optim.momentum", [0.8, 0.9, 0.98], 0.98, [0.9, 0.92, 0.94, 0.96, 0.98]),
        ("optim.weight_decay", [0, 1e-4, 1e-3], 0, [0, 2.5e-5, 5e-5, 7.5e-5, 1e-4]),
        ("optim.lr", [0.01, 0.1, 1.0], 1.0, [0.1, 0.316, 1.0, 3.16, 10.0]),
    ],
)
def test_a_narrowed_grid_holds_the_best_and_nothing_that_a_recipe_may_not_be(
    key: str, grid: list[float], best: float, expected: list[float]
) -> None:
    when = {"optim.name": "sgd"}
    parameter = {"kind": "grid", "values": grid, "when": when}
    space = a_space(
        {"optim.name": {"kind": "choice", "values": ["sgd"]}, key: parameter}, search={"kind": "grid"}, trials=None
    )
    rows = [
        ranked(number, {key: value}, abs(value - best))
        for number, value in enumerate(sorted([*grid, *grid], key=lambda value: abs(value - best)))
    ]
    allowed = {"train.global_batch_size": 1, "optim.momentum": 0, "optim.weight_decay": 0, "optim.lr": 0}
    parameters, _ = narrowed(
        space,
        Ranking("val/loss", tuple(rows), None),
        0.25,
        lambda _, v: allowed[key] <= v < (1 if "mom" in key else 1e9),
    )
    assert parameters[key] == {"kind": "grid", "when": when, "values": pytest.approx(expected)}
    assert best in parameters[key]["values"]


def test_too_few_points_to_narrow(tmp_path: Path) -> None:
    write(tmp_path, played(a_space(RANGES, trials=2)))
    with pytest.raises(UserError, match="points have reached their end, 4 are needed; run more trials first"):
        next_space_text(tmp_path, 0.25, tmp_path / "next.yaml")
