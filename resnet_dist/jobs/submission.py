"""What `resnet-dist submit` sends to a cluster as a Ray job: a command, its environment, its name. No network here."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from data_prep.redaction import holds_secret, redacted
from data_prep.runtime.environment import cleaned
from resnet_dist.code_version import CODE_KEY, CodeVersion, as_text
from resnet_dist.config.loading import flatten
from resnet_dist.config.profile import Profile
from resnet_dist.errors import UserError

if TYPE_CHECKING:
    from resnet_dist.jobs.upload import Upload

MODULES = {"train": "resnet_dist", "tune": "resnet_dist", "convert": "data_prep"}
"""Commands that make sense as a job, and the package that has them."""
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
    runtime_env: dict[str, Any]
    metadata: dict[str, str]

    def command_line(self, ray: Sequence[str]) -> str:
        """The `ray job submit` line that sends the same job. `ray`: how that command is called here."""
        rest = {key: value for key, value in self.runtime_env.items() if key != "working_dir"}
        words = [*ray, "job", "submit", "--address", self.address, "--submission-id", self.submission_id]
        words += ["--working-dir", self.runtime_env["working_dir"], "--runtime-env-json", json.dumps(rest)]
        words += ["--metadata-json", json.dumps(self.metadata), "--", *self.entrypoint]
        return shlex.join(words)


def job_lines(address: str, submission_id: str, ray: Sequence[str]) -> str:
    """How to follow a job and to stop it, ready to be typed."""
    follow = shlex.join([*ray, "job", "logs", "--address", address, "--follow", submission_id])
    return f"follow it: {follow}\nstop it:   {shlex.join([*ray, 'job', 'stop', '--address', address, submission_id])}"


def ray_command(settings: Mapping[str, str], found: str | None, python: Path) -> list[str]:
    """How to call this environment's `ray` from a shell, with the variables that it needs.

    Args:
        found: the `ray` in PATH, which may be another environment's.
        python: the interpreter of this environment.
    """
    beside = python.parent / "ray"
    command = "ray" if found == str(beside) or not beside.exists() else str(beside)
    return [*(["env", *(f"{key}={value}" for key, value in settings.items())] if settings else []), command]


@dataclass(frozen=True)
class Command:
    """What `submit` runs as a job."""

    name: str
    """train, tune or convert."""
    words: tuple[str, ...]
    """Its arguments and options, as they were typed."""
    run_name: str
    files: tuple[Path, ...] = ()
    """YAML files that the nodes need."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """Options that name data -> their values."""


def plan_submission(
    command: Command,
    profile: Profile,
    profile_file: Path,
    profile_sets: Sequence[str],
    *,
    address: str,
    upload: Upload,
    python: str,
    now: datetime,
    code: CodeVersion | None,
) -> Submission:
    """The job that runs `command`. Raises UserError for what could only work on this machine, and for secrets.

    Args:
        address: of the head's dashboard.
        code: the version of what is uploaded; the nodes cannot ask git.
    """
    sent = {file: upload.require_sent(file) for file in command.files}
    words = [sent.get(Path(word), word) for word in command.words]
    if command.name != "convert":
        words += ["--on", upload.require_sent(profile_file)]
        words += [word for value in profile_sets for word in ("--profile-set", value)]
        words += ["--name", command.run_name]
    require_no_secret(words, profile)
    require_seen_by_nodes(command, profile)
    env = {**profile.env, **({CODE_KEY: as_text(code)} if code else {})}
    # The driver's own limit must pass first: it saves a checkpoint, or reports that it could not.
    env["RAY_JOB_STOP_WAIT_TIME_S"] = f"{profile.failure.stop_grace_s + _STOP_MARGIN_S:g}"
    return Submission(
        address=address,
        submission_id=f"{command.run_name}-{now:%Y%m%d-%H%M%S}",
        entrypoint=(python, "-m", MODULES[command.name], command.name, *words),
        runtime_env={"working_dir": str(upload.folder), "excludes": list(upload.excludes), "env_vars": env},
        metadata={RUN_KEY: command.run_name, **({"resnet-dist-commit": code.commit} if code else {})},
    )


def jobs_address(given: str | None, profile: Profile, environment: Mapping[str, str]) -> str:
    """Where jobs go: --address, else the profile, RAY_API_SERVER_ADDRESS, RAY_ADDRESS if it is a dashboard's, or this
    machine. Raises UserError.
    """
    ray_address = cleaned(environment.get("RAY_ADDRESS", ""))
    candidates = (
        *(given, profile.jobs_address, environment.get("RAY_API_SERVER_ADDRESS")),
        *((ray_address,) if ray_address.startswith(("http://", "https://")) else ()),
    )
    address = next((text for value in candidates if (text := cleaned(value or ""))), _DEFAULT_ADDRESS).rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or " " in address:
        raise UserError(f"{redacted(address)}: jobs go to the dashboard of the head, an address like http://HEAD:8265")
    if parts.username is not None:
        raise UserError(
            f"{redacted(address)}: holds a user's name, which `ps` and the profile show; a Ray cluster asks for a "
            "token instead: RAY_AUTH_TOKEN_PATH"
        )
    return address


def auth_settings(environment: Mapping[str, str], home: Path) -> dict[str, str]:
    """The variable without which Ray's client does not send a token that it has."""
    has_token = any(environment.get(key) for key in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if "RAY_AUTH_MODE" not in environment and (has_token or (home / ".ray" / "auth_token").is_file()):
        return {"RAY_AUTH_MODE": "token"}
    return {}


def require_no_secret(arguments: Sequence[str], profile: Profile) -> None:
    """Everybody who sees the cluster sees a job's command line and files. Raises UserError for what holds a secret."""
    secrets = [f"{option} {value}" for option, value in pairwise(("", *arguments)) if holds_secret(f"{option} {value}")]
    secrets += [f"the profile's {key}: {value}" for key, value in flatten(profile).items() if holds_secret(value)]
    if secrets:
        raise UserError(
            f"{redacted(secrets[0]).strip()}: holds a secret, and everybody on the cluster sees a job; export "
            "it where the nodes' Ray is started: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or "
            "MLFLOW_TRACKING_TOKEN for MLflow, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for a bucket"
        )


def require_seen_by_nodes(command: Command, profile: Profile) -> None:
    """A job runs in a folder that is removed with it, and relative paths would lead there: UserError that names them
    all."""
    paths = dict(command.paths)
    problems = []
    if command.name != "convert":
        keys = ("data_root", "storage", "cache", "sweeps")
        paths |= {key: str(value) for key in keys if (value := getattr(profile, key)) is not None}
    relative = [f"{key} {path}" for key, path in paths.items() if "://" not in path and not path.startswith(("/", "~"))]
    if relative:
        problems.append(
            f"{', '.join(relative)}: {'is' if len(relative) == 1 else 'are'} relative to the folder of a job, which is "
            "removed with it; give a path that all nodes see, or a URL"
        )
    if command.name != "convert" and re.match(r"sqlite:(?!////)", profile.tracking_uri):
        problems.append(
            f"tracking_uri {profile.tracking_uri}: is relative to the folder of a job, which is removed with it; "
            "set tracking_uri to an MLflow server, http://HOST:5000"
        )
    if problems:
        raise UserError("; ".join(problems))
