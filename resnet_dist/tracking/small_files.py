"""The seam to storage for the few small files of a run: the one place to change when a run's folder is a bucket."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from resnet_dist.errors import UserError


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in the file, None if there is no such file. Raises UserError if it holds anything else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it if it is damaged") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a JSON object; remove the file if it is damaged")
    return tree


def write_json(path: Path, tree: dict[str, Any], *, durable: bool = True) -> None:
    """Replaces the file as a whole: a reader sees the old one or the new one; if `durable`, even after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(tree, file, indent=1, sort_keys=True)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Makes names that were just created or replaced in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
