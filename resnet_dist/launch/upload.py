"""What of a folder travels with a job: what git tracks; without git, all but what is left out by its name."""

from __future__ import annotations

import subprocess
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from data_prep.redaction import SECRET_FILES, is_secret_file
from data_prep.shown import shown
from resnet_dist.errors import Fault, UserError

NOT_SENT = (".git", ".venv*", "/data", "/runs", "/tests", "/docs", "*.beton", "*.db", "*.log", "__pycache__")
"""Left out of the upload, besides secrets and what .gitignore and .rayignore name, in their syntax."""
_LIMIT_S = 60.0
_NAMES_TOLD = 5
_MOST_OTHERS = 2000
"""Untracked files and folders, each of which Ray is told to leave out."""


@dataclass(frozen=True)
class Checkout:
    """What git says of a folder. Paths are relative to it; folders end in a slash."""

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
        """What a user may miss there."""
        if self.checkout is None:
            return []
        told = []
        if missed := [path for path in self.checkout.untracked if not is_left_out(path)]:
            told.append(f"not sent, because git does not track it: {names(missed)}")
        if secret := [path for path in sorted(self.checkout.tracked) if is_secret_file(path)]:
            told.append(f"not sent (named as secrets are): {names(secret)}")
        return told

    def require_sent(self, file: Path) -> str:
        """`file` as the job names it: relative to the upload. Raises UserError for one that does not travel."""
        if not file.is_file():
            raise UserError(f"{file}: does not exist")
        folder = self.folder.resolve()
        try:
            sent = file.resolve().relative_to(folder).as_posix()
        except ValueError:
            raise UserError(
                f"{file}: lies outside {folder}, which is all that travels to the cluster; move it there, or give "
                "--working-dir"
            ) from None
        if part := is_left_out(sent):
            raise UserError(f"{file}: {part} is left out of what travels to the cluster; copy the file elsewhere")
        if self.checkout is not None and sent in self.checkout.ignored:
            raise UserError(f"{file}: .gitignore names it, so it does not travel to the cluster; copy it elsewhere")
        if self.checkout is not None and sent not in self.checkout.tracked:
            raise UserError(f"{file}: git does not track it, so it does not travel to the cluster; `git add {file}`")
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
        raise UserError(f"--working-dir {folder}: is no folder")
    tracked = _listed(folder)
    if not tracked:
        return None
    others = [p for p in _listed(folder, "--others", "--directory", "--no-empty-directory") if not is_left_out(p)]
    if len(others) > _MOST_OTHERS:
        raise UserError(
            f"{folder.resolve()}: {len(others):,} files that git does not track lie beside those that it does, for "
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
