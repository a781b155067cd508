"""What is due at a step: pure functions, so that a resumed run does exactly what an undisturbed one does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resnet_dist.training.schedule import RunPlan

plans = st.builds(
    RunPlan,
    steps_per_epoch=st.integers(1, 12),
    total_steps=st.just(60),
    last_step=st.integers(1, 60),
    eval_every_epochs=st.integers(1, 4),
    save_every_epochs=st.integers(1, 4),
    save_every_steps=st.none() | st.integers(1, 9),
    log_every_steps=st.integers(1, 9),
)
PLAN = RunPlan(
    steps_per_epoch=5,
    total_steps=20,
    last_step=18,
    eval_every_epochs=2,
    save_every_epochs=1,
    save_every_steps=3,
    log_every_steps=4,
)


def test_what_is_due_where() -> None:
    steps = range(PLAN.last_step + 1)
    assert [s for s in steps if PLAN.evaluation_due(s)] == [10, 18]
    assert [s for s in steps if PLAN.checkpoint_due(s)] == [3, 5, 6, 9, 10, 12, 15, 18]
    assert [s for s in steps if s and PLAN.point_due(s)] == [3, 4, 5, 6, 8, 9, 10, 12, 15, 16, 18]
    assert [PLAN.epoch_ends_at(s) for s in (0, 4, 5, 16)] == [5, 5, 10, 18]


@given(plans)
def test_a_run_always_ends_evaluated_and_saved(plan: RunPlan) -> None:
    assert plan.evaluation_due(plan.last_step)
    assert plan.checkpoint_due(plan.last_step)
    assert plan.point_due(plan.last_step)


@given(plans)
def test_nothing_is_saved_before_its_losses_were_looked_at(plan: RunPlan) -> None:
    assert all(plan.point_due(step) for step in range(plan.last_step + 1) if plan.checkpoint_due(step))


@given(plans)
def test_nothing_is_due_before_the_first_step(plan: RunPlan) -> None:
    assert not plan.evaluation_due(0)
    assert not plan.checkpoint_due(0)


@given(plans)
def test_every_epoch_ends_with_a_point(plan: RunPlan) -> None:
    for step in range(plan.last_step):
        end = plan.epoch_ends_at(step)
        assert step < end <= plan.last_step
        assert plan.point_due(end)
