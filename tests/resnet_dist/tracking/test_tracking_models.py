from __future__ import annotations

import sys
import warnings
from pathlib import Path

import mlflow.pyfunc
import mlflow.pytorch
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from resnet_dist.errors import Fault, UserError
from resnet_dist.models import build_model
from resnet_dist.models.classifier import ImageClassifier
from resnet_dist.tracking.mlflow_run import open_run
from resnet_dist.tracking.model_loading import load_classifier
from resnet_dist.tracking.models import log_classifier

CLASSES = tuple("0123456789")
EXAMPLE = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
METADATA = {"recipe": "seed: 1\n", "recipe_hash": "ab" * 8, "data_digest": "xxh3_128:cd"}


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    net = build_model("resnet20", 10)
    module = ImageClassifier(net, mean=(10.0, 20.0, 30.0), std=(50.0, 60.0, 70.0), channels_last=True)
    with torch.no_grad():  # running statistics that are not 0 and 1
        module(torch.from_numpy(EXAMPLE).repeat(8, 1, 1, 1))
    return module


def begin(uri: str, run_dir: Path):
    return open_run(uri, "exp", "r", run_dir, {}, {"optim.lr": "0.1"})


def log(handle, module, **changes):
    arguments = {"name": "last", "input_example": EXAMPLE, "resize": 36, "class_names": CLASSES}
    arguments |= {"metadata": METADATA, "step": 120}
    return log_classifier(handle, module, **(arguments | changes))


def logged(handle):
    return MlflowClient(handle.tracking_uri).search_logged_models([handle.experiment_id])


def images(num: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(num).integers(0, 256, (num, 32, 32, 3), dtype=np.uint8))


