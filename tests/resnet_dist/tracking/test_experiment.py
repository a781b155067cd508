"""The runs of an experiment as rows, and two runs compared."""

from __future__ import annotations

import pytest

from resnet_dist.errors import UserError
from resnet_dist.tracking.experiment import Difference, RunRow, differences, find_run, list_runs
from resnet_dist.tracking.mlflow_run import end_run


def test_runs_are_listed_and_compared(sqlite_uri, tmp_path, logged_run):
    for name, lr in (("a", "0.1"), ("b", "0.2")):
        end_run(logged_run(sqlite_uri, tmp_path / name, name, **{"optim.lr": lr, "seed": "0"}), "FINISHED")
    rows = list_runs(sqlite_uri, "exp")
    assert [(row.name, row.status, row.metrics["val/top1"]) for row in rows] == [
        ("b", "FINISHED", 70.0),
        ("a", "FINISHED", 70.0),
    ]
    assert find_run(rows, "a").name == "a"
    assert find_run(rows, rows[0].run_id[:10]).name == "b"
    found = differences(find_run(rows, "a"), find_run(rows, "b"))
    assert found[0] == Difference("optim.lr", "0.1", "0.2")
    assert Difference("val/top1", "70", "70") in found
    assert [pair.key for pair in found if pair.key == "seed"] == []
    with pytest.raises(UserError, match="no run of this name"):
        find_run(rows, "no id begins so")
    twins = [RunRow("x", str(k), "e", "FINISHED", 0, 1.0, {}, {}, {}) for k in range(2)]
    with pytest.raises(UserError, match="2 runs"):
        find_run(twins, "x")
    with pytest.raises(UserError, match="no such experiment; there are Default, exp"):
        list_runs(sqlite_uri, "nope")
    with pytest.raises(UserError, match="no MLflow database"):
        list_runs(f"sqlite:///{tmp_path}/none.db")
