"""What `resnet-dist submit` sends to a cluster: one of the project's commands as a Ray job, and the files of a folder:
those that git tracks; without git, all but what is left out by its name. No Ray here.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from data_prep.redaction import SECRET_FILES, holds_secret, is_secret_file, redacted
from data_prep.runtime.environment import cleaned
from data_prep.shown import shown
from resnet_dist.code_version import CODE_KEY, CodeVersion, as_text
from resnet_dist.config.loading import flatten, load_recipe, load_space
from resnet_dist.config.profile import Profile
from resnet_dist.config.recipe import recipe_hash
from resnet_dist.config.run_name import as_run_name, require_run_name
from resnet_dist.errors import Fault, UserError

NOT_SENT = (".git", ".venv*", "/data", "/runs", "/tests", "/docs", "*.beton", "*.db", "*.log", "__pycache__")
"""Left out of the upload, besides secrets and what .gitignore and .rayignore name, in their syntax."""
_LIMIT_S = 60.0
_NAMES_TOLD = 5
_MOST_OTHERS = 2000
"""Untracked files and folders, all of which are named to Ray to be left out."""


@dataclass(frozen=True)
class Checkout:
    """What git knows about a folder. Paths are relative to it; folders end in a slash."""

    tracked: frozenset[str]
    untracked: tuple[str, ...] = ()
    """Whatever git neither tracks nor ignores."""
    others: tuple[str, ...] = ()
    """`untracked`, and what is ignored, but for what is left out anyhow: a folder in the place of all that is in it."""
    ignored: frozenset[str] = frozenset()
    """Tracked, although .gitignore names it: Ray leaves it out."""


@dataclass(frozen=True)
class Upload:
    """A folder whose files travel."""

    folder: Path
    checkout: Checkout | None
    """None: the folder is in no git checkout."""

    @property
    def excludes(self) -> tuple[str, ...]:
        """What Ray leaves out, in the syntax of .gitignore."""
        others = self.checkout.others if self.checkout else ()
        return (*NOT_SENT, *SECRET_FILES, *(f"/{_escaped(path)}" for path in others))

    def notes(self) -> list[str]:
        """What a user might expect to be sent and is not."""
        if self.checkout is None:
            return []
        notes = []
        if missed := [path for path in self.checkout.untracked if not is_left_out(path)]:
            notes.append(f"not sent, because git does not track it: {names(missed)}")
        if secret := [path for path in sorted(self.checkout.tracked) if is_secret_file(path)]:
            notes.append(f"not sent (named as secrets are): {names(secret)}")
        return notes

    def require_sent(self, file: Path) -> str:
        """`file` as the job names it: relative to the upload. Raises UserError for one that does not travel."""
        if not file.is_file():
            raise UserError(f"{file}: does not exist")
        folder = self.folder.resolve()
        try:
            sent = file.resolve().relative_to(folder).as_posix()
        except ValueError:
            raise UserError(
                f"{file}: is outside {folder}, which is all that is sent to the cluster; move it there, or give "
                "--working-dir"
            ) from None
        if part := is_left_out(sent):
            raise UserError(f"{file}: {part} is left out of what is sent to the cluster; copy the file elsewhere")
        if self.checkout is not None and sent in self.checkout.ignored:
            raise UserError(f"{file}: .gitignore names it, so it is not sent to the cluster; copy it elsewhere")
        if self.checkout is not None and sent not in self.checkout.tracked:
            raise UserError(f"{file}: git does not track it, so it is not sent to the cluster; `git add {file}`")
        return sent


def is_left_out(path: str) -> str:
    """The part of a path in the upload by which it is left out; "" if it is not."""
    parts = PurePosixPath(path).parts
    for part in (f"/{parts[0]}", *parts):
        if is_secret_file(part) or any(fnmatch(part, pattern) for pattern in NOT_SENT):
            return part.removeprefix("/")
    return ""


def names(paths: Sequence[str]) -> str:
    """A few of them, and how many more."""
    few = ", ".join(shown(path, 80) for path in paths[:_NAMES_TOLD])
    return few if len(paths) <= _NAMES_TOLD else f"{few} and {len(paths) - _NAMES_TOLD} more"


def read_checkout(folder: Path) -> Checkout | None:
    """None where there is no git, or git tracks nothing in this folder."""
    if not folder.is_dir():
        raise UserError(f"--working-dir {folder}: is not a folder")
    tracked = _listed(folder)
    if not tracked:
        return None
    others = [p for p in _listed(folder, "--others", "--directory", "--no-empty-directory") if not is_left_out(p)]
    if len(others) > _MOST_OTHERS:
        raise UserError(
            f"{folder.resolve()}: {len(others):,} files that git does not track are beside those that it does, for "
            f"example {names(others)}; move them elsewhere"
        )
    return Checkout(
        frozenset(tracked),
        tuple(_listed(folder, "--others", "--exclude-standard", "--directory", "--no-empty-directory")),
        tuple(others),
        frozenset(_listed(folder, "--cached", "--ignored", "--exclude-standard")),
    )


def require_fits(
    files: Mapping[str, int], limit_bytes: int, packed: Callable[[Sequence[str], int], int | None]
) -> None:
    """UserError if the files, path -> bytes, are more than the head takes. `packed`: their size when compressed, None
    if that is beyond a limit.
    """
    total = sum(files.values())
    if total <= limit_bytes or packed(sorted(files), limit_bytes) is not None:
        return
    largest = sorted(files, key=lambda path: -files[path])[:3]
    raise UserError(
        f"the upload is {total / 1e6:,.0f} MB, and a head takes {limit_bytes / 1e6:.0f} MB; the largest: "
        + ", ".join(f"{shown(path, 80)} {files[path] / 1e6:.0f} MB" for path in largest)
        + "; name in .rayignore what no node needs, or keep it outside of the folder that is sent"
    )


def packed_bytes(folder: Path, paths: Sequence[str], limit_bytes: int) -> int | None:
    """About the size of the archive that Ray makes; None as soon as it is beyond the limit."""
    total = 0
    for path in paths:
        packer = zlib.compressobj()
        with (folder / path).open("rb") as file:
            while block := file.read(1 << 20):
                total += len(packer.compress(block))
                if total > limit_bytes:
                    return None
        total += len(packer.flush())
    return total if total <= limit_bytes else None


def _escaped(path: str) -> str:
    """A path as a pattern of .gitignore that means it alone."""
    escaped = "".join(f"\\{c}" if c in "\\*?[]!#" else c for c in path)
    return f"{escaped[:-1]}\\ " if escaped.endswith(" ") else escaped


def _listed(folder: Path, *options: str) -> list[str]:
    command = ["git", "-C", str(folder), "ls-files", "-z", *options]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise Fault(f"{folder}: git has not listed its files for {_LIMIT_S:g} s") from None
    except OSError:
        return []  # no git here
    return [path for path in done.stdout.decode(errors="surrogateescape").split("\0") if path]


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
    working_dir: str
    excludes: tuple[str, ...]
    env: Mapping[str, str]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def runtime_env(self) -> dict[str, Any]:
        return {"working_dir": self.working_dir, "excludes": list(self.excludes), "env_vars": dict(self.env)}

    def command_line(self, ray: Sequence[str] = ("ray",)) -> str:
        """The `ray job submit` line that sends the same job. `ray`: how that command is called here."""
        rest = {key: value for key, value in self.runtime_env.items() if key != "working_dir"}
        words = [*ray, "job", "submit", "--address", self.address, "--submission-id", self.submission_id]
        words += ["--working-dir", self.working_dir, "--runtime-env-json", json.dumps(rest)]
        words += ["--metadata-json", json.dumps(dict(self.metadata)), "--", *self.entrypoint]
        return shlex.join(words)


def job_lines(address: str, submission_id: str, ray: Sequence[str] = ("ray",)) -> str:
    """How to follow a job and to stop it, ready to be typed."""
    follow = shlex.join([*ray, "job", "logs", "--address", address, "--follow", submission_id])
    return f"follow it: {follow}\nstop it:   {shlex.join([*ray, 'job', 'stop', '--address', address, submission_id])}"


def ray_command(settings: Mapping[str, str], found: str | None, python: Path) -> list[str]:
    """Ray's command with the variables that it needs. `found`: that in PATH; another than ours is not meant."""
    beside = python.parent / "ray"
    command = "ray" if found == str(beside) or not beside.exists() else str(beside)
    return [*(["env", *(f"{key}={value}" for key, value in settings.items())] if settings else []), command]


