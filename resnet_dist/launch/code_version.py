"""Which code ran: the git commit of this checkout and what was changed since, and the versions of its libraries."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("resnet-dist", "ray", "torch", "torchvision", "ffcv", "numba", "numpy", "mlflow", "pillow")
_MAX_DIFF_BYTES = 256 * 1024
_LIMIT_S = 10.0


@dataclass(frozen=True)
class CodeVersion:
    commit: str
    dirty: bool
    """Whether tracked files differ from the commit, or files are there that git neither tracks nor ignores."""
    diff: str
    """`git diff HEAD` and the names of untracked files; cut at 256 KiB."""


def read_code_version(folder: Path) -> CodeVersion | None:
    """None where `folder` is no git checkout (an installed package, a Ray job's upload), or git is missing or slow."""
    if not (folder / ".git").exists():
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=normal")
    diff = _git(folder, "diff", "HEAD", "--no-color", "--no-ext-diff")
    if commit is None or status is None or diff is None:
        return None
    untracked = [f"untracked: {line[3:]}" for line in status.splitlines() if line.startswith("??")]
    return CodeVersion(commit.strip(), bool(status.strip()), shortened("\n".join([*untracked, diff])))


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
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, timeout=_LIMIT_S, check=True, text=True
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout
