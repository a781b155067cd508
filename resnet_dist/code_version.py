"""Which code ran: the git commit of this checkout and what was changed since, and the versions of its libraries."""

from __future__ import annotations

import base64
import json
import os
import platform
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from threading import Timer

from data_prep.redaction import is_secret_file, redacted

LIBRARIES = ("resnet-dist", "ray", "torch", "torchvision", "ffcv", "numba", "numpy", "mlflow", "pillow")
_MAX_DIFF_BYTES = 256 * 1024
_MAX_READ_BYTES = 1 << 20
_LIMIT_S = 10.0


CODE_KEY = "RESNET_DIST_CODE"
"""Environment variable of a job with the version of its code: an upload is no git checkout."""
_MAX_TEXT_CHARACTERS = 24_000


@dataclass(frozen=True)
class CodeVersion:
    commit: str
    dirty: bool
    """Whether tracked files differ from the commit, or there are files that git neither tracks nor ignores."""
    diff: str
    """`git diff HEAD` and the names of untracked files, without secrets: files by their name, values by their form. Cut
    at 256 KiB."""


def read_code_version(folder: Path) -> CodeVersion | None:
    """The version of a git checkout, or of the one that a job was submitted from; None for an installed package, and if
    git is missing or slow."""
    if not (folder / ".git").exists():
        return from_text(os.environ.get(CODE_KEY, ""))
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=normal")
    diff = _diff(folder)
    if commit is None or status is None or diff is None:
        return None
    untracked = [f"untracked: {line[3:]}" for line in status.splitlines() if line.startswith("??")]
    return CodeVersion(commit.strip(), bool(status.strip()), shortened(redacted("\n".join([*untracked, *diff]))))


def as_text(code: CodeVersion) -> str:
    """Encodes it for an environment variable: plain characters, and short for any changes."""
    max_bytes = _MAX_DIFF_BYTES
    while True:
        tree = {"commit": code.commit, "dirty": code.dirty, "diff": shortened(code.diff, max_bytes)}
        text = base64.b64encode(zlib.compress(json.dumps(tree).encode(), level=9)).decode()
        if len(text) <= _MAX_TEXT_CHARACTERS or not max_bytes:
            return text
        max_bytes //= 2


def from_text(text: str) -> CodeVersion | None:
    """None for a text that `as_text` did not make."""
    try:
        unpacked = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), 2 * _MAX_READ_BYTES)
        tree = json.loads(unpacked)
        return CodeVersion(str(tree["commit"]), bool(tree["dirty"]), str(tree["diff"]))
    except (ValueError, TypeError, KeyError, zlib.error):
        return None


def _diff(folder: Path) -> list[str] | None:
    """The names of the changed files that are left out, and the changes of all others; None where git fails."""
    # A renamed file counts as one deleted and one added: either name may be a secret's.
    how = ("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--no-renames")
    names = _git(folder, *how, "--name-only", "-z")
    if names is None:
        return None
    secret = [name for name in names.split("\0") if is_secret_file(name)]
    diff = _git(folder, *how, "--", *(f":(top,exclude,literal){name}" for name in secret))
    return None if diff is None else [*(f"left out by its name: {name}" for name in secret), diff]


def shortened(text: str, max_bytes: int = _MAX_DIFF_BYTES) -> str:
    """The text, or as much of its beginning as fits, with a last line that says so."""
    data = text.encode()
    if len(data) <= max_bytes:
        return text
    return data[:max_bytes].decode(errors="ignore") + f"\n... cut here: {len(data) - max_bytes:,} more bytes\n"


def library_versions() -> Mapping[str, str]:
    """Python's version and that of every library that can change a number; without those not installed."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def _git(folder: Path, *arguments: str) -> str | None:
    """Git's output, complete lines up to a megabyte; None if it fails or takes too long."""
    command = ["git", "-C", str(folder), "-c", "core.quotePath=off", *arguments]
    try:
        with Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL) as git:
            limit = Timer(_LIMIT_S, git.kill)
            limit.start()
            try:
                data = git.stdout.read(_MAX_READ_BYTES) if git.stdout else b""
                is_whole = len(data) < _MAX_READ_BYTES
                if not is_whole:
                    git.kill()
            finally:
                limit.cancel()
    except OSError:
        return None
    if is_whole and git.returncode:
        return None
    text = data.decode(errors="replace")  # a changed file in another encoding
    return text if is_whole else f"{text.rpartition(chr(10))[0]}\n... and more\n"
