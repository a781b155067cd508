"""`resnet-dist train`: its exit code and last line say how the run came out."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.cli import main
from resnet_dist.launch.publish import RunResult
from resnet_dist.training.context import TrainingOutcome

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("outcome", "code", "line"),
    [
        ("finished", 0, "top-1 50.00 % on the validation set after 4 steps"),
        ("stopped", 143, "stopped after step 4; the same command resumes from there (runs/r)"),
        ("diverged", 1, "resnet-dist: training diverged: loss nan (runs/r); lower optim.lr or lengthen"),
    ],
)
def test_how_a_run_came_out(
    outcome: TrainingOutcome, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = RunResult(
        name="r",
        run_dir="runs/r",
        run_id="1",
        tracking_uri="sqlite:////m.db",
        model_uri="",
        checkpoint="",
        step=4,
        metrics={"val/top1": 50.0},
        outcome=outcome,
        reason="loss nan",
        stop_signal=15,
    )
    monkeypatch.setattr("resnet_dist.launch.train.train", lambda *_: result)
    recipe, profile = ROOT / "resnet_dist/recipes/digits_resnet20.yaml", ROOT / "cluster/profiles/laptop.yaml"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # of other tests; a warning would come first
    monkeypatch.setattr("sys.argv", ["resnet-dist", "train", str(recipe), "--on", str(profile)])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert (ended.value.code or 0) == code
    assert (out or err).startswith(line)
