"""What `resnet-dist submit` sends to a cluster: one of the project's commands as a Ray job. Pure; no Ray here.

The code travels as the job's working directory; the libraries are those of the nodes' image (`cluster/Dockerfile`).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_prep.redaction import SECRET_FILES, holds_secret, is_secret_file, redacted
from resnet_dist.config.loading import flatten, load_recipe, load_space
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import recipe_hash
from resnet_dist.errors import UserError

MODULES = {"train": "resnet_dist", "tune": "resnet_dist", "convert": "data_prep"}
"""Commands that make sense as a job, and the package that has them."""
NOT_SENT = (
    *(".git", ".venv*", "/data", "/runs", "/tests", "/docs", "*.beton", "*.db", "*.log", "__pycache__"),
    *SECRET_FILES,
)
"""Left out of the upload, besides what .gitignore and .rayignore name, in their syntax."""
RUN_KEY = "resnet-dist-run"
"""Metadata key of a job: which run it drives."""
_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_STOP_MARGIN_S = 30.0


@dataclass(frozen=True)
class Submission:
    """One Ray job, before it is sent."""

    address: str
    """URL of the head's dashboard."""
    submission_id: str
    entrypoint: tuple[str, ...]
    working_dir: str
    env: Mapping[str, str]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def runtime_env(self) -> dict[str, Any]:
        return {"working_dir": self.working_dir, "excludes": list(NOT_SENT), "env_vars": dict(self.env)}

    def command_line(self) -> str:
        """The `ray job submit` line that sends the same job."""
        rest = {key: value for key, value in self.runtime_env.items() if key != "working_dir"}
        words = ["ray", "job", "submit", "--address", self.address, "--submission-id", self.submission_id]
        words += ["--working-dir", self.working_dir, "--runtime-env-json", json.dumps(rest)]
        words += ["--metadata-json", json.dumps(dict(self.metadata)), "--", *self.entrypoint]
        return shlex.join(words)


def plan_submission(
    command: str,
    arguments: Sequence[str],
    profile: Profile,
    *,
    name: str,
    address: str,
    working_dir: Path,
    python: str,
    now: datetime,
) -> Submission:
    """The job that runs `command` with `arguments`. Raises UserError for what could only work on this machine."""
    require_no_secret(arguments, profile)
    require_seen_by_nodes(command, arguments, profile)
    # The driver's own limit must pass first: it saves a checkpoint, and says so when it could not.
    env = {**profile.env, "RAY_JOB_STOP_WAIT_TIME_S": f"{profile.failure.stop_grace_s + _STOP_MARGIN_S:g}"}
    return Submission(
        address=address,
        submission_id=f"{name}-{now:%Y%m%d-%H%M%S}",
        entrypoint=(python, "-m", MODULES[command], command, *arguments),
        working_dir=str(working_dir),
        env=env,
        metadata={RUN_KEY: name},
    )


def jobs_address(given: str | None, profile: Profile, environment: Mapping[str, str]) -> str:
    """In order of precedence: the option, the profile, RAY_API_SERVER_ADDRESS, this machine. Raises UserError."""
    address = given or profile.jobs_address or environment.get("RAY_API_SERVER_ADDRESS") or _DEFAULT_ADDRESS
    if not address.startswith(("http://", "https://")):
        raise UserError(f"{address}: jobs go to the dashboard of the head, an address like http://HEAD:8265")
    return address.rstrip("/")


