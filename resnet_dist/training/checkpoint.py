"""The checkpoint directory: `epoch=007-step=00012345/` with the state, and a card that proves whole and whose it is.

`checkpoint.json` is written last and holds the digest of every other file, so a directory that was copied only in part
is told from a whole one by reading it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from resnet_dist.errors import Fault, UserError

CARD = "checkpoint.json"
STATE = "state.pt"
TEMPORARY = ".tmp"
SCHEMA_VERSION = 1
_NAME = re.compile(r"^epoch=(\d{3,})-step=(\d{8,})$")


@dataclass(frozen=True)
class Identity:
    """Whose checkpoint it is. Training goes on only from a checkpoint with an equal identity."""

    recipe_hash: str
    data_digest: str
    """Digests of the train and the val beton."""


@dataclass(frozen=True)
class Card:
    """What `checkpoint.json` says."""

    epoch: int
    step: int
    identity: Identity
    recipe: Mapping[str, Any]
    metrics: Mapping[str, float]
    files: Mapping[str, str]
    schema_version: int = SCHEMA_VERSION


def checkpoint_name(epoch: int, step: int) -> str:
    return f"epoch={epoch:03d}-step={step:08d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint's name, or None if it is no checkpoint's name."""
    match = _NAME.match(name)
    return int(match.group(2)) if match else None


def commit(final: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder with a temporary name beside `final`, makes it durable, and gives it its name.

    A checkpoint that already has this name (the run was set back, and trained to the same step again) is replaced.
    """
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}{TEMPORARY}")
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(directory: Path, *, state: Mapping[str, Any], card: Card) -> None:
    """Writes state and card into the existing, empty `directory`, both fsynced, the card last."""
    with (directory / STATE).open("wb") as state_file:
        torch.save(dict(state), state_file)
        state_file.flush()
        os.fsync(state_file.fileno())
    files = {STATE: _digest(directory / STATE)}
    text = json.dumps({**asdict(card), "files": files}, indent=2, sort_keys=True)
    with (directory / CARD).open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_card(directory: Path) -> Card:
    """The card of a whole checkpoint; Fault with the reason if the card is missing or a file's digest differs."""
    try:
        raw = json.loads((directory / CARD).read_text(encoding="utf-8"))
        if raw["schema_version"] != SCHEMA_VERSION:
            raise Fault(f"{directory}: checkpoint schema {raw['schema_version']}, this version reads {SCHEMA_VERSION}")
        card = Card(**{**raw, "identity": Identity(**raw["identity"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Fault(f"{directory}: no readable {CARD} ({error!r}): the checkpoint is incomplete") from None
    for name, expected in card.files.items():
        path = directory / name
        found = _digest(path) if path.is_file() else "missing"
        if found != expected:
            raise Fault(f"{path}: digest {found}, expected {expected}: the checkpoint is damaged")
    return card


def load_state(directory: Path, device: torch.device) -> dict[str, Any]:
    """The saved state, tensors on `device`. Only tensors and plain values are unpickled."""
    loaded: dict[str, Any] = torch.load(directory / STATE, map_location=device, weights_only=True)
    return loaded


def newest_whole(run_dir: Path) -> tuple[Path, Card, list[str]] | None:
    """The newest whole checkpoint in `run_dir`, its card, a warning for every damaged newer one; None if none."""
    warnings: list[str] = []
    for directory in newest_first(run_dir.iterdir() if run_dir.is_dir() else ()):
        try:
            return directory, read_card(directory), warnings
        except Fault as fault:
            warnings.append(str(fault))
    return None


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """The checkpoints among `paths`, newest first."""
    steps = [(step, path) for path in paths if (step := step_of(path.name)) is not None]
    return [path for _, path in sorted(steps, reverse=True)]


def require_same(found: Identity, expected: Identity, where: Path) -> None:
    """UserError, both sides shown, unless the checkpoint in `where` is of this recipe and these data."""
    if found.recipe_hash != expected.recipe_hash:
        raise UserError(
            f"{where}: this run was made with recipe {found.recipe_hash}, the command asks for recipe "
            f"{expected.recipe_hash}; give another --name, or the recipe that the run began with"
        )
    if found.data_digest != expected.data_digest:
        raise UserError(
            f"{where}: this run was trained on data {found.data_digest}, data_root now holds "
            f"{expected.data_digest}; give another --name, or the data that the run began with"
        )


def _digest(path: Path) -> str:
    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return f"xxh3_128:{hasher.hexdigest()}"
