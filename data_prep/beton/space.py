"""Is there room for a file, before hours are spent on it? A full disk is still an error of its own when it comes."""

from __future__ import annotations

import os
from pathlib import Path

from data_prep.errors import Fault


def free_bytes(folder: Path) -> int:
    """Of its file system, for this user."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def lacking_bytes(path: Path, total_bytes: int) -> int:
    """What the file, which may have holes or not be there, still needs to have that size."""
    there = path.stat().st_blocks * 512 if path.exists() else 0
    return total_bytes - there


def require_space(path: Path, total_bytes: int) -> None:
    """Fault when the file system of `path` has less free than `path` still lacks of `total_bytes`."""
    lacking = lacking_bytes(path, total_bytes)
    free = free_bytes(path.parent)
    if lacking > free:
        raise Fault(
            f"{path.parent}: has {free / 1e9:,.2f} GB free, {lacking / 1e9:,.2f} GB are needed; make "
            "room there, then run the same command again"
        )
