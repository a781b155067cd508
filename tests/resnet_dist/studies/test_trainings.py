"""The degradation study's plan, table and verdicts, on synthetic histories."""

from __future__ import annotations

from resnet_dist.studies.study import study_recipe
from resnet_dist.studies.trainings import CONTROL_LR, LR, Training, degradation_report, findings, plan_trainings
from resnet_dist.tracking.spool import History


def history(train: float, val: float = 5.0) -> History:
    return History({"train/top1_error": [(11, 90.0), (308, train)], "train/loss": [(308, 0.1)],
                    "val/top1_error": [(308, val)]})  # fmt: skip


def histories(deep_plain: float) -> dict[Training, History]:
    return {
        training: history(deep_plain if training.net == "plain56" else 0.0)
        for training in plan_trainings((56, 20), (0, 1))
    }


def test_every_seed_and_one_control_cheap_ones_first() -> None:
    trainings = plan_trainings((56, 20), (3, 4))
    assert [(t.net, t.lr, t.seed) for t in trainings] == [
        (net, lr, seed)
        for lr, seed in ((LR, 3), (LR, 4), (CONTROL_LR, 3))
        for net in ("plain20", "resnet20", "plain56", "resnet56")
    ]


def test_the_report_shows_every_seed_and_says_what_held() -> None:
    text = degradation_report(histories(61.25))
    assert "| 56 | 61.2 / 61.2 | 0.0 / 0.0 | 0.1000 / 0.1000 |" in text
    assert "| 56 | 61.2 | 0.0 | 0.1000 |" in text
    assert text.count(": holds (") == 3


def test_a_claim_that_does_not_hold_is_reported_so() -> None:
    lines = findings(histories(0.0), [20, 56], [0, 1])
    assert sum(": does not hold (" in line for line in lines) == 3


def test_the_recipe_is_valid_for_every_net_and_differs_by_net_rate_and_seed_only() -> None:
    base = study_recipe("plain56").model_dump()
    other = study_recipe("resnet56", lr=0.01, seed=1).model_dump()
    assert {key for key in base if base[key] != other[key]} == {"model", "optim", "seed"}
