"""The profile: how much hardware there is, where files are, how long to wait. Nothing here changes a result.

With `train.reduction: exact` the bits are the same, with `fast` results are equal up to rounding.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from data_prep.redaction import holds_secret, is_secret_name, redacted
from resnet_dist.config.base import Section
from resnet_dist.errors import UserError

_CHANGES_RESULTS = {"NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG"}


def _numbers_as_text(value: Any) -> Any:
    """YAML reads `OMP_NUM_THREADS: 1` as a number; a bool (`yes`, `on`) stays a bool and is rejected."""
    if not isinstance(value, dict):
        return value
    for key, given in value.items():  # before any other check: their messages quote the value
        if is_secret_name(str(key)) or holds_secret(str(given)):
            raise ValueError(f"{key} is a secret; set it in the nodes' own environment, not in a file that is logged")
    return {k: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for k, v in value.items()}


def _plain_settings(env: dict[str, str]) -> dict[str, str]:
    for key in env:
        if key in _CHANGES_RESULTS:
            raise ValueError(f"{key} changes the arithmetic; precision is the recipe's: train.precision")
    return env


Environment = Annotated[dict[str, str], BeforeValidator(_numbers_as_text), AfterValidator(_plain_settings)]
"""Environment variables: plain settings only, neither secrets nor what changes the arithmetic."""


def _auto_or_number(value: Any) -> Any:
    if value != "auto" and not (str(value).isdecimal() and int(value)):
        raise ValueError(f"should be auto or a number from 1, got {value!r}")
    return value


class CheckpointConfig(Section):
    """When to save a checkpoint, and how many to keep."""

    every_epochs: PositiveInt = 1
    """Save after every this many epochs."""
    every_steps: PositiveInt | None = None
    """Also after every this many steps within an epoch; null: only by epochs."""
    every_minutes: PositiveFloat | None = None
    """Also when the last one is this old."""
    keep: PositiveInt = 3
    """Number of newest checkpoints that stay in storage."""


class FailureConfig(Section):
    """Limits of waits, in seconds, and of retries. `resnet_dist/launch/README.md` has what each fault costs."""

    max_failures: NonNegativeInt = 3
    """Restarts of the worker group (a worker or its node died, hung or raised) before the run ends with the cause."""
    max_controller_failures: NonNegativeInt = 3
    """Restarts of Ray Train's controller, a process beside the driver."""
    max_preemptions: NonNegativeInt | None = None
    """Restarts because a node announced that it will leave; null: no limit."""
    collective_timeout_s: PositiveFloat = 300.0
    """Longest wait in one collective (all-reduce, barrier) before a hung worker ends the attempt."""
    progress_timeout_s: PositiveFloat = 600.0
    """Longest time without a batch before a worker ends itself, leaving its stacks in the run's `stacks/`. Must cover
    start-up and the longest step."""
    stop_grace_s: PositiveFloat = 60.0
    """Longest wait for the last checkpoint after Ctrl-C or SIGTERM."""
    wait_for_resources_s: PositiveFloat = 120.0
    """Longest wait for the cluster to give the workers their CPUs and GPUs."""
    wait_for_nodes_s: NonNegativeFloat = 0.0
    """Longest wait at the beginning for nodes that are still to come; an autoscaler is asked for them. 0, for a cluster
    of fixed size: what it lacks is an error at once."""
    storage_timeout_s: PositiveFloat = 300.0
    """Longest time that storage may reject a checkpoint (full, unreachable) before the run ends. Training continues
    meanwhile, until the next checkpoint is due; that one waits for half of `collective_timeout_s` at most."""
    driver_timeout_s: PositiveFloat = 30.0
    """After a driver did not end cleanly, time without a sign of it before the same command may resume its run."""
    head_timeout_s: PositiveFloat = 45.0
    """Longest time that the cluster's head may not answer before the run ends. Ray itself gives up after 60."""


