"""Schedulers compared on recorded curves: exact where the curves determine the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from resnet_dist.cli import app
from resnet_dist.config.space import Space
from resnet_dist.errors import UserError
from resnet_dist.sweeps.analysis.compare import Comparison, Row, compare
from resnet_dist.sweeps.ledger import SweepState, TrialOutcome, encode, replay, trial_name
from tests.resnet_dist.sweeps.ledgers import COOLDOWN, RecordedRun, events_of

POINTS, EPOCHS, RUNGS = 9, 9, (1, 3)
ASHA, ANNEALED, HALVING = "{kind: asha}", "{kind: annealed}", "{kind: halving, rungs: [1, 3, 9]}"
RECORD = {"kind": "record", "cooldowns": [0.11, 0.33], "cooldown": COOLDOWN, "shorts": RUNGS}
Curve = Callable[[int, int, int], float]
"""(point, seed, epoch) -> top-1."""


def events_of_sweep(
    curve: Curve,
    *,
    seeds: int = 1,
    last: TrialOutcome = "finished",
    annealed: Callable[[int, int], float] | None = None,
    **changes: Any,
) -> list[Any]:
    """`annealed`: (point, rung) -> top-1 of its cooldown and of its short schedule."""
    space = {
        "base": "b",
        "space": {"optim.lr": {"kind": "loguniform", "low": 1e-3, "high": 1}},
        "search": {"kind": "random"},
        "scheduler": RECORD if annealed else {"kind": "fifo"},
        "trials": POINTS,
        "budget": {"wall_hours": 0.001, "epochs": 5},
        "seeds": seeds,
    }
    points = [{"optim.lr": 0.01 + point / 10} for point in range(POINTS)]
    runs = [
        RecordedRun(
            number=number,
            seed=seed,
            point=point,
            outcome=last if number == POINTS - 1 else "finished",
            scores=[curve(number, seed, epoch) for epoch in range(1, EPOCHS + 1)],
        )
        for number, point in enumerate(points)
        for seed in range(seeds)
    ]
    runs += [
        RecordedRun(number, 0, point, "finished", [annealed(number, rung)], kind=kind, rung=rung)
        for number, point in enumerate(points)
        for kind in ("cooldown", "short")
        for rung in RUNGS
        if annealed is not None
    ]
    return events_of(Space.model_validate({**space, **changes}), runs, base={})


def a_sweep(curve: Curve, **options: Any) -> SweepState:
    return replay(events_of_sweep(curve, **options))


def on_other_data(state: SweepState, name: str) -> SweepState:
    assert state.began is not None
    vars(state.began).update(name=name, data_digest=name)
    return state


def rows(
    sweeps: SweepState | Sequence[SweepState], *schedulers: str, draws: int = 10, **options: Any
) -> dict[str, Row]:
    sweeps = [sweeps] if isinstance(sweeps, SweepState) else sweeps
    found = compare(sweeps, schedulers or [ASHA], num_draws=draws, **{"num_points": POINTS, **options}).rows
    return {row.rule: row for row in found}


def better_with_number(point: int, seed: int, epoch: int) -> float:
    return 50.0 + point + epoch


def misleading(point: int, seed: int, epoch: int) -> float:
    """Before the end the ranking is upside down."""
    return 50.0 + point if epoch == EPOCHS else 30.0 - point


def test_where_curves_never_cross_early_stopping_loses_nothing() -> None:
    table = rows(a_sweep(better_with_number), draws=100)
    everything, asha, by_chance = table.values()
    assert (everything.epochs, everything.share, everything.regret.mean, everything.hits) == (81, 1, 0, 1)
    assert (asha.regret.mean, asha.median, asha.below_90, asha.hits, asha.random_share) == (0, 0, 0, 1, 1)
    assert asha.epochs < 0.7 * 81
    assert by_chance.regret.mean > 0.5
    assert asha.difference is not None
    assert asha.difference.high < 0
    assert asha.ratio == 0


def test_a_late_bloomer_is_lost_unless_nobody_was_there_to_beat_it() -> None:
    """Worst until the last epoch, then best: it continues only as the first of the order, one draw in nine."""

    def curve(point: int, seed: int, epoch: int) -> float:
        return (90.0 if epoch == EPOCHS else 1.0) if point == 0 else 40.0 + point

    asha = rows(a_sweep(curve), draws=150)[ASHA]
    assert 0.06 < asha.hits < 0.17
    assert asha.median == 90 - 48


@pytest.mark.parametrize(
    ("scheduler", "epochs"),
    [
        (ANNEALED, 9 * 1 * (1 + COOLDOWN) + 3 * (2 + 3 * COOLDOWN) + 6),
        (HALVING, 9 * 1 + 3 * 3 + 9),
    ],
)
def test_rules_that_judge_annealed_scores_see_what_was_recorded_and_pay_for_it(scheduler: str, epochs: float) -> None:
    table = rows(a_sweep(misleading, annealed=lambda point, rung: 40.0 + point), ASHA, scheduler, at_once=3)
    assert table[ASHA].regret.mean > 1
    assert table[scheduler].regret.mean == 0
    assert table[scheduler].epochs == pytest.approx(epochs)
    assert table[scheduler].share == pytest.approx(epochs / 81)


def test_how_well_scores_from_before_the_end_rank_the_points() -> None:
    found = compare([a_sweep(misleading, annealed=lambda point, rung: 40.0 + point)], [ASHA], num_draws=10)
    ranked = {(score.what, score.epoch): (score.correlation, score.among_better) for score in found.early_scores}
    assert ranked == {
        **{("the run as it is", epoch): pytest.approx((-1, -1)) for epoch in (1, 3)},
        **{("cooldown of 20%", epoch): pytest.approx((1, 1)) for epoch in (1, 3)},
        **{("short schedule, tau kept", epoch): pytest.approx((1, 1)) for epoch in (1, 3)},
    }
    assert "| the run as it is | -1.00 / -1.00 | -1.00 / -1.00 |" in found.markdown()
    # Equal scores tell nothing.
    flat = compare([a_sweep(lambda point, seed, epoch: 50.0 + point * (epoch == EPOCHS))], [ASHA], num_draws=10)
    assert {score.correlation for score in flat.early_scores} == {0}


def test_random_search_finds_the_best_point_in_as_many_draws_as_its_share_of_the_epochs() -> None:
    """Also between two whole numbers of points; 24.6 epochs are 2.73 of them."""
    state = a_sweep(misleading, annealed=lambda point, rung: 40.0 + point)
    found = compare([state], [ANNEALED], num_draws=10, num_points=POINTS).rows
    annealed, by_chance = found[1:]
    assert by_chance.epochs == pytest.approx(annealed.epochs)
    assert by_chance.hits == pytest.approx(annealed.epochs / 81)
    # The best of n of N equally spaced scores is on average (N - n) / (n + 1) below the best.
    num = annealed.epochs / 9
    two, three = (9 - 2) / 3, (9 - 3) / 4
    assert by_chance.regret.mean == pytest.approx(two + (num - 2) * (three - two))
    assert rows(state, "{kind: fifo}")["{kind: fifo}"].random_share == 1


def test_draws_of_a_part_of_the_points_are_judged_by_their_own_best() -> None:
    part = compare([a_sweep(better_with_number)], [ASHA], num_draws=20)
    assert "20 draws of 6 of the points" in part.head
    assert part.rows[0].epochs == 54
    assert (part.rows[1].regret.mean, part.rows[1].hits) == (0, 1)


def test_the_orders_are_the_seeds() -> None:
    def by(seed: int) -> Comparison:
        return compare([a_sweep(misleading)], [ASHA], num_draws=10, orders_seed=seed)

    assert by(1) == by(1)
    assert by(1).rows != by(2).rows


def test_the_picked_point_is_also_scored_by_its_other_seeds() -> None:
    """Each seed loves another point; over both, point 5 is best."""

    def curve(point: int, seed: int, epoch: int) -> float:
        lucky = {0: 1, 1: 7}
        return 80.0 if point == lucky[seed] else 70.0 if point == 5 else 50.0

    everything = rows(a_sweep(curve, seeds=2))["every point to its end"]
    assert everything.regret.mean == 0
    assert everything.regret_elsewhere is not None
    assert everything.regret_elsewhere.mean == 20


def test_seeds_that_not_every_point_has_do_not_count() -> None:
    state = a_sweep(lambda point, seed, epoch: 50.0 + point - 30 * seed, seeds=2)
    del state.trials[trial_name(3, 1)]
    assert rows(state)["every point to its end"].regret_elsewhere is None


def test_studies_on_other_data_are_pooled_and_shown_one_by_one() -> None:
    def upside_down(point: int, seed: int, epoch: int) -> float:
        return better_with_number(-point, seed, epoch) if epoch == EPOCHS else better_with_number(point, seed, epoch)

    sweeps = [a_sweep(better_with_number), on_other_data(a_sweep(upside_down), "other")]
    found = compare(sweeps, [ASHA], num_draws=50, num_points=POINTS)
    asha = found.rows[1]
    assert asha.by_study[0] == 0
    assert asha.by_study[1] > 3
    assert asha.regret.mean == pytest.approx(sum(asha.by_study) / 2)  # as many draws on each
    assert asha.regret.low < 1 < asha.regret.high - 2
    # Point 8 is best in one study and worst in the other; so no pick is better than another by the other study's runs.
    assert found.rows[0].regret_elsewhere is not None
    assert "| played | other |" in found.markdown()
    assert found.notes[0].startswith("played: Best: optim.lr 0.81 (t0008) with val/top1 67 ")
    assert found.notes[1].startswith("other: Best: optim.lr 0.01 (t0000) with val/top1 59 ")


def test_sweeps_on_the_same_data_are_one_study_with_the_curves_of_both() -> None:
    recorded = a_sweep(misleading, annealed=lambda point, rung: 40.0 + point)
    found = compare([a_sweep(misleading), recorded], [ANNEALED], num_draws=10)
    assert found.studies == ("played+played",)
    assert found.rows[1].regret.mean == 0


def test_sweeps_of_other_points_or_other_recipes_are_not_compared() -> None:
    other = on_other_data(a_sweep(misleading, proxy={"train.total_epochs": 3}), "other")
    with pytest.raises(UserError, match=r"other is not played on other data .*proxy\.train\.total_epochs unset -> 3"):
        rows([a_sweep(misleading), other])


def test_a_trial_that_diverged_is_worst() -> None:
    everything = rows(a_sweep(better_with_number, last="diverged"), at_once=2)["every point to its end"]
    assert (everything.regret.mean, everything.hits) == (0, 1)


def test_sweeps_of_any_search_can_be_compared() -> None:
    grid = {"optim.lr": {"kind": "grid", "values": [0.01 + point / 10 for point in range(POINTS)]}}
    assert rows(a_sweep(better_with_number, space=grid, search={"kind": "grid"}))[ASHA].regret.mean == 0
    assert rows(a_sweep(better_with_number, search={"kind": "tpe"}), "{kind: hyperband}")


def test_a_sweep_that_stopped_trials_tells_nothing_of_their_ends() -> None:
    with pytest.raises(UserError, match=r"whose points have all reached their end; not so: t0008"):
        rows(a_sweep(better_with_number, last="stopped"))


@pytest.mark.parametrize(
    ("schedulers", "missing", "recorder"),
    [
        ([ANNEALED], "t0000-c1", "{kind: record, cooldowns: [0.11, 0.33], cooldown: 0.2}"),
        ([HALVING], "t0000-e1", "{kind: record, shorts: [1, 3], carry: tau}"),
        (
            [ASHA, "{kind: annealed, rungs: [0.5], cooldown: 0.4}", HALVING],
            "t0000-c5",
            "{kind: record, cooldowns: [0.5], cooldown: 0.4, shorts: [1, 3], carry: tau}",
        ),
    ],
)
def test_curves_that_were_not_recorded_are_named_with_how_to_record_them(
    schedulers: list[str], missing: str, recorder: str
) -> None:
    with pytest.raises(UserError) as error:
        rows(a_sweep(misleading), *schedulers)
    assert f"played did not record what it sees ({missing}, " in str(error.value)
    assert f"`scheduler: {recorder}`" in str(error.value)


@pytest.mark.parametrize(
    "scheduler", ["{kind: annealed, cooldown: 0.1}", "{kind: halving, rungs: [1, 3, 9], carry: tau_share}"]
)
def test_another_cooldown_and_another_carry_are_other_curves(scheduler: str) -> None:
    with pytest.raises(UserError, match="did not record what it sees"):
        rows(a_sweep(misleading, annealed=lambda point, rung: 1.0), scheduler)


@pytest.mark.parametrize(
    ("scheduler", "options", "message"),
    [
        ("{kind: asah}", {}, "--scheduler: scheduler"),
        ("{kind: halving, rungs: [1, 3]}", {}, "the last of its rungs must be the 9 epochs of played"),
        (ASHA, {"num_points": 10}, "draws of 10 points, but 9 were recorded; give fewer with --points"),
    ],
)
def test_mistakes_are_named(scheduler: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows(a_sweep(better_with_number), scheduler, **options)


def test_the_command_reads_folders_and_bare_ledgers(tmp_path: Path) -> None:
    lines = b"".join(map(encode, events_of_sweep(better_with_number)))
    for path in (tmp_path / "sweep/ledger.jsonl", tmp_path / "kept.jsonl"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(lines)
    words = ["tune", "compare", str(tmp_path / "sweep"), str(tmp_path / "kept.jsonl"), "--draws", "10"]
    table = CliRunner().invoke(app, words, catch_exceptions=False).output
    assert "| {kind: asha} |" in table
    found = json.loads(CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False).output)
    assert found["rows"][1]["regret"]["mean"] == 0
