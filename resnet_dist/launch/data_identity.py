"""Which data a run is of: told by the manifests, and asked on every node, for each may have a copy of its own."""

from __future__ import annotations

import socket

from data_prep.beton.manifest import Manifest, load_manifest
from resnet_dist.errors import UserError
from resnet_dist.training.job import Job


def data_digest(train: Manifest, val: Manifest) -> str:
    """What stands in a run's identity."""
    return f"train={short(train.digest)} val={short(val.digest)}"


def short(digest: str) -> str:
    """The first 16 hex digits of `kind:hex`."""
    return digest.partition(":")[2][:16]


def require_same_data(job: Job) -> None:
    """UserError if this machine's betons are not those that the driver found."""
    here = data_digest(load_manifest(job.train_beton), load_manifest(job.val_beton))
    if here != job.identity.data_digest:
        raise UserError(
            f"{socket.gethostname()}: {job.train_beton.parent} holds data {here}, the run is of "
            f"{job.identity.data_digest}; put the same betons on all nodes"
        )
