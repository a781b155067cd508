"""Which files of a folder `resnet-dist submit` uploads: those that git tracks; without git, all but NOT_SENT."""

from __future__ import annotations

import subprocess
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from data_prep.redaction import SECRET_FILES, is_secret_file
from data_prep.shown import few, shown
from resnet_dist.errors import Fault, UserError
from resnet_dist.launch.ray_internals import most_upload_bytes, uploaded_files

NOT_SENT = (".git", ".venv*", "/data", "/runs", "/tests", "/docs", "*.beton", "*.db", "*.log", "__pycache__")
"""Left out of the upload, besides secrets and what .gitignore and .rayignore name; in their syntax."""
_GIT_LIMIT_S = 60.0
_MAX_UNTRACKED = 2000
"""Untracked files and folders: each one is a pattern that Ray compares with every file."""


@dataclass(frozen=True)
class Upload:
    folder: Path
    files: Mapping[str, int]
    """Path relative to `folder` -> bytes, of everything that Ray sends."""
    excludes: tuple[str, ...]
    """What Ray leaves out, in the syntax of .gitignore."""
    tracked: frozenset[str] | None
    """Paths that git tracks; None: the folder is in no git checkout."""
    untracked: tuple[str, ...]
    """Neither tracked nor ignored. A folder, with a slash at its end, stands for all that is in it."""

    def warnings(self) -> list[str]:
        """What a user might expect to be sent and is not."""
        untracked = [path for path in self.untracked if not _is_left_out(path)]
        secret = [path for path in sorted(self.tracked or ()) if is_secret_file(path)]
        return [
            *([f"not sent, because git does not track it: {few(untracked)}"] if untracked else []),
            *([f"not sent (named as secrets are): {few(secret)}"] if secret else []),
        ]

    def require_sent(self, file: Path) -> str:
        """`file` as the job names it: relative to the upload. Raises UserError for one that is not sent."""
        if not file.is_file():
            raise UserError(f"{file}: does not exist")
        folder = self.folder.resolve()
        if not file.resolve().is_relative_to(folder):
            raise UserError(
                f"{file}: is outside {folder}, which is all that is sent to the cluster; move it there, or give "
                "--working-dir"
            )
        sent = file.resolve().relative_to(folder).as_posix()
        if sent not in self.files:
            why = "its name is a secret's, or .gitignore, .rayignore or `submit` leaves it out; copy it elsewhere"
            if self.tracked is not None and sent not in self.tracked and not _is_left_out(sent):
                why = f"git does not track it; `git add {file}`"
            raise UserError(f"{file}: is not sent to the cluster: {why}")
        return sent


def read_upload(folder: Path) -> Upload:
    """Raises UserError for a folder that is none, or that holds more than a head takes."""
    if not folder.is_dir():
        raise UserError(f"--working-dir {folder}: is not a folder")
    tracked = _git_files(folder)
    # Ray reads the .gitignore files of this folder, but neither those above it nor git's own settings.
    others = _git_files(folder, "--others", "--directory", "--no-empty-directory") if tracked else []
    others = [path for path in others if not _is_left_out(path)]
    if len(others) > _MAX_UNTRACKED:
        raise UserError(
            f"{folder.resolve()}: {len(others):,} files that git does not track are beside those that it does, for "
            f"example {few(others)}; move them elsewhere"
        )
    excludes = (*NOT_SENT, *SECRET_FILES, *(f"/{_escaped(path)}" for path in others))
    files = uploaded_files(folder, excludes)
    _require_fits(folder, files, most_upload_bytes())
    untracked = _git_files(folder, "--others", "--exclude-standard", "--directory", "--no-empty-directory")
    return Upload(folder, files, excludes, frozenset(tracked) or None, tuple(untracked) if tracked else ())


def _is_left_out(path: str) -> bool:
    """By its name, or that of a folder above it."""
    parts = PurePosixPath(path).parts
    return is_secret_file(path) or any(fnmatch(p, pattern) for p in (f"/{parts[0]}", *parts) for pattern in NOT_SENT)


def _escaped(path: str) -> str:
    """A path as a pattern of .gitignore that means it alone."""
    escaped = "".join(f"\\{c}" if c in "\\*?[]!#" else c for c in path)
    return f"{escaped[:-1]}\\ " if escaped.endswith(" ") else escaped


def _git_files(folder: Path, *options: str) -> list[str]:
    """Empty where there is no git."""
    command = ["git", "-C", str(folder), "ls-files", "-z", *options]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_GIT_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise Fault(f"{folder}: git has not listed its files for {_GIT_LIMIT_S:g} s") from None
    except OSError:
        return []
    return [path for path in done.stdout.decode(errors="surrogateescape").split("\0") if path]


def _require_fits(folder: Path, files: Mapping[str, int], limit_bytes: int) -> None:
    total = sum(files.values())
    if total <= limit_bytes or _fits_packed(folder, sorted(files), limit_bytes):
        return
    largest = sorted(files, key=lambda path: -files[path])[:3]
    raise UserError(
        f"the upload is {total / 1e6:,.0f} MB, and a head takes {limit_bytes / 1e6:.0f} MB; the largest: "
        + ", ".join(f"{shown(path, 80)} {files[path] / 1e6:.0f} MB" for path in largest)
        + "; name in .rayignore what no node needs, or keep it outside of the folder that is sent"
    )


def _fits_packed(folder: Path, paths: Sequence[str], limit_bytes: int) -> bool:
    """Whether the archive that Ray makes is within the limit; reads no further than that takes."""
    total = 0
    for path in paths:
        packer = zlib.compressobj()
        with (folder / path).open("rb") as file:
            while block := file.read(1 << 20):
                total += len(packer.compress(block))
                if total > limit_bytes:
                    return False
        total += len(packer.flush())
    return total <= limit_bytes
