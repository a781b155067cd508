"""The few small JSON files of a run, in its folder on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.beton.files import make_folder, read_small, write_text_atomically
from data_prep.strict_json import parse
from resnet_dist.errors import UserError

MAX_JSON_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in the file, None if there is no such file. Raises UserError if it holds anything else."""
    try:
        tree = parse(read_small(path, MAX_JSON_BYTES), max_bytes=MAX_JSON_BYTES, allow_nan=True)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it if it is damaged") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a JSON object; remove the file if it is damaged")
    return tree


def write_json(path: Path, tree: dict[str, Any], *, durable: bool = True) -> None:
    """Replaces the file as a whole: a reader sees the old one or the new one; if `durable`, even after a power cut."""
    make_folder(path.parent)
    write_text_atomically(path, json.dumps(tree, indent=1, sort_keys=True), durable=durable)
