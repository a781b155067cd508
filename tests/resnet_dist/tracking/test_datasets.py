"""How a beton was made is recorded in MLflow once, under the digest that trainings know it by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from data_prep.beton.manifest import Manifest, load_manifest
from data_prep.converter.convert import convert
from data_prep.converter.settings import ConvertSettings
from data_prep.sources import open_source
from data_prep.sources.splits import SplitRequest
from resnet_dist.cli import app
from resnet_dist.errors import UserError
from resnet_dist.launch.mlflow_description import links
from resnet_dist.tracking.connection import prepare_store
from resnet_dist.tracking.datasets import (
    DIGEST_TAG,
    EXPERIMENT,
    DataInput,
    PreparationRun,
    find_preparations,
    preparation_of,
    record_beton,
)

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("betons") / "train.beton"
    source = open_source("synthetic", "n=20,size=8,classes=3,seed=1", SplitRequest(None, explicit=False))
    settings = ConvertSettings(encode="jpeg", max_side=7)
    convert(source, output, settings=settings)
    return output


def hex_digest(manifest: Manifest) -> str:
    return manifest.digest.partition(":")[2]


def test_a_beton_is_recorded_once_with_settings_counts_and_manifest(beton: Path, sqlite_uri: str, tmp_path) -> None:
    manifest = load_manifest(beton)
    first = record_beton(sqlite_uri, str(beton))
    again = record_beton(sqlite_uri, str(beton))
    assert (first.is_new, again.is_new) == (True, False)
    assert first.run_id == again.run_id
    run = MlflowClient(sqlite_uri).get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags[DIGEST_TAG] == hex_digest(manifest)
    assert run.data.params["settings.encode"] == "jpeg"
    assert run.data.params["settings.max_side"] == "7"
    assert run.data.params["source.name"] == "synthetic"
    assert run.data.params["versions.pillow"] == manifest.versions["pillow"]
    assert run.data.metrics["num_samples"] == 20
    assert run.data.metrics["num_quarantined"] == 0
    assert run.data.metrics["bytes"] == manifest.beton_bytes
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("synthetic/train", hex_digest(manifest)[:36])
    (stored,) = tmp_path.rglob("manifest.json")
    assert Manifest.from_json(stored.read_text(), "stored") == manifest


def test_a_recording_that_was_interrupted_is_completed(beton: Path, sqlite_uri: str) -> None:
    client = MlflowClient(sqlite_uri)
    digest = hex_digest(load_manifest(beton))
    half = client.create_run(client.create_experiment(EXPERIMENT), tags={DIGEST_TAG: digest})
    recorded = record_beton(sqlite_uri, str(beton))
    assert (recorded.run_id, recorded.is_new) == (half.info.run_id, True)
    assert client.get_run(half.info.run_id).info.status == "FINISHED"


def test_trainings_find_it_by_the_digest_of_their_data(beton: Path, sqlite_uri: str) -> None:
    digest = hex_digest(load_manifest(beton))
    train = DataInput("made-up/train", digest, "training", str(beton))
    val = DataInput("made-up/val", "ab" * 16, "validation", "elsewhere")
    assert find_preparations(sqlite_uri, [digest, val.digest]) == {}
    recorded = record_beton(sqlite_uri, str(beton))
    found = find_preparations(sqlite_uri, [digest, val.digest])
    assert list(found) == [digest]
    assert links([train, val], found) == {"training": found[digest]}
    assert found[digest].run_id == recorded.run_id
    assert PreparationRun("r", "3").page == "#/experiments/3/runs/r"


def test_left_out_samples_are_a_file_of_the_run(beton: Path) -> None:
    tree = json.loads(load_manifest(beton).to_json())
    tree["quarantined"] = [{"index": 3, "key": "cat/3.jpg", "reason": "is damaged"}]
    preparation = preparation_of(Manifest.from_json(json.dumps(tree), "m"), "s3://bucket/train.beton")
    assert json.loads(preparation.texts["quarantined.json"]) == tree["quarantined"]
    assert preparation.metrics["num_quarantined"] == 1
    assert preparation.data.name == "synthetic/train"


def test_a_beton_that_is_not_there_is_the_users_to_fix(sqlite_uri: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.manifest\.json: does not exist"):
        record_beton(sqlite_uri, str(tmp_path / "nothing.beton"))


def test_the_command(beton: Path, sqlite_uri: str) -> None:
    prepare_store(sqlite_uri)
    arguments = ["tracking", "record-data", str(beton), "--tracking-uri", sqlite_uri]
    assert "train.beton: recorded as run " in CliRunner().invoke(app, arguments).output
    recorded = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert (recorded[0]["is_new"], recorded[0]["digest"]) == (False, load_manifest(beton).digest)