def test_a_logged_model_gives_the_same_logits_for_any_batch(sqlite_uri, tmp_path, classifier, monkeypatch):
    assert classifier.training
    handle = begin(sqlite_uri, tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what a user would see at the end of a training
        uri = log(handle, classifier)
    assert classifier.training  # the trained module is left as it was
    monkeypatch.setenv("MLFLOW_TRACKING_URI", sqlite_uri)
    plain = mlflow.pytorch.load_model(uri)
    by_run = mlflow.pytorch.load_model(f"runs:/{handle.run_id}/last")
    module, metadata = load_classifier(uri, tracking_uri=sqlite_uri)
    reference = classifier.eval()
    try:
        for num in (1, 2, 5, 33):
            with torch.no_grad():
                wanted = reference(images(num))
                for loaded in (plain, by_run, module):
                    torch.testing.assert_close(loaded(images(num)), wanted, rtol=0, atol=1e-5)
    finally:
        classifier.train()
    assert metadata == METADATA | {"class_names": list(CLASSES), "step": 120}
    assert module.eval() is module
    assert not module.training
    with pytest.raises(RuntimeError, match="resume from a checkpoint"):
        module.train()
    assert module.to("meta")(images(3).to("meta")).device.type == "meta"  # no device is fixed in the graph
    (model,) = logged(handle)
    assert (str(model.status), model.name, model.source_run_id) == ("READY", "last", handle.run_id)
    assert model.params == {"optim.lr": "0.1"}
    run = MlflowClient(sqlite_uri).get_run(handle.run_id)
    assert [(o.model_id, o.step) for o in run.outputs.model_outputs] == [(model.model_id, 120)]
    (requirements,) = tmp_path.rglob("requirements.txt")
    assert [line.split("==")[0] for line in requirements.read_text().split()] == [
        "mlflow",
        "torch",
        "numpy",
        "pandas",
        "pillow",
    ]


def test_a_logged_model_needs_none_of_our_code(sqlite_uri, tmp_path, classifier, monkeypatch):
    handle = begin(sqlite_uri, tmp_path / "run")
    log(handle, classifier)
    (folder,) = (path.parent for path in tmp_path.rglob("MLmodel"))
    for module in [name for name in sys.modules if name.split(".")[0] == "resnet_dist"]:
        monkeypatch.setitem(sys.modules, module, None)  # from here on, importing it is an ImportError
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    loaded = mlflow.pytorch.load_model(str(folder))
    assert loaded(images(3)).shape == (3, 10)
    served = mlflow.pyfunc.load_model(str(folder))
    assert len(served.predict({"image": list(images(3).numpy())})) == 3


def test_the_same_step_is_logged_once_and_another_step_anew(sqlite_uri, tmp_path, classifier):
    handle = begin(sqlite_uri, tmp_path / "run")
    first = log(handle, classifier)
    assert log(begin(sqlite_uri, tmp_path / "run"), classifier) == first
    assert log(handle, classifier, step=240) != first
    assert log(handle, classifier, name="best") != first
    assert len(logged(handle)) == 3
    assert len(MlflowClient(sqlite_uri).get_run(handle.run_id).outputs.model_outputs) == 3


@pytest.mark.parametrize("moment", ["log_model_artifacts", "finalize_logged_model", "log_outputs"])
def test_a_kill_at_any_moment_leaves_one_good_model_after_the_rerun(
    sqlite_uri, tmp_path, classifier, monkeypatch, moment
):
    class Killed(BaseException):
        pass

    def kill(*args, **kwargs):
        raise Killed

    handle = begin(sqlite_uri, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, moment, kill)
        patch.setattr(MlflowClient, "delete_logged_model", kill)  # a killed process does not tidy up
        with pytest.raises(Killed):
            log(handle, classifier)
    assert len(logged(handle)) == 1
    uri = log(handle, classifier)
    (model,) = logged(handle)
    assert uri == f"models:/{model.model_id}"
    assert str(model.status) == "READY"
    run = MlflowClient(sqlite_uri).get_run(handle.run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]
    load_classifier(uri, tracking_uri=sqlite_uri)


def test_a_failure_leaves_no_row_behind(sqlite_uri, tmp_path, classifier, monkeypatch):
    handle = begin(sqlite_uri, tmp_path / "run")

    class Unexportable(torch.nn.Module):
        def forward(self, x):
            return x.float().mean((1, 2)) if x.float().sum() > 0 else x.float()

    with pytest.raises(Exception, match="data-dependent"):
        log(handle, Unexportable())
    assert len(logged(handle)) == 0
    monkeypatch.setattr(
        MlflowClient, "log_model_artifacts", lambda *a: (_ for _ in ()).throw(mlflow.MlflowException("disk full"))
    )
    with pytest.raises(Fault, match="logging the model last failed: disk full"):
        log(handle, classifier)
    assert len(logged(handle)) == 0


@pytest.mark.parametrize("example", [EXAMPLE[:1], EXAMPLE.astype(np.float32), EXAMPLE[0]])
def test_an_example_that_would_fix_the_batch_is_a_mistake_of_the_caller(sqlite_uri, tmp_path, classifier, example):
    with pytest.raises(ValueError, match=r"uint8 \[2, S, S, 3\]"):
        log(begin(sqlite_uri, tmp_path / "run"), classifier, input_example=example)


def test_a_model_that_is_not_there_is_the_users_to_mend(sqlite_uri, tmp_path, monkeypatch):
    for uri in ("models:/m-0123456789abcdef", "models:/nobody@champion", f"runs:/{'a' * 32}/last"):
        with pytest.raises(UserError, match="cannot be loaded"):
            load_classifier(uri, tracking_uri=sqlite_uri)
    with pytest.raises(UserError, match="MLmodel"):
        load_classifier(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no MLflow database"):
        load_classifier("models:/m-0123456789abcdef", tracking_uri="sqlite:///absent.db")
    assert not (tmp_path / "absent.db").exists()


def test_a_model_is_found_by_its_run_and_by_its_registered_name(sqlite_uri, tmp_path, classifier, monkeypatch):
    handle = begin(sqlite_uri, tmp_path / "run")
    uri = log(handle, classifier)
    log(handle, classifier, step=90)
    client = MlflowClient(sqlite_uri)
    client.create_registered_model("digits")
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", sqlite_uri)  # mlflow's sqlite registry looks the source up there
        client.create_model_version("digits", uri, run_id=handle.run_id)
    client.set_registered_model_alias("digits", "champion", "1")
    for name in (f"runs:/{handle.run_id}/last", "models:/digits/1", "models:/digits@champion"):
        assert load_classifier(name, tracking_uri=sqlite_uri)[1]["step"] == 120


def test_through_a_real_server(server, tmp_path, classifier):
    handle = begin(server.uri, tmp_path / "run")
    uri = log(handle, classifier)
    assert log(handle, classifier) == uri
    module, metadata = load_classifier(uri, tracking_uri=server.uri)
    reference = classifier.eval()
    with torch.no_grad():
        torch.testing.assert_close(module(images(5)), reference(images(5)), rtol=0, atol=1e-5)
    classifier.train()
    assert metadata["class_names"] == list(CLASSES)
    assert len(logged(handle)) == 1