def plan_submission(
    command: str,
    arguments: Sequence[str],
    profile: Profile,
    *,
    name: str,
    address: str,
    upload: Upload,
    python: str,
    now: datetime,
    code: CodeVersion | None = None,
) -> Submission:
    """The job that runs `command` with `arguments`. Raises UserError for what could only work on this machine.

    `code`: what is uploaded, which the nodes cannot ask git about.
    """
    require_no_secret(arguments, profile)
    require_seen_by_nodes(command, arguments, profile)
    # The driver's own limit must pass first: it saves a checkpoint, or reports that it could not.
    version = {CODE_KEY: as_text(code)} if code else {}
    env = {**profile.env, **version, "RAY_JOB_STOP_WAIT_TIME_S": f"{profile.failure.stop_grace_s + _STOP_MARGIN_S:g}"}
    return Submission(
        address=address,
        submission_id=f"{name}-{now:%Y%m%d-%H%M%S}",
        entrypoint=(python, "-m", MODULES[command], command, *arguments),
        working_dir=str(upload.folder),
        excludes=upload.excludes,
        env=env,
        metadata={RUN_KEY: name, **({"resnet-dist-commit": code.commit} if code else {})},
    )


def jobs_address(given: str | None, profile: Profile, environment: Mapping[str, str]) -> str:
    """In order of precedence: the option, the profile, RAY_API_SERVER_ADDRESS, RAY_ADDRESS if it is a dashboard's, this
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
    upload: Upload,
) -> tuple[str, tuple[str, ...]]:
    """The run's name, and the command's arguments as the nodes will read them: files relative to the upload.

    Raises UserError for an unknown command, a wrong recipe, or a file that does not travel.
    """
    if command not in MODULES:
        raise UserError(f"submit {command}: takes {', '.join(MODULES)}")
    files = [argument for argument in given if _is_yaml(argument)]
    arguments = [upload.require_sent(Path(a)) if a in files else a for a in given]
    if command == "tune" and files:
        space = load_space(Path(files[0]), [value for _, value in _options(given, ("--set",))])
        upload.require_sent(Path(files[0]).parent / space.base)
    name = name or _default_name(command, files, given)
    require_run_name(name)
    if command == "convert":
        return name, tuple(arguments)
    arguments += ["--on", upload.require_sent(profile_file)]
    arguments += [word for value in profile_sets for word in ("--profile-set", value)]
    return name, (*arguments, "--name", name)


def _default_name(command: str, files: Sequence[str], given: Sequence[str]) -> str:
    """As `train` names a run itself; a conversion is named after what it makes."""
    if command == "convert":
        outputs = [value for _, value in _options(given, ("--output",))]
        if not outputs:
            raise UserError("submit convert: give --output")
        folder, _, beton = outputs[-1].rpartition("/")
        return as_run_name(f"convert-{folder.rpartition('/')[2]}-{beton.removesuffix('.beton')}")[:128]
    if not files:
        raise UserError(f"submit {command}: give a YAML file, as resnet-dist {command} takes it")
    if command == "tune":
        return Path(files[0]).stem
    recipe = load_recipe(Path(files[0]), [value for _, value in _options(given, ("--set",))])
    return f"{Path(files[0]).stem}-{recipe_hash(recipe)[:8]}"


def _is_yaml(argument: str) -> bool:
    return not argument.startswith("-") and "=" not in argument and argument.endswith((".yaml", ".yml"))


def require_no_secret(arguments: Sequence[str], profile: Profile) -> None:
    """A job's command line and files are seen by all who see the cluster. Raises UserError for what holds a secret."""
    secrets = [f"{option} {value}" for option, value in pairwise(("", *arguments)) if holds_secret(f"{option} {value}")]
    secrets += [f"the profile's {key}: {value}" for key, value in flatten(profile).items() if holds_secret(value)]
    if secrets:
        raise UserError(
            f"{redacted(secrets[0]).strip()}: holds a secret, and everybody on the cluster sees a job; export "
            "it where the nodes' Ray is started: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or "
            "MLFLOW_TRACKING_TOKEN for MLflow, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for a bucket"
        )


