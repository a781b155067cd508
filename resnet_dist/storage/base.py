"""The one seam between a run and its storage.

A run has few small files (its record, its spool, its result) and a few large folders (its checkpoints). The small ones
are ordinary files in `folder`, the storage itself or a working copy of it; the large ones appear whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

TEMPORARY = ".tmp"
"""Ends the names of folders that are being written, where storage cannot give a folder its name last."""
MAX_SMALL_BYTES = 256 << 20
"""Of a small file."""


class RunStorage(Protocol):
    """One run's place. Picklable; names are relative to the run, with `/`; every request has a time limit.

    Raises Fault if storage cannot be reached or refuses; a thing that is not there is never a Fault.
    """

    @property
    def location(self) -> str:
        """Path or URL, as a command takes it; it holds no credentials."""

    @property
    def folder(self) -> Path:
        """The run's small files on this machine; touches nothing."""

    @property
    def sync_every_s(self) -> float:
        """How often a file that grows is worth bringing to safety: what a lost machine may cost."""

    def pull(self) -> None:
        """Makes `folder`, and brings it up to date with storage. Not while this process writes in it."""

    def publish(self, path: Path) -> None:
        """A small file that was written in `folder` shall be in storage, whole or not at all."""

    def claim(self, path: Path) -> bool:
        """Creates the empty file `path` in `folder` for this process alone; False if another has it, anywhere."""

    def extended(self, path: Path, num_bytes: int) -> None:
        """The first `num_bytes` of `path` shall survive this machine; the file only ever grows."""

    def names(self, group: str = "") -> list[str]:
        """The names of the folders and files in the run, or in its folder `group`. Temporary ones too."""

    def commit(self, name: str, write: Callable[[Path], None], last: str) -> None:
        """Lets `write` fill a local folder, and puts it in storage as `name`, replacing what has this name.

        A reader sees all of it, or finds the file `last` missing. Raises what `write` raises; then nothing is left.
        """

    def fetched(self, name: str) -> AbstractContextManager[Path]:
        """A local folder with the files of the folder `name`, as long as this lasts; empty if there are none."""

    def read(self, name: str) -> bytes | None:
        """The content of a small file as it is in storage now; None if there is none."""

    def remove(self, name: str) -> None:
        """Removes a file or folder; a kill on the way never leaves a folder that looks whole."""

    def require_writable(self) -> None:
        """UserError, with the mend, unless a file can be written beside the run."""
