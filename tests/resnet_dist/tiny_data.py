"""A data set that converts in a moment."""

from __future__ import annotations

from pathlib import Path

from data_prep.converter.convert import convert
from data_prep.sources.datasets.builtin import Synthetic


def write_tiny_digits(root: Path) -> Path:
    """Four classes as `root`/digits: 16 images to train, 8 to validate."""
    folder = root / "digits"
    folder.mkdir()
    for name, num_samples in (("train", 16), ("val", 8)):
        source = Synthetic(num_samples=num_samples, num_classes=4, min_side=8, max_side=8, split=name)
        convert(source, folder / f"{name}.beton")
    return folder
