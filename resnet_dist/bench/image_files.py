"""A beton's JPEGs as files, as the peers read them."""

from __future__ import annotations

from pathlib import Path

from data_prep.beton.layout import MODE_JPEG
from data_prep.beton.reader import BetonReader
from resnet_dist.errors import UserError


def write_files(beton: Path, folder: Path) -> int:
    """A folder per label, in the order of the samples within it; returns how many. UserError for raw pixels."""
    reader = BetonReader(beton)
    if (reader.modes != MODE_JPEG).any():
        raise UserError(f"{beton}: holds raw pixels too; the peers read JPEG files only")
    for k in range(len(reader)):
        path = folder / f"{reader.label(k):04d}" / f"{k:08d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(reader.image_bytes(k))
    return len(reader)
