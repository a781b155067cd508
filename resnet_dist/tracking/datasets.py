"""Data sets in MLflow: what a run read, and how a beton was made, as a separate run found by the beton's digest."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from data_prep.beton.manifest import Manifest, read_manifest
from data_prep.redaction import redacted, redacted_value
from resnet_dist.errors import UserError
from resnet_dist.tracking.connection import connect, mlflow_client, mlflow_faults, prepare_store
from resnet_dist.tracking.experiment import find_or_create_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

EXPERIMENT = "data preparation"
DIGEST_TAG = "data_prep.digest"
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_\-. :/]")
_MAX_VALUE_CHARS = 6000
"""Of a parameter in MLflow."""
_MAX_DIGEST_CHARS = 36


@dataclass(frozen=True)
class DataInput:
    """A data set that the run read."""

    name: str
    digest: str
    """MLflow keeps the first 36 characters."""
    context: str
    """What the run did with it: `training` or `validation`; `made` by a preparation."""
    location: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Numbers worth seeing: samples, classes, bytes."""

    @property
    def short_digest(self) -> str:
        return self.digest[:_MAX_DIGEST_CHARS]


def dataset_input(data: DataInput) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=data.name,
        digest=data.short_digest,
        source_type="local",
        source=json.dumps({"uri": redacted(data.location)}),
        profile=json.dumps(dict(data.facts)),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", data.context)])


@dataclass(frozen=True)
class Preparation:
    """A finished beton."""

    data: DataInput
    params: Mapping[str, str]
    """Settings, source and library versions."""
    metrics: Mapping[str, float]
    """Its results: samples, bytes, bad samples left out."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """By artifact path."""


@dataclass(frozen=True)
class PreparationRun:
    run_id: str
    experiment_id: str

    @property
    def page(self) -> str:
        """Its page, as a link inside MLflow's own."""
        return f"#/experiments/{self.experiment_id}/runs/{self.run_id}"


def record_preparation(tracking_uri: str, preparation: Preparation) -> tuple[PreparationRun, bool]:
    """The run of this beton, and whether it is new: the same digest is recorded once, wherever copies of it are.

    An interrupted recording is completed. Raises Fault if MLflow does not respond, UserError if the experiment was
    deleted.
    """
    prepare_store(tracking_uri)
    data = preparation.data
    with mlflow_faults(tracking_uri, f"recording {data.name}"), redirect_stdout(io.StringIO()):
        client = connect(tracking_uri)
        experiment = find_or_create_experiment(client, EXPERIMENT, tracking_uri)
        run = _find(client, experiment.experiment_id, data.digest)
        if run is not None and run.info.status == "FINISHED":
            return PreparationRun(run.info.run_id, run.info.experiment_id), False
        if run is None:
            tags = {DIGEST_TAG: data.digest, "mlflow.source.name": "data-prep convert", "mlflow.source.type": "JOB"}
            run = client.create_run(experiment.experiment_id, tags=tags, run_name=data.name)
        _fill(client, run, preparation)
    return PreparationRun(run.info.run_id, run.info.experiment_id), True


def find_preparations(tracking_uri: str, digests: Iterable[str]) -> dict[str, PreparationRun]:
    """The recorded runs of these digests; those not recorded are left out. Raises Fault."""
    with mlflow_client(tracking_uri, "looking for how the data was made") as client:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None or experiment.lifecycle_stage != "active":
            return {}
        found = {digest: _find(client, experiment.experiment_id, digest) for digest in digests}
    return {d: PreparationRun(run.info.run_id, run.info.experiment_id) for d, run in found.items() if run is not None}


def _find(client: MlflowClient, experiment_id: str, digest: str) -> Run | None:
    """The oldest one: two people may have recorded the same beton at the same moment. None if nobody did."""
    if "'" in digest:
        raise UserError(f"{digest}: is not a digest")
    query = f"tags.`{DIGEST_TAG}` = '{digest}'"
    runs = client.search_runs([experiment_id], filter_string=query, order_by=["attributes.start_time ASC"])
    return runs[0] if runs else None


def _fill(client: MlflowClient, run: Run, preparation: Preparation) -> None:
    from mlflow.entities import Metric, Param

    run_id, time_ms = run.info.run_id, run.info.start_time
    params = [Param(k, redacted_value(k, v)[:_MAX_VALUE_CHARS]) for k, v in preparation.params.items()]
    metrics = [Metric(key, value, time_ms, 0) for key, value in preparation.metrics.items()]
    client.log_batch(run_id, params=[p for p in params if p.key not in run.data.params], metrics=metrics)
    client.log_inputs(run_id, [dataset_input(preparation.data)])
    for path, text in preparation.texts.items():
        client.log_text(run_id, redacted(text), path)
    client.set_terminated(run_id, "FINISHED")


def as_params(groups: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """`{"settings": {"max_side": 500}}` -> `{"settings.max_side": "500"}`; values that are not text become JSON.

    Characters that MLflow refuses in keys are left out: `pillow's version` becomes `pillows version`.
    """
    return {
        _NOT_IN_KEYS.sub("", f"{group}.{key}"): value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False)
        for group, values in groups.items()
        for key, value in values.items()
    }


LONG = ("label_map", "label_checks")
"""Facts about the source that are lists; the manifest, an artifact, has them."""


@dataclass(frozen=True)
class Recorded:
    beton: str
    digest: str
    run_id: str
    is_new: bool


def record_beton(tracking_uri: str, beton: str) -> Recorded:
    """`beton`: a path or URL with its manifest beside it. UserError when that is missing, Fault from MLflow."""
    location = beton if "://" in beton else str(Path(beton).expanduser().absolute())
    manifest = read_manifest(location)
    run, is_new = record_preparation(tracking_uri, preparation_of(manifest, location))
    return Recorded(beton, manifest.digest, run.run_id, is_new)


def preparation_of(manifest: Manifest, location: str) -> Preparation:
    """Its digest is the one that trainings know the beton by."""
    source = {key: value for key, value in manifest.source.items() if key not in LONG}
    files = {"manifest.json": manifest.to_json()}
    if manifest.quarantined:
        files["quarantined.json"] = json.dumps([dict(entry) for entry in manifest.quarantined], indent=1)
    counts = {
        "num_samples": manifest.num_samples,
        "num_classes": manifest.num_classes,
        "num_untouched": manifest.num_untouched,
        "num_quarantined": len(manifest.quarantined),
        "num_salvaged": len(manifest.salvaged),
        "bytes": manifest.beton_bytes,
    }
    return Preparation(
        data=DataInput(
            name=f"{manifest.source.get('name', 'beton')}/{PurePosixPath(location).stem}",
            digest=manifest.digest.partition(":")[2],
            context="made",
            location=location,
            facts=counts,
        ),
        params=as_params({"settings": manifest.settings, "source": source, "versions": manifest.versions}),
        metrics={key: float(value) for key, value in counts.items()},
        texts=files,
    )
