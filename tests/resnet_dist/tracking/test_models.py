from __future__ import annotations

import io
import json
import math
import re
import sys
import warnings
import zipfile
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
from resnet_dist.tracking.datasets import DataInput
from resnet_dist.tracking.mlflow_run import open_run
from resnet_dist.tracking.models import log_classifier, log_model_metrics
from resnet_dist.tracking.registry import load_weights
from resnet_dist.tracking.spool import History, read_history

pytestmark = pytest.mark.system

VERSION_1 = Path(__file__).parent / "version_1" / "model"
"""A model as commit d23ff8b saved it: logits are linear in the mean of each colour / 64."""
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
    arguments = {"name": "last", "input_example": EXAMPLE, "resize": 36, "class_names": CLASSES, "pictures": {}}
    arguments |= {"metadata": METADATA, "step": 120}
    return log_classifier(handle, module, **(arguments | changes))


def logged(handle):
    """Those of the run: other tests' models may be on the same server."""
    return MlflowClient(handle.tracking_uri).search_logged_models(
        [handle.experiment_id], filter_string=f"source_run_id = '{handle.run_id}'"
    )


def assert_same_tensors(weights, classifier):
    wanted = dict(classifier.state_dict())
    assert weights.keys() >= {name for name in wanted if name.startswith("net.")}
    for name, value in weights.items():
        assert torch.equal(value, wanted[name]), name


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
    reference = classifier.eval()
    try:
        for num in (1, 2, 5, 33):
            with torch.no_grad():
                wanted = reference(images(num))
                for loaded in (plain, by_run):
                    torch.testing.assert_close(loaded(images(num)), wanted, rtol=0, atol=1e-5)
    finally:
        classifier.train()
    weights, metadata = load_weights(uri, tracking_uri=sqlite_uri)
    assert metadata == METADATA | {"class_names": list(CLASSES), "pictures": {}, "step": 120}
    assert_same_tensors(weights, classifier)
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


def test_the_same_step_is_logged_once_and_another_step_again(sqlite_uri, tmp_path, classifier):
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
    load_weights(uri, tracking_uri=sqlite_uri)


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


def test_a_model_that_is_not_there_is_the_users_to_fix(sqlite_uri, tmp_path, monkeypatch):
    for uri in ("models:/m-0123456789abcdef", "models:/nobody@champion", f"runs:/{'a' * 32}/last"):
        with pytest.raises(UserError, match="cannot be loaded"):
            load_weights(uri, tracking_uri=sqlite_uri)
    with pytest.raises(UserError, match="MLmodel"):
        load_weights(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no MLflow database"):
        load_weights("models:/m-0123456789abcdef", tracking_uri="sqlite:///absent.db")
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
        assert load_weights(name, tracking_uri=sqlite_uri)[1]["step"] == 120


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def change_record(archive, ending, change):
    """Changes the one record of the archive whose name ends so."""
    with zipfile.ZipFile(archive) as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    (name,) = [name for name in records if name.endswith(ending)]
    records[name] = change(records[name])
    with zipfile.ZipFile(archive, "w") as new:
        for name, content in records.items():
            new.writestr(name, content)


def as_pickles(config):
    tree = json.loads(config)
    for entry in tree["config"].values():
        entry["use_pickle"] = True
    return json.dumps(tree).encode()


def with_code_as_a_size(graph):
    """torch.export.load evaluates the expressions of symbolic sizes."""
    return re.sub(rb'"expr_str":\s*"[^"]*"', b"\"expr_str\": \"__import__('pathlib').Path('ran').touch()\"", graph)


def test_nothing_that_a_model_brings_is_run(sqlite_uri, tmp_path, classifier, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log(begin(sqlite_uri, tmp_path / "run"), classifier)
    (folder,) = (path.parent for path in tmp_path.rglob("MLmodel"))
    archive = folder / "data" / "model.pt2"
    for file in (folder / "code").rglob("*.py"):
        file.write_text("from pathlib import Path; Path('ran').touch()")
    change_record(archive, "models/model.json", with_code_as_a_size)
    assert_same_tensors(load_weights(str(folder))[0], classifier)
    file = io.BytesIO()
    torch.save(Evil(), file)
    change_record(archive, "weights/weight_0", lambda _: file.getvalue())
    change_record(archive, "model_weights_config.json", as_pickles)
    with pytest.raises(UserError, match="is a pickle, which could run any code"):
        load_weights(str(folder))
    archive.rename(folder / "data" / "model.pth")  # what mlflow takes for a pickle of a whole module
    with pytest.raises(UserError, match=r"has no data/model\.pt2"):
        load_weights(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive" * 100])
def test_a_damaged_archive_is_reported_in_a_line(tmp_path, content):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "model.pt2").write_bytes(content)
    (tmp_path / "MLmodel").write_text("flavors: {}\n")
    with pytest.raises(UserError, match="is damaged or not an exported net") as refused:
        load_weights(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_a_models_metrics_are_the_runs_points(sqlite_uri, tmp_path, stored_rows, logged_run):
    class Zero(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean((1, 2))

    handle = logged_run(sqlite_uri, tmp_path / "run")
    database = Path(sqlite_uri.removeprefix("sqlite:///"))
    before = stored_rows(database, handle.run_id)
    example = np.zeros((2, 8, 8, 3), np.uint8)
    given = {"name": "m", "input_example": example, "resize": 8, "class_names": "abc", "pictures": {}}
    uri = log_classifier(handle, Zero(), **given, metadata={}, step=20)
    history = read_history(tmp_path / "run", handle.run_id)
    val = DataInput("digits/val", "cd" * 32, "validation", "/data/val.beton")
    for _ in range(2):
        log_model_metrics(handle, uri, ["val/top1", "val/unknown"], 20, history, val)
    assert stored_rows(database, handle.run_id) == before
    model = MlflowClient(sqlite_uri).get_logged_model(uri.removeprefix("models:/"))
    assert [(m.key, m.value, m.step, m.dataset_name) for m in model.metrics] == [("val/top1", 70.0, 20, "digits/val")]


def test_a_models_metrics_wait_for_the_runs_points(sqlite_uri, tmp_path, classifier):
    """Else `sync` would take what the spool has before them for sent."""
    handle = begin(sqlite_uri, tmp_path / "run")
    history = History({"val/top1": [(1, 50.0)]}, times_ms={("val/top1", 1): 5})
    val = DataInput("digits/val", "cd" * 32, "validation", "/data/val.beton")
    with pytest.raises(Fault, match="MLflow does not have the run's val/top1 of step 1 yet"):
        log_model_metrics(handle, "models:/m-1", ["val/top1"], 1, history, val)


def test_a_model_of_version_1_is_loaded_and_served():
    weights, metadata = load_weights(str(VERSION_1))
    assert metadata == {"class_names": ["dark", "bright"], "step": 12, "recipe": "seed: 1\n"}
    assert weights["net.weight"].tolist() == [[1.0, 0.0, -1.0], [0.5, -0.25, 0.125]]
    served = mlflow.pyfunc.load_model(str(VERSION_1))
    grey = np.full((16, 16, 3), 64, np.uint8)  # logits 0 and 0.625
    assert served.predict({"image": [grey]})["probability"].tolist() == pytest.approx([1 / (1 + math.exp(-0.625))])
