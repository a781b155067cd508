"""The simulation of failures: compared with formulas where they exist; otherwise the parts must add up."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_dist.errors import UserError
from resnet_dist.planner.simulate import Fleet, Policy, best_interval_s, checkpoint_cost, simulate

HOUR, DAY, WEEK = 3600.0, 86400.0, 7 * 86400.0
NEVER = 1e15
POLICY = Policy(checkpoint_every_s=600, snapshot_s=5, write_s=20, restart_s=60, resize_every_s=300)
FLEET = Fleet(nodes=16, largest=16, smallest=16, mtbf_s=NEVER, repair_s=HOUR)


def per_node(nodes: int) -> float:
    return float(nodes)


def test_without_faults_only_start_and_checkpoints_cost() -> None:
    spent = simulate(FLEET, POLICY, per_node, 16 * DAY, seed=0).spent
    assert (spent.useful_s, spent.restart_s, spent.redone_s) == (DAY, 60, pytest.approx(0, abs=1e-6))
    assert spent.checkpoint_s == pytest.approx(DAY / 600 * 5)


def test_spare_nodes_make_it_the_renewal_formula() -> None:
    """Poisson failures of rate f, work saved every tau: time per tau of work is (e^(f (tau + pause)) - 1) / f restarts
    apart (Daly 2006, equation for the expected time of a segment), and each failure costs a restart."""
    nodes, weeks = 1000, 3
    mtbf = 5000 * HOUR
    fleet = Fleet(nodes=nodes + 50, largest=nodes, smallest=nodes, mtbf_s=mtbf, repair_s=HOUR)
    policy = replace(POLICY, write_s=0.0)
    runs = [simulate(fleet, policy, per_node, nodes * weeks * WEEK, seed=s) for s in range(6)]
    rate, cycle = nodes / mtbf, policy.checkpoint_every_s + policy.snapshot_s
    segment = (math.exp(rate * cycle) - 1) / rate * math.exp(rate * policy.restart_s)
    expected = weeks * WEEK / policy.checkpoint_every_s * segment
    assert mean(run.spent.wall_s for run in runs) == pytest.approx(expected, rel=0.005)
    assert mean(run.failures for run in runs) == pytest.approx(expected * rate, rel=0.1)


def test_thousands_of_elastic_spot_nodes_over_weeks() -> None:
    """8,000 workers for two weeks, each node preempted every third day: the group shrinks, saves, grows."""
    nodes = 1000
    fleet = Fleet(
        nodes=nodes, largest=nodes, smallest=100, mtbf_s=6300 * HOUR, repair_s=4 * HOUR,
        preempted_every_s=3 * DAY, notice_s=120, replaced_s=600,
    )  # fmt: skip
    warned = simulate(fleet, POLICY, per_node, nodes * 2 * DAY, seed=1)
    unwarned = simulate(replace(fleet, notice_s=0), POLICY, per_node, nodes * 2 * DAY, seed=1)
    assert warned.preemptions > 300
    assert warned.spent.redone_s < unwarned.spent.redone_s
    assert warned.spent.goodput > unwarned.spent.goodput


def test_an_elastic_group_continues_where_a_fixed_one_waits() -> None:
    fleet = replace(FLEET, mtbf_s=200 * HOUR, repair_s=10 * HOUR)
    fixed = simulate(fleet, POLICY, per_node, 16 * WEEK, seed=3)
    elastic = simulate(replace(fleet, smallest=8), POLICY, per_node, 16 * WEEK, seed=3)
    assert fixed.spent.waiting_s > 10 * HOUR
    assert elastic.spent.waiting_s == 0
    assert elastic.resizes > 0
    assert elastic.spent.wall_s < fixed.spent.wall_s


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    nodes=st.integers(1, 40),
    spare=st.integers(0, 4),
    smallest=st.floats(0.1, 1),
    mtbf_h=st.floats(20, 2000),
    preempted_h=st.one_of(st.none(), st.floats(10, 500)),
    notice=st.sampled_from([0.0, 30.0, 120.0]),
    days=st.floats(0.05, 3),
)
def test_the_books_balance(seed, nodes, spare, smallest, mtbf_h, preempted_h, notice, days) -> None:
    fleet = Fleet(
        nodes=nodes + spare, largest=nodes, smallest=max(1, int(smallest * nodes)), mtbf_s=mtbf_h * HOUR,
        repair_s=HOUR, preempted_every_s=preempted_h and preempted_h * HOUR, notice_s=notice, replaced_s=HOUR,
    )  # fmt: skip
    run = simulate(fleet, POLICY, per_node, nodes * days * DAY, seed)
    spent = run.spent
    assert spent.useful_s == pytest.approx(days * DAY)
    assert min(spent.smaller_group_s, spent.redone_s, spent.checkpoint_s, spent.waiting_s) > -1e-3
    assert spent.restart_s > 0
    assert run.node_s <= nodes * spent.wall_s + 1e-3
    assert run == simulate(fleet, POLICY, per_node, nodes * days * DAY, seed)


def test_a_hopeless_fleet_ends_with_a_line() -> None:
    with pytest.raises(UserError, match="faster than the group makes progress"):
        simulate(replace(FLEET, mtbf_s=600, repair_s=60), POLICY, per_node, 16 * DAY, seed=0)


def test_the_best_interval_is_youngs_within_its_limits() -> None:
    cost = checkpoint_cost(100_000_000_000)  # 10 s of a pause
    assert best_interval_s(cost, 10 * DAY) == pytest.approx(math.sqrt(2 * 10 * 10 * DAY))
    assert best_interval_s(checkpoint_cost(1000), HOUR) == 60
