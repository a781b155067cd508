"""The best weights so far, beside the checkpoints: `best/epoch=007-step=00012345/` with the net and a card.

Checkpoints serve to go on and only the newest few are kept; the best evaluation may be long ago, or lie between two
checkpoints. Weights only: half the size of a checkpoint, and only written when an evaluation beats all before it.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

from torch import nn

from resnet_dist.errors import Fault
from resnet_dist.training.checkpoint import (
    CARD,
    Card,
    Identity,
    checkpoint_name,
    commit,
    read_card,
    save_checkpoint,
    step_of,
)

_METRIC = "val/top1"


def best_folder(run_dir: Path) -> Path:
    return run_dir / "best"


def keep_if_best(run_dir: Path, net: nn.Module, card: Card) -> bool:
    """Keeps the net's weights if the card's `val/top1` is higher than that of the kept ones; the first of equals stays.

    A kill leaves the old best, the new one, or both.
    """
    folder = best_folder(run_dir)
    kept = max((top1 for path in _kept(folder) if (top1 := _top1(path, card.identity)) is not None), default=None)
    if kept is not None and card.metrics[_METRIC] <= kept:
        return False
    final = folder / checkpoint_name(card.epoch, card.step)
    commit(final, partial(save_checkpoint, state={"net": net.state_dict()}, card=card))
    for other in folder.iterdir():
        if other != final:
            shutil.rmtree(other, ignore_errors=True)
    return True


def read_best(run_dir: Path, identity: Identity) -> tuple[Path, Card] | None:
    """The best whole weights and their card; None if there are none of this recipe and these data."""
    whole: list[tuple[Path, Card]] = []
    for path in _kept(best_folder(run_dir)):
        try:
            card = read_card(path)
        except Fault:
            continue
        if card.identity == identity:
            whole.append((path, card))
    return max(whole, key=lambda found: found[1].metrics[_METRIC], default=None)


def _kept(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if step_of(path.name) is not None] if folder.is_dir() else []


def _top1(path: Path, identity: Identity) -> float | None:
    """What the card says, files unread; None if it cannot be read or is of another run."""
    try:
        card = json.loads((path / CARD).read_text(encoding="utf-8"))
        return float(card["metrics"][_METRIC]) if Identity(**card["identity"]) == identity else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
