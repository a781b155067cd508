"""The profile: how much hardware there is, where things lie, and how patient to be. Nothing here may change a result."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from resnet_dist.config.base import Section


class CheckpointConfig(Section):
    every_epochs: PositiveInt = 1
    every_steps: PositiveInt | None = None
    """Also after every this many steps within an epoch; null: only by epochs."""
    keep: PositiveInt = 3
    """How many of the newest checkpoints stay in storage."""


class FailureConfig(Section):
    max_failures: NonNegativeInt = 3
    """Restarts of the worker group before the run ends with the cause."""
    collective_timeout_s: PositiveFloat = 300.0
    """Longest wait in one collective (all-reduce, barrier) before a hung worker ends the attempt."""
    wait_for_resources_s: PositiveFloat = 120.0
    """Longest wait for the cluster to give the workers their CPUs and GPUs."""


class Profile(Section):
    workers: PositiveInt
    cpus_per_worker: PositiveInt
    """Also the number of loader threads of a worker."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    data_root: str
    """Folder of the data sets, seen under the same path on every node. Relative paths start where the command starts."""
    storage: str
    """Folder of the runs (checkpoints), shared by all nodes."""
    tracking_uri: str
    """MLflow: `sqlite:///file.db` or `http://host:port`."""
    experiment: str = "resnet-dist"
    """MLflow experiment."""
    ray_address: str | None = None
    """null: the cluster in RAY_ADDRESS (set inside a Ray job), else a local Ray that this command starts and ends."""
    local_cpus: PositiveInt | None = None
    """Logical CPUs of that local Ray; null: as many as the machine has."""
    log_every_steps: PositiveInt = 10
    """Steps between two points of the training curves and two stop checks."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    failure: FailureConfig = FailureConfig()
