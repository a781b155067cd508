"""An evaluation's folder keeps the numbers of one evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resnet_dist.errors import UserError
from resnet_dist.evaluation.evaluate import require_same_evaluation
from resnet_dist.tracking.mlflow_run import run_file

FACTS = {"models": ["runs/a"], "protocol": "1-crop", "size": [32]}


def test_a_folder_with_the_run_of_another_evaluation_is_not_written_to(tmp_path: Path) -> None:
    require_same_evaluation(FACTS, tmp_path)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "result.json").write_text(json.dumps({**FACTS, "metrics": {"val/top1": 70.0}}))
    require_same_evaluation({**FACTS, "protocol": "flip"}, tmp_path)  # files alone are written again
    run_file(tmp_path).write_text("{}")
    require_same_evaluation(FACTS, tmp_path)
    with pytest.raises(UserError, match=r"holds the MLflow run of another evaluation \(other protocol, size\); name"):
        require_same_evaluation({**FACTS, "protocol": "flip", "size": [40]}, tmp_path)
