"""The interface between a run and its storage, and the storage for a user's path or URL.

A run has few small files (its record, its spool, its result) and a few large folders (its checkpoints). The small ones
are ordinary files in `folder`, the storage itself or a working copy of it; the large ones appear completely or not at
all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from data_prep.beton.files import make_folder, read_small, write_text_atomically
from data_prep.strict_json import parse
from resnet_dist.errors import UserError

TEMPORARY = ".tmp"
"""The suffix of folders that are being written, where storage cannot name a folder last."""
MAX_SMALL_BYTES = 256 << 20
"""Limit for a small file."""
_MAX_JSON_BYTES = 64 << 20
SWEEP_LEDGER = "ledger.jsonl"
"""The file that distinguishes a sweep's folder from a run's."""
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's own list of a run's checkpoints, which no run resumes from."""
RUN_RESULT = "result.json"
"""Written last of all into a run's folder; its presence means that the run is complete."""


class RunStorage(Protocol):
    """The storage of one run. Picklable; names are relative to the run, with `/`; every request has a time limit.

    Raises Fault if storage cannot be reached or refuses; a missing file or folder is never a Fault.
    """

    @property
    def location(self) -> str:
        """Path or URL, as a command takes it; it holds no credentials."""

    @property
    def folder(self) -> Path:
        """The run's small files on this machine; touches nothing."""

    @property
    def sync_every_s(self) -> float:
        """How often to call `extended` for a file that grows: a lost machine loses at most this much."""

    def pull(self, group: str = "") -> None:
        """Makes `folder`, and brings it, or only its folder `group`, up to date with storage. Not while this process
        writes in it."""

    def upload(self, path: Path) -> None:
        """Copies a small file that was written in `folder` to storage, completely or not at all."""

    def create_exclusive(self, path: Path) -> bool:
        """Creates the empty file `path` in `folder` for this process alone; False if another has it, anywhere."""

    def extended(self, path: Path, num_bytes: int) -> None:
        """Makes the first `num_bytes` of `path` survive this machine; the file only ever grows."""

    def names(self, group: str = "") -> list[str]:
        """The names of the folders and files in the run, or in its folder `group`. Temporary ones too."""

    def commit(self, name: str, write: Callable[[Path], None], last: str) -> None:
        """Lets `write` fill a local folder, and puts it in storage as `name`, replacing what has this name.

        A reader sees all of it, or finds the file `last` missing. Raises what `write` raises; then nothing is left.
        """

    def fetched(self, name: str) -> AbstractContextManager[Path]:
        """A local folder with the files of the folder `name`, while the context is open; empty if there are none."""

    def read(self, name: str) -> bytes | None:
        """The content of a small file as it is in storage now; None if there is none."""

    def remove(self, name: str) -> None:
        """Removes a file or folder; a kill in between never leaves a folder that looks complete."""

    def require_writable(self) -> None:
        """Raises UserError, with how to fix it, unless a file can be written beside the run."""


# A run's small JSON files, in its folder on this machine.


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in the file, None if there is no such file. Raises UserError if it holds anything else."""
    try:
        tree = parse(read_small(path, _MAX_JSON_BYTES), max_bytes=_MAX_JSON_BYTES, allow_nan=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it if it is damaged") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a JSON object; remove the file if it is damaged")
    return tree


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Replaces the file atomically: a reader sees the old one or the new one, even after a power cut."""
    make_folder(path.parent)
    write_text_atomically(path, json.dumps(tree, indent=1, sort_keys=True))
