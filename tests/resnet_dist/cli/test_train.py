"""`resnet-dist train`: its exit code and last line say how the run came out."""

from __future__ import annotations

from pathlib import Path

import pytest

from resnet_dist.cli import main
from resnet_dist.cli.train import overfitting, require_overfit
from resnet_dist.config.loading import load_recipe
from resnet_dist.errors import Fault
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


RECIPES = sorted((ROOT / "resnet_dist/recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_made_to_overfit_a_batch(path: Path) -> None:
    whole = load_recipe(path)
    recipe = overfitting(whole)
    assert recipe.data.overfit_batch
    assert recipe.data.mixing is recipe.train.ema is None
    assert (recipe.train.max_steps, recipe.optim, recipe.train.loss) == (200, whole.optim, whole.train.loss)


def test_a_loss_near_zero_without_mistakes_is_overfit() -> None:
    recipe = load_recipe(RECIPES[1])
    said = require_overfit({"train/loss": 0.01, "train/top1_error": 0.0}, recipe, 200)
    assert said.startswith("overfits, as it should: after 200 steps on one batch of 128 images")
    for loss, wrong in ((1.0, 0.0), (0.01, 1.0), (float("nan"), 0.0)):
        with pytest.raises(Fault, match=r"does not overfit: after 200 steps .* try more steps"):
            require_overfit({"train/loss": loss, "train/top1_error": wrong}, recipe, 200)