class Workers(Section):
    """How many workers: from `min`, without which nothing starts, to `max`, as many as the cluster has room for.

    A number alone means both: `2`. A range may be written `1..8`.
    """

    min: PositiveInt
    """Without this many nothing starts."""
    max: PositiveInt
    """Never more than this many."""

    @model_validator(mode="before")
    @classmethod
    def _from_number_or_range(cls, value: Any) -> Any:
        if isinstance(value, str) and (match := re.fullmatch(r"(\d+)\.\.(\d+)", value.strip())):
            return {"min": match.group(1), "max": match.group(2)}
        if isinstance(value, int) or (isinstance(value, str) and value.strip().isdigit()):
            return {"min": value, "max": value}
        if not isinstance(value, dict):
            raise ValueError(f"should be a number of workers or a range like 1..8, got {value!r}")
        return value

    @model_validator(mode="after")
    def _ascending(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"must ascend, got {self}")
        return self

    @property
    def elastic(self) -> bool:
        return self.min < self.max

    def __str__(self) -> str:
        return f"{self.min}..{self.max}" if self.elastic else str(self.min)


class Profile(Section):
    """How much hardware a run has, where its data and files are, and how long it waits. Changes a result by rounding at
    most, and with `train.reduction: exact` not at all."""

    workers: Workers
    cpus_per_worker: PositiveInt
    """Also the number of loader threads of a worker."""
    resize_every_s: PositiveFloat = 300.0
    """With a range of workers: how often to check whether more fit. A resize goes back to the last checkpoint."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 0
    """1: each worker has a GPU. 0: it computes on its CPUs."""
    node_labels: dict[str, str] = Field(default_factory=dict)
    """Ray node labels that a worker's node must have, `ray.io/accelerator-type: H100` for example; none: any node."""
    env: Environment = Field(default_factory=dict)
    """Environment variables of the workers and of a submitted job: NCCL_SOCKET_IFNAME, OMP_NUM_THREADS, ..."""
    data_root: str
    """Folder of the data sets, under the same path on every node: <data_root>/<dataset>/train.beton. A relative path
    starts where the command starts. With `cache`, also a URL: `s3://bucket/data`."""
    cache: str | None = None
    """Folder on every node's own disk: before the first step each node copies the betons there, once, every chunk
    checked against the manifest. It must belong to this user or root, and no other user may write to it; `~` is that of
    the machine where the command starts. null: workers read `data_root` itself."""
    cache_timeout_s: PositiveFloat = 7200.0
    """Longest time for that copy, on the slowest node."""
    storage: str
    """Place of the runs (checkpoints, record, spool): a folder shared by all nodes, or `s3://bucket/prefix`."""
    sweeps: str | None = None
    """Place of sweeps' ledgers and reports if `storage` is a URL: a folder of the machine that runs `tune`; no other
    machine has to see it. null: in `storage`."""
    tracking_uri: str
    """MLflow: `sqlite:///file.db` or `http://host:port`."""
    experiment: str = "resnet-dist"
    """MLflow experiment."""
    register_models: bool = True
    """Register a finished run's model as a version in MLflow's registry; false: only log it, like those of a sweep's
    trials."""
    record_changes: bool = True
    """Keep the code's changes since its commit in MLflow, as `code/changes.diff`. Files that are named like secrets
    (`.env`, `*.key`) are left out; values that look like secrets are masked."""
    jobs_address: str | None = None
    """Address to which `resnet-dist submit` sends jobs; null: RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265."""
    ray_address: str | None = None
    """null: the cluster in RAY_ADDRESS (set inside a Ray job), else a local Ray that this command starts and ends."""
    local_cpus: PositiveInt | None = None
    """Logical CPUs of that local Ray; null: as many as the machine has."""
    recompute_activations: bool = False
    """Activation checkpointing: the backward pass computes what is inside residual blocks again. Less memory on the
    GPU, about a third more computing, the same results. Not with a recipe's `train.compile`."""
    micro_batches_per_launch: Annotated[Literal["auto"] | PositiveInt, BeforeValidator(_auto_or_number)] = "auto"
    """How many of a worker's micro-batches go through the net together, at most: fewer and larger kernels, more memory,
    the same results up to rounding. Each micro-batch is normalised on its own all the same. auto: as many as are fast
    and fit the memory; on a GPU that is measured at each start, and a number fixes it. Always 1 with a recipe's
    `train.reduction: exact`."""
    cuda_graphs: bool = True
    """Capture what a GPU does for a launch once, and replay it: the GPU need not wait for Python. The same results. Not
    with `train.reduction: exact` or PowerSGD."""
    log_every_steps: PositiveInt = 10
    """Steps between two points of the training curves."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    failure: FailureConfig = FailureConfig()


def absolute_paths(profile: Profile, base: Path) -> Profile:
    """The profile with its paths made absolute, beginning at `base`: workers start in folders of their own.

    URLs stay. Raises UserError for data behind a URL without a `cache`, and for a `tracking_uri` that MLflow cannot
    use.
    """
    if "://" in profile.data_root and profile.cache is None:
        raise UserError(
            f"data_root {profile.data_root}: is a URL, and workers read files; set cache to a folder on the nodes' own "
            "disks, for example ~/.cache/resnet-dist"
        )
    folders = {
        key: str((base / Path(value).expanduser()).absolute())
        for key in ("data_root", "cache", "storage", "sweeps")
        for value in (getattr(profile, key),)
        if value is not None and "://" not in value
    }
    return profile.model_copy(update=folders | {"tracking_uri": absolute_tracking_uri(profile.tracking_uri, base)})


def absolute_tracking_uri(uri: str, base: Path) -> str:
    """The URI with an absolute path, if it has one: `sqlite:///runs.db` starts at `base` (an absolute folder).

    Raises UserError for a URI that cannot hold a training job's runs, with what to write instead.
    """
    scheme, separator, rest = uri.partition("://")
    if scheme in ("http", "https") and rest.strip("/"):
        _require_host(uri)
        return uri.rstrip("/")
    if scheme == "sqlite" and separator:
        name, question, query = rest.partition("?")
        path = str(base / name[1:])
        if question and not re.fullmatch(r"timeout=\d+(\.\d+)?", query):
            raise UserError(f"tracking_uri: {redacted(uri)}: only ?timeout=SECONDS is allowed after the file's name")
        if odd := sorted({"%", "?"} & set(path)):
            raise UserError(
                f"tracking_uri: {path}: MLflow takes no database whose path has {' and '.join(odd)}; name a file "
                "elsewhere, or use an MLflow server, http://host:port"
            )
        if not name.startswith("/") or name in ("/", "/:memory:") or name.endswith("/"):
            raise UserError(
                f"tracking_uri: {uri} names no file, and a run is written by several processes; "
                "use sqlite:///folder/mlflow.db"
            )
        return f"sqlite:///{path}{question}{query}"
    if not separator and Path(uri).suffix in (".db", ".sqlite", ".sqlite3"):
        raise UserError(f"tracking_uri: {uri} is a file's name; for an sqlite database write sqlite:///{uri}")
    if not separator or scheme == "file":
        raise UserError(
            f"tracking_uri: {redacted(uri)} is a folder, but MLflow 3 no longer keeps runs in folders; "
            "use sqlite:///folder/mlflow.db or http://host:port"
        )
    raise UserError(
        f"tracking_uri: {redacted(uri)}: {scheme} is not supported here; use sqlite:///folder/mlflow.db or "
        "http://host:port (a server in front of a database: mlflow server --backend-store-uri ...)"
    )


def _require_host(uri: str) -> None:
    """UserError for a URI that a client would misread: its error message could then quote a password."""
    try:
        parts = urlsplit(uri)
        is_read_whole = bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_read_whole = False
    user_info = redacted(uri) != uri
    if is_read_whole and (not user_info or "@" in parts.netloc or "***@" not in redacted(uri)):
        return
    raise UserError(
        f"tracking_uri: {redacted(uri)} is not an address like http://host:port"
        + (
            "; give user and password as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or write their / ? # @ "
            "and % as %2F %3F %23 %40 and %25"
            if user_info
            else ""
        )
    )
