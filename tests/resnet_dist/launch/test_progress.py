"""The line that splits up the time of a start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import resnet_dist
from resnet_dist.launch.control import WorkerStatus
from resnet_dist.launch.progress import Startup, describe
from resnet_dist.training.schedule import RunPlan

RECIPES = Path(resnet_dist.__file__).parent / "recipes"


def test_every_stage_has_its_seconds_and_the_line_comes_once() -> None:
    times = iter([103.0, 104.0, 106.5, 110.0, 111.0])
    startup = Startup(lambda: next(times), began_s=100.0)
    startup.passed("imports")
    startup.passed("checks")
    assert startup.observe(WorkerStatus()) is None
    assert startup.observe(WorkerStatus(attempt=1, world_size=2)) is None
    assert startup.observe(WorkerStatus(attempt=1, world_size=2, step=40, resumed_step=40)) is None
    line = startup.observe(WorkerStatus(attempt=1, world_size=2, step=50, resumed_step=40))
    assert line == "start-up took 11.0 s: imports 3.0, checks 1.0, workers 2.5, data and model 3.5, first 10 steps 1.0"
    assert startup.observe(WorkerStatus(attempt=1, world_size=2, step=60, resumed_step=40)) is None


def test_stages_that_pass_between_two_looks_are_all_there() -> None:
    startup = Startup(lambda: 7.0, began_s=5.0)
    line = startup.observe(WorkerStatus(attempt=1, step=1, resumed_step=0))
    assert line == "start-up took 2.0 s: workers 2.0, data and model 0.0, first step 0.0"


@pytest.mark.system
def test_a_driver_does_not_import_pytorchs_compiler_to_check_a_recipe() -> None:
    """Seconds of every start, of which the workers alone have a use."""
    program = (
        "import sys; from pathlib import Path; import resnet_dist.launch.train; "
        "from resnet_dist.config.loading import load_recipe; "
        "from resnet_dist.launch.preflight import require_buildable; "
        f"require_buildable(load_recipe(Path({str(RECIPES / 'digits_resnet20.yaml')!r}), [])); "
        "print(sorted({'torch._dynamo', 'torchvision', 'timm', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_the_line_of_progress() -> None:
    plan = RunPlan(
        steps_per_epoch=11,
        total_steps=22,
        last_step=22,
        eval_every_epochs=1,
        save_every_epochs=1,
        save_every_steps=None,
        log_every_steps=10,
    )
    metrics = {"train/loss": 0.5, "val/top1": 98.125, "speed/images_per_s": 640.4}
    status = WorkerStatus(attempt=1, world_size=2, step=12, resumed_step=0, metrics=metrics)
    assert describe(status, plan) == "epoch 2/2, loss 0.5000, val top-1 98.12 %, 640 images/s"
    assert describe(WorkerStatus(), plan) == "epoch 1/2"
