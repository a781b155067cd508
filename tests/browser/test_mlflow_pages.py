"""MLflow's pages in a real browser show what a run logs. Skipped where there is no Chromium."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from resnet_dist.bench.mlflow_server import MlflowServer
from resnet_dist.tracking.datasets import DataInput
from resnet_dist.tracking.mlflow_run import RunHandle, end_run, log_details, log_folder, open_run
from resnet_dist.tracking.models import log_classifier, log_model_metrics
from resnet_dist.tracking.plots import draw_plots
from resnet_dist.tracking.registry import Score, register
from resnet_dist.tracking.spool import read_history
from resnet_dist.tracking.tracker import CONFUSION, SpoolTracker

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
VAL = DataInput("digits/val", "cd" * 16, "validation", "/data/val.beton")


class Tiny(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((1, 2))


@dataclass(frozen=True)
class Site:
    uri: str
    handle: RunHandle
    model_id: str

    @property
    def experiment(self) -> str:
        return f"{self.uri}/#/experiments/{self.handle.experiment_id}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server with one finished run, logged as the driver and rank 0 log it."""
    server = MlflowServer(tmp_path_factory.mktemp("site"), environment={"MLFLOW_DISABLE_TELEMETRY": "true"})
    try:
        server.start()
        yield logged_site(server.uri, server.folder)
    finally:
        server.kill()


def logged_site(uri: str, folder: Path) -> Site:
    run_dir = folder / "run"
    handle = open_run(uri, "browsed", "my-run", run_dir, {"workers": "2"}, {"optim.lr": "0.125"})
    tracker = SpoolTracker(run_dir, handle.run_id, uri)
    for step in range(1, 21):
        tracker.metrics({"train/loss": 2.0 / step, "train/top1_error": 100.0 - 4 * step, "train/lr": 0.1}, step)
    tracker.metrics({"val/top1": 81.25, "val/top1_error": 18.75, "system/node-0/cpu_utilization_percentage": 37.5}, 20)
    tracker.text(CONFUSION, json.dumps({"num_classes": 2, "counts": [[0, 0, 3], [1, 1, 4]]}))
    assert tracker.flush(60)
    tracker.close()
    history = read_history(run_dir, handle.run_id)
    draw_plots(history, ("cat", "dog"), folder / "plots")
    log_folder(handle, folder / "plots", "plots")
    log_details(handle, description="A **described** run.", texts={"events.log": "zebra\n"}, inputs=[VAL])
    example = np.zeros((2, 8, 8, 3), np.uint8)
    model = log_classifier(
        handle,
        Tiny(),
        name="model",
        input_example=example,
        resize=8,
        class_names="abc",
        pictures={},
        metadata={},
        step=20,
    )
    log_model_metrics(handle, model, ["val/top1"], 20, history, VAL)
    register(handle, "digits-tiny", model, Score("cd", 81.25), {}, tuple("abc"))
    assert end_run(handle, "FINISHED")
    return Site(uri, handle, model.removeprefix("models:/"))


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., str]:
    """The page's DOM once all that `wanted` names is in it; a page that loads slowly is asked again."""

    def load(url: str, *wanted: str) -> str:
        for attempt in range(3):
            command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            command += ["--window-size=1920,2160", f"--virtual-time-budget={15000 * (attempt + 1)}"]
            command += [f"--user-data-dir={tmp_path}/{attempt}", "--dump-dom", url]
            dom = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout
            missing = [text for text in wanted if text not in dom]
            if not missing:
                return dom
        raise AssertionError(f"{url}: not on the page: {missing}")

    return load


def test_the_list_of_runs(site: Site, page: Callable[..., str]) -> None:
    page(f"{site.experiment}/runs", "my-run", "digits/val", "digits-tiny")


def test_a_runs_overview(site: Site, page: Callable[..., str]) -> None:
    wanted = ("val/top1", "81.25", "train/loss", "optim.lr", "0.125", "<strong>described</strong>", "digits-tiny")
    page(f"{site.experiment}/runs/{site.handle.run_id}", *wanted)


def test_a_runs_curves_are_drawn(site: Site, page: Callable[..., str]) -> None:
    dom = page(f"{site.experiment}/runs/{site.handle.run_id}/model-metrics", "top1_error", "js-line")
    assert dom.count('class="js-line"') >= 3  # one drawn curve for each metric with more than one point


def test_a_runs_artifacts(site: Site, page: Callable[..., str]) -> None:
    artifacts = f"{site.experiment}/runs/{site.handle.run_id}/artifacts"
    page(f"{artifacts}/events.log", "events.log", "plots", "zebra")
    page(f"{artifacts}/plots/learning_curves.png", "plots/learning_curves.png", "<img")


def test_the_models_page(site: Site, page: Callable[..., str]) -> None:
    wanted = ("digits-tiny", "val/top1", "81.25", "my-run", "digits/val", "after step 20")
    page(f"{site.experiment}/models/{site.model_id}", *wanted)
    page(f"{site.uri}/#/models/digits-tiny", "champion", "81.25 % top-1")  # the list cuts the rest off
