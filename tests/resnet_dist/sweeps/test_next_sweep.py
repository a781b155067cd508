"""The next space around what a sweep found, and what earlier sweeps know."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_dist.config.loading import load_space, read_tree
from resnet_dist.config.space import Space
from resnet_dist.errors import UserError
from resnet_dist.sweeps.analysis.next_sweep import Earlier, narrowed, next_space_text, warm_start
from resnet_dist.sweeps.analysis.ranking import Ranked, Ranking, rank
from resnet_dist.sweeps.ledger import Began, Event, replay
from resnet_dist.sweeps.points import Builder, Point, contains, planned_points
from tests.resnet_dist.sweeps.ledgers import RecordedRun, events_of
from tests.resnet_dist.sweeps.test_report import BASE, GRID, RANGES, a_space, played, write

NUM_SAMPLES = 1442


def known_before(space: Space, folders: Sequence[Path], data_digest: str = "data") -> Earlier:
    return warm_start(Builder(space, read_tree(BASE), NUM_SAMPLES, NUM_SAMPLES), data_digest, folders)


def planned_next(folder: Path, output: Path) -> tuple[Space, list[Point], Earlier]:
    """The space in `output`, the points that its sweep would train first, what it knows of the sweep in `folder`."""
    space = load_space(output)
    builder = Builder(space, read_tree(BASE), NUM_SAMPLES, NUM_SAMPLES)
    earlier = known_before(space, [folder])
    tried = {builder.key(point) for point in earlier.tried}
    return space, planned_points(space, 40, builder.key, tried) or [], earlier


KINDS: dict[str, list[dict[str, Any]]] = {
    "optim.lr": [
        {"kind": "loguniform", "low": 0.03, "high": 0.3},
        {"kind": "quniform", "low": 0.1, "high": 0.6, "step": 0.1},
        {"kind": "choice", "values": [0.01, 0.1, 0.3]},
    ],
    "optim.nesterov": [{"kind": "choice", "values": [False, True]}],
    "optim.momentum": [
        {"kind": "uniform", "low": 0.5, "high": 0.95},
        {"kind": "uniform", "low": 0.5, "high": 0.95, "when": {"optim.nesterov": True}},
    ],
    "optim.weight_decay": [{"kind": "derived", "of": "optim.lr", "factor": 1e-3}],
}
GRIDS: dict[str, list[dict[str, Any]]] = {
    "optim.lr": [
        {"kind": "grid", "low": 0.03, "high": 0.3, "num": 3, "log": True},
        {"kind": "grid", "values": [0.1, 0.3]},
        {"kind": "grid", "values": [0.01, 0.03, 0.1, 0.3, 1.0]},
    ],
    "optim.nesterov": [{"kind": "choice", "values": [False, True]}],
    "optim.momentum": [
        {"kind": "grid", "values": [0.8, 0.9, 0.98]},
        {"kind": "grid", "values": [0.5, 0.9], "when": {"optim.nesterov": [True]}},
    ],
    "train.global_batch_size": [{"kind": "grid", "values": [64, 128, 256]}],
}


@st.composite
def sweeps(draw: st.DrawFn) -> tuple[Space, list[Event]]:
    """A space of any kinds, and a ledger of it with any scores, ends and seeds."""
    kinds = draw(st.sampled_from([KINDS, GRIDS]))
    keys = draw(st.lists(st.sampled_from(sorted(kinds)), min_size=1, unique=True))
    chosen = {key: draw(st.sampled_from(kinds[key])) for key in kinds if key in keys}
    if "optim.nesterov" not in keys:
        chosen = {key: {name: value for name, value in p.items() if name != "when"} for key, p in chosen.items()}
    if all(parameter["kind"] == "derived" for parameter in chosen.values()):
        chosen = {"optim.lr": kinds["optim.lr"][0], **chosen}
    search = "grid" if kinds is GRIDS else draw(st.sampled_from(["sobol", "random"]))
    space = a_space(chosen, search={"kind": search}, trials=None if search == "grid" else 12)
    points = (planned_points(space, 12) or [])[: draw(st.integers(4, 12))]
    runs = []
    for number, point in enumerate(points):
        outcome = draw(st.sampled_from(["finished", "finished", "finished", "stopped", "diverged"]))
        for seed in range(draw(st.integers(1, 2)) if outcome == "finished" else 1):
            score = draw(st.integers(0, 20)) + 50.0
            runs.append(RecordedRun(number, seed, point, outcome, [score]))
    return space, events_of(space, runs, read_tree(BASE))


def near(first: Point, second: Point) -> bool:
    return first.keys() == second.keys() and all(
        math.isclose(value, second[key], rel_tol=1e-6) for key, value in first.items()
    )


@settings(max_examples=60, deadline=None)
@given(sweeps(), st.floats(0.05, 1.0))
def test_the_next_space_holds_the_best_is_narrower_or_says_why_not_and_no_point_of_it_was_tried(
    sweep: tuple[Space, list[Event]], keep: float
) -> None:
    space, events = sweep
    with TemporaryDirectory() as name:
        folder, output = write(Path(name) / "sweep", events), Path(name) / "next.yaml"
        ranking = rank(space, replay(events))
        refused = "every point of the next space has been tried"
        if sum(row.num_runs > 0 for row in ranking.rows) < 4:
            refused = "4 are needed"
        try:
            text, words = next_space_text(folder, keep, output)
        except UserError as error:
            if refused in str(error):
                return
            raise
        output.write_text(text)
        finer, planned, earlier = planned_next(folder, output)
        assert ranking.best is not None
        assert contains(finer, ranking.best.point)
        tried = [row.point for row in ranking.rows]
        assert planned
        assert not any(near(point, old) for point in planned for old in tried)
        assert not any(near(point, old) for point in earlier.first for old in tried)
        for line in words:
            before, became, after = line.partition(" became ")
            assert not became or before.partition(": ")[2] != after.partition(",")[0]
            if not became and not line.startswith("nothing"):
                assert " is kept: " in line or " is kept, with " in line or " is left out" in line
        for key in space.free:
            assert any(line.startswith(f"{key}: ") for line in words)


def test_the_next_space_is_finer_and_begins_with_what_is_known(tmp_path: Path) -> None:
    space = a_space(RANGES)
    output = tmp_path / "next.yaml"
    text, words = next_space_text(write(tmp_path / "sweep", played(space)), 0.25, output)
    output.write_text(text)
    finer = load_space(output)
    for key in RANGES:
        old, new = space.space[key], finer.space[key]
        assert math.log(new.high / new.low) < math.log(old.high / old.low)  # type: ignore[union-attr]
        assert len(f"{new.low:g}".replace(".", "").strip("0")) <= 2  # type: ignore[union-attr]
    assert len(words) == 2
    assert read_tree(output.parent / finer.base) == read_tree(BASE)
    folders = [output.parent / folder for folder in finer.warm_start]
    same, other = known_before(finer, folders), known_before(finer, folders, data_digest="other")
    assert (len(same.first), bool(same.known)) == (0, True)
    assert (len(other.first), len(other.known), len(other.tried)) == (3, 0, 0)  # scores do not compare, points do


def test_what_a_sweep_began_with_is_known_to_the_next_one_too(tmp_path: Path) -> None:
    space = a_space(RANGES)
    first = write(tmp_path / "first", played(space))
    known = known_before(space, [first])
    began = events_of(space, [], read_tree(BASE))[0]
    assert isinstance(began, Began)
    second = write(tmp_path / "second", [replace(began, known=known.known, tried=known.tried)])
    assert known_before(space, [second]) == known


def test_a_model_is_taught_the_mean_over_seeds(tmp_path: Path) -> None:
    space = a_space(RANGES, search={"kind": "tpe"}, seeds=2)
    events = played(a_space(RANGES, seeds=2), seeds=2, noise=8.0)
    best = rank(space, replay(events)).best
    known = known_before(space, [write(tmp_path, events)]).known
    assert best is not None
    assert best.num_runs == 2
    assert (best.point, pytest.approx(best.score)) in known


def test_a_grid_is_narrowed_around_its_best_cell(tmp_path: Path) -> None:
    output = tmp_path / "next.yaml"
    text, words = next_space_text(write(tmp_path / "sweep", played(a_space(GRID))), 0.25, output)
    output.write_text(text)
    space, planned, _ = planned_next(tmp_path / "sweep", output)
    assert words == [
        "optim.lr: 0.01 .. 1 became 0.055, 0.1, 0.17",
        "optim.weight_decay: 0.0001 .. 0.1 became 0.0003, 0.001, 0.003",
    ]
    assert len(planned) == 9 - 1  # the best is known
    assert space.trials is None


def ranked(number: int, point: dict[str, Any], loss: float, *, in_noise: bool = False) -> Ranked:
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
        possible_gain=1.0 if in_noise else None,
    )


@pytest.mark.parametrize(
    ("key", "grid", "best", "expected", "said"),
    [
        ("train.global_batch_size", [64, 128, 256, 512], 128, [90, 128, 180], "became 90, 128, 180"),
        ("optim.momentum", [0.8, 0.9, 0.98], 0.98, [0.94, 0.98], "the upper end, beyond which no recipe can be"),
        ("optim.weight_decay", [0, 1e-4, 1e-3], 0, [0, 5e-5], "became 0, 5e-05"),
        ("optim.lr", [0.01, 0.1, 1.0], 1.0, [0.3, 1.0, 3.0, 10.0], "moved: the best, 1, is at the upper end"),
        ("optim.lr", [0.03, 0.0948683, 0.3], 0.0948683, [0.053, 0.0948683, 0.17], "0.03 .. 0.3 became"),
    ],
)
def test_a_narrowed_grid_holds_the_best_and_nothing_that_a_recipe_may_not_be(
    key: str, grid: list[float], best: float, expected: list[float], said: str
) -> None:
    when = {"optim.name": "sgd"}
    parameter = {"kind": "grid", "values": grid, "when": when}
    space = a_space(
        {"optim.name": {"kind": "choice", "values": ["sgd"]}, key: parameter},
        search={"kind": "grid"},
        trials=None,
        metric="val/loss",
    )
    rows = [
        ranked(number, {"optim.name": "sgd", key: value}, abs(value - best))
        for number, value in enumerate(sorted([*grid, *grid], key=lambda value: abs(value - best)))
    ]
    allowed = {"train.global_batch_size": 1, "optim.momentum": 0, "optim.weight_decay": 0, "optim.lr": 0}
    parameters, words = narrowed(
        space,
        Ranking("val/loss", tuple(rows), None),
        0.25,
        lambda _, v: allowed[key] <= v < (1 if "mom" in key else 1e9),
    )
    assert parameters[key] == {"kind": "grid", "when": when, "values": pytest.approx(expected)}
    assert best in parameters[key]["values"]
    assert said in words[1]


def test_where_noise_hides_the_best_nothing_is_narrower_and_the_reason_is_said() -> None:
    grid = [0.01, 0.03, 0.1, 0.3, 1.0]
    order = [0.1, 0.01, 1.0, 0.03, 0.3]
    rows = [ranked(n, {"optim.lr": lr}, float(n), in_noise=n > 0) for n, lr in enumerate(order)]
    space = a_space({"optim.lr": {"kind": "grid", "values": grid}}, search={"kind": "grid"}, metric="val/loss")
    parameters, words = narrowed(space, Ranking("val/loss", tuple(rows), 1.0), 0.25, lambda *_: True)
    values = parameters["optim.lr"]["values"]
    assert (values[0], values[-1]) == (0.01, 1.0)
    assert all(b / a > 1.2 for a, b in itertools.pairwise(values))
    assert words[0].startswith("optim.lr: 0.01 .. 1 is kept, with 0.017, 0.055, 0.17, 0.55 in it: points all over it")
    assert words[1] == "nothing became narrower: see the reason at each key"


def test_a_parameter_that_is_never_active_any_more_is_left_out() -> None:
    space = a_space(
        {
            "optim.nesterov": {"kind": "choice", "values": [False, True]},
            "optim.momentum": {"kind": "uniform", "low": 0.5, "high": 0.95, "when": {"optim.nesterov": True}},
        },
        metric="val/loss",
    )
    rows = [ranked(n, {"optim.nesterov": False}, float(n)) for n in range(4)]
    parameters, words = narrowed(space, Ranking("val/loss", tuple(rows), None), 0.25, lambda *_: True)
    assert list(parameters) == ["optim.nesterov"]
    assert words == [
        "optim.nesterov: False, True became False",
        "optim.momentum: is left out, since it is never active in the new space",
    ]


def test_too_few_points_to_narrow(tmp_path: Path) -> None:
    write(tmp_path, played(a_space(RANGES, trials=2)))
    with pytest.raises(UserError, match="points have reached their end, 4 are needed; run more trials first"):
        next_space_text(tmp_path, 0.25, tmp_path / "next.yaml")
