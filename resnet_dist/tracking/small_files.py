"""The few small JSON files of a run, in its folder on this machine."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from data_prep.beton.files import write_text_atomically
from resnet_dist.errors import UserError

_MAX_BYTES = 16 << 20


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in the file, None if there is no such file. Raises UserError if it holds anything else."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise ValueError("is not a file")
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"has more than {_MAX_BYTES:,} bytes")
        tree = json.loads(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it if it is damaged") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a JSON object; remove the file if it is damaged")
    return tree


def write_json(path: Path, tree: dict[str, Any], *, durable: bool = True) -> None:
    """Replaces the file as a whole: a reader sees the old one or the new one; if `durable`, even after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(tree, indent=1, sort_keys=True), durable=durable)
