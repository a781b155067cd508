"""Images that are in the training data and in the validation data too: told, or refused where they are more than few.

Compared are digests of the images' files as their sources have them, so only equal files are found.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.beton.contents import find_overlap
from data_prep.beton.manifest import Manifest
from data_prep.beton.stage import read_contents
from resnet_dist.errors import UserError
from resnet_dist.launch.data_identity import short

MAX_SHARE = 0.01
"""Of the validation samples that may be in the training data too. Real data sets have some doubles."""
_WAY_OUT = "split the data anew, or set data.allow_overlap=true if this is meant"


def check_overlap(train: Manifest, val: Manifest, train_source: str, val_source: str, *, allow: bool) -> str | None:
    """What is to be told of samples that both have. UserError when they are too many, unless the recipe allows it."""
    if train.digest == val.digest:
        return _told(f"{train_source} and {val_source} are the same data (digest {val.digest})", allow)
    contents = [read_contents(source, manifest) for source, manifest in ((train_source, train), (val_source, val))]
    if contents[0] is None or contents[1] is None:
        lacking = train_source if contents[0] is None else val_source
        return (
            f"whether {train_source} and {val_source} share images was not checked: {lacking} was made without "
            "<name>.samples.bin, which tells them apart; convert it again to know"
        )
    found = find_overlap(contents[1], contents[0])
    if found is None:
        return None
    here, there = found.first
    what = (
        f"{found.num_shared:,} of {found.num_samples:,} samples of {val_source} ({found.share:.2%}) are in "
        f"{train_source} too (first: sample {here} is its sample {there})"
    )
    if found.share <= MAX_SHARE:
        return what
    return _told(f"{what}; at most {MAX_SHARE:.0%} may be", allow)


def _told(what: str, allow: bool) -> str:
    if not allow:
        raise UserError(f"{what}: accuracy there says nothing of new images; {_WAY_OUT}")
    return f"{what}; data.allow_overlap is set: accuracy there says nothing of new images"


def training_data_note(data: Manifest, beton: Path, trained_on: str) -> str | None:
    """What to tell whoever evaluates a net on what it was trained on. `trained_on`: its identity's `data_digest`."""
    if f"train={short(data.digest)}" not in trained_on.split():
        return None
    return f"{beton}: is what the net was trained on: accuracy there says nothing of new images"
