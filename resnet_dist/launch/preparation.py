"""A beton's manifest, recorded in MLflow: `resnet-dist tracking record-data`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_prep.beton.manifest import Manifest
from data_prep.beton.stage import read_source_manifest
from resnet_dist.tracking.details import DataInput
from resnet_dist.tracking.preparations import Preparation, as_params, record_preparation

LONG = ("label_map", "label_checks")
"""Facts of the source that are lists: they stand in the manifest, which is an artifact."""


@dataclass(frozen=True)
class Recorded:
    beton: str
    digest: str
    run_id: str
    is_new: bool


def record_beton(tracking_uri: str, beton: str) -> Recorded:
    """`beton`: a path or URL with its manifest beside it. UserError when that is missing, Fault from MLflow."""
    location = beton if "://" in beton else str(Path(beton).expanduser().absolute())
    manifest = read_source_manifest(location)
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