def auth_settings(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """What Ray's client needs beside a token that is there: without the mode it would not send it."""
    has_token = any(environment.get(key) for key in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if "RAY_AUTH_MODE" not in environment and (has_token or (home / ".ray" / "auth_token").is_file()):
        return {"RAY_AUTH_MODE": "token"}
    return {}


def job_arguments(
    command: str,
    given: Sequence[str],
    *,
    profile_file: Path,
    profile_sets: Sequence[str],
    name: str | None,
    working_dir: Path,
) -> tuple[str, tuple[str, ...]]:
    """The run's name, and the command's arguments as the nodes will read them: files relative to the upload.

    Raises UserError for an unknown command, a wrong recipe, or a file that does not travel.
    """
    if command not in MODULES:
        raise UserError(f"submit {command}: takes {', '.join(MODULES)}")
    files = [argument for argument in given if _is_yaml(argument)]
    arguments = [require_sent(Path(a), working_dir) if a in files else a for a in given]
    if command == "tune" and files:
        space = load_space(Path(files[0]), [value for _, value in _options(given, ("--set",))])
        require_sent(Path(files[0]).parent / space.base, working_dir)
    name = name or _default_name(command, files, given)
    if command == "convert":
        return name, tuple(arguments)
    arguments += ["--on", require_sent(profile_file, working_dir)]
    arguments += [word for value in profile_sets for word in ("--profile-set", value)]
    return name, (*arguments, "--name", name)


def _default_name(command: str, files: Sequence[str], given: Sequence[str]) -> str:
    """As `train` names a run itself; a conversion is named after what it makes."""
    if command == "convert":
        outputs = [value for _, value in _options(given, ("--output",))]
        if not outputs:
            raise UserError("submit convert: give --output")
        folder, _, beton = outputs[-1].rpartition("/")
        return f"convert-{folder.rpartition('/')[2]}-{beton.removesuffix('.beton')}".replace("--", "-")
    if not files:
        raise UserError(f"submit {command}: give a YAML file, as resnet-dist {command} takes it")
    if command == "tune":
        return Path(files[0]).stem
    recipe = load_recipe(Path(files[0]), [value for _, value in _options(given, ("--set",))])
    return f"{Path(files[0]).stem}-{recipe_hash(recipe)[:8]}"


def _is_yaml(argument: str) -> bool:
    return not argument.startswith("-") and "=" not in argument and argument.endswith((".yaml", ".yml"))


def require_sent(file: Path, working_dir: Path) -> str:
    """`file` as the job names it: relative to the upload. Raises UserError for one that does not travel."""
    if not file.is_file():
        raise UserError(f"{file}: does not exist")
    try:
        sent = file.resolve().relative_to(working_dir.resolve())
    except ValueError:
        raise UserError(
            f"{file}: lies outside {working_dir.resolve()}, which is all that travels to the cluster; move it there, "
            "or give --working-dir"
        ) from None
    for part in (f"/{sent.parts[0]}", *sent.parts):
        if is_secret_file(part) or any(fnmatch(part, pattern) for pattern in NOT_SENT):
            raise UserError(f"{file}: {part} is left out of what travels to the cluster; copy the file elsewhere")
    return str(sent)


def require_no_secret(arguments: Sequence[str], profile: Profile) -> None:
    """A job's command line and files are seen by all who see the cluster. Raises UserError for what holds a secret."""
    told = [f"{option} {value}" for option, value in pairwise(("", *arguments)) if holds_secret(f"{option} {value}")]
    told += [f"the profile's {key}: {value}" for key, value in flatten(profile).items() if holds_secret(value)]
    if told:
        raise UserError(
            f"{redacted(told[0]).strip()}: holds a secret, and all who see the cluster see what is submitted; export "
            "it where the nodes' Ray is started: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or "
            "MLFLOW_TRACKING_TOKEN for MLflow, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for a bucket"
        )


def require_seen_by_nodes(command: str, arguments: Sequence[str], profile: Profile) -> None:
    """A job starts in a folder of its own that goes away with it: relative paths would lead there."""
    if command == "convert":
        for option, value in _options(arguments, ("--input", "--output", "--labels", "--devkit")):
            _require_anywhere(option, value)
        return
    _require_anywhere("data_root", profile.data_root)
    _require_anywhere("storage", profile.storage)
    for key in ("cache", "sweeps"):
        if (value := getattr(profile, key)) is not None:
            _require_anywhere(key, value)
    if profile.tracking_uri.startswith("sqlite:") and not profile.tracking_uri.startswith("sqlite:////"):
        raise UserError(
            f"tracking_uri {profile.tracking_uri}: is relative to the folder of a job, which goes away with it; set "
            "tracking_uri to an MLflow server, http://HOST:5000"
        )


def _require_anywhere(key: str, value: str) -> None:
    if "://" not in value and not value.startswith(("/", "~")):
        raise UserError(
            f"{key} {value}: is relative to the folder of a job, which goes away with it; give a path that all nodes "
            "see, or a URL"
        )


def _options(arguments: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """The given values of `--name VALUE` and `--name=VALUE`."""
    joined = [(option, value) for option, equals, value in (a.partition("=") for a in arguments) if equals]
    return [(option, value) for option, value in (*joined, *pairwise(arguments)) if option in names]
