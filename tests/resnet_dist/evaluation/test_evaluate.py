"""An evaluation's folder keeps the numbers of one evaluation; its device is the one that was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from resnet_dist.errors import Fault, UserError
from resnet_dist.evaluation.evaluate import EvaluationJob, _evaluate_share, require_same_evaluation
from resnet_dist.evaluation.protocols import Protocol
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_worker_that_is_to_have_a_gpu_does_not_evaluate_on_the_cpu() -> None:
    job = EvaluationJob((), Protocol("1-crop"), Path("none.beton"), num_threads=1, gpus_per_worker=1)
    with pytest.raises(Fault, match="gpus_per_worker is 1, but "):
        _evaluate_share(job, 0, 1)