def require_seen_by_nodes(command: str, arguments: Sequence[str], profile: Profile) -> None:
    """A job runs in a folder of its own, which goes away with it and to which relative paths would lead: UserError that
    names them all."""
    if command == "convert":
        named = _options(arguments, ("--input", "--output", "--labels", "--devkit", "--classes"))
    else:
        keys = ("data_root", "storage", "cache", "sweeps")
        named = [(key, str(value)) for key in keys if (value := getattr(profile, key)) is not None]
    relative = [f"{key} {value}" for key, value in named if "://" not in value and not value.startswith(("/", "~"))]
    problems = []
    if relative:
        what = "is" if len(relative) == 1 else "are"
        problems.append(
            f"{', '.join(relative)}: {what} relative to the folder of a job, which goes away with it; give a path "
            "that all nodes see, or a URL"
        )
    if command != "convert" and re.match(r"sqlite:(?!////)", profile.tracking_uri):
        problems.append(
            f"tracking_uri {profile.tracking_uri}: is relative to the folder of a job, which goes away with it; "
            "set tracking_uri to an MLflow server, http://HOST:5000"
        )
    if problems:
        raise UserError("; ".join(problems))


def _options(arguments: Sequence[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """The given values of `--name VALUE` and `--name=VALUE`."""
    joined = [(option, value) for option, equals, value in (a.partition("=") for a in arguments) if equals]
    return [(option, value) for option, value in (*joined, *pairwise(arguments)) if option in names]
