"""Finds the files and folders that a path, a URL, a glob or a pattern with braces names."""

from __future__ import annotations

import glob
import itertools
import re
from pathlib import Path

from data_prep.errors import UserError
from data_prep.shown import shown
from data_prep.sources.files.local import LocalPath
from data_prep.sources.files.paths import IS_URL, StoragePath, without_credentials

GLOB = re.compile(r"[*?\[]")
BRACES = re.compile(r"\{([^{}]*)\}")
NUMBER_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
MAX_EXPANDED = 1_000_000


def storage_path(location: str) -> StoragePath:
    """`location`: a local path or a URL. UserError when nothing here reads such URLs."""
    if not IS_URL.match(location):
        return LocalPath(str(Path(location).expanduser().resolve()))
    if location.startswith("file://"):
        return LocalPath(str(Path(location.removeprefix("file://")).resolve()))
    from data_prep.sources.files.remote import remote_path

    try:
        return remote_path(location)
    except OSError as error:
        raise UserError(f"{without_credentials(location)}: cannot be read: {error.strerror or error}") from None


def find_paths(location: str) -> list[StoragePath]:
    """The files that a name, a glob or a pattern with braces matches, in order; a folder gives itself.

    `{000..127}` counts with leading zeros, `{a,b}` lists; files named by braces may be missing.
    """
    found: list[StoragePath] = []
    for expanded in expand_braces(location):
        if not GLOB.search(expanded) or (IS_URL.match(expanded) and "*" not in expanded):
            found.append(storage_path(expanded))
        elif IS_URL.match(expanded) and not expanded.startswith("file://"):
            from data_prep.sources.files.remote import remote_glob

            found += remote_glob(expanded)
        elif Path(expanded).expanduser().exists():  # a name that looks like a pattern
            found.append(storage_path(expanded))
        else:
            pattern = str(Path(expanded.removeprefix("file://")).expanduser())
            found += [storage_path(name) for name in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207  # absolute
    return found


def expand_braces(pattern: str) -> list[str]:
    """Expands numbers and lists as a shell does: `a-{00..02}` -> `a-00`, `a-01`, `a-02`. ValueError beyond
    MAX_EXPANDED."""
    pieces: list[list[str]] = []
    count, at = 1, 0
    for match in BRACES.finditer(pattern):
        choices = _choices(match)
        pieces += [[pattern[at : match.start()]], choices]
        at = match.end()
        count *= len(choices)
        if count > MAX_EXPANDED:
            raise ValueError(f"{shown(pattern)} counts to more than {MAX_EXPANDED:,}")
    pieces.append([pattern[at:]])
    return ["".join(chosen) for chosen in itertools.product(*pieces)]


def _choices(braces: re.Match[str]) -> list[str]:
    span = NUMBER_RANGE.fullmatch(braces[1])
    if span is None:
        return braces[1].split(",") if "," in braces[1] else [braces[0]]  # a single word is not expanded
    first, last = int(span[1]), int(span[2])
    if last - first >= MAX_EXPANDED:
        raise ValueError(f"{braces[0]} counts to more than {MAX_EXPANDED:,}")
    if last < first:
        raise ValueError(f"{braces[0]} counts down; put the smaller number first")
    width = len(span[1]) if span[1].startswith("0") else 0
    return [str(number).zfill(width) for number in range(first, last + 1)]
