"""The other splits of a data set lie beside a beton: which of its samples are there too is told when it is made."""

from __future__ import annotations

from data_prep.beton.contents import find_overlap
from data_prep.beton.manifest import Manifest
from data_prep.beton.stage import find_manifest, read_contents
from data_prep.errors import UserError

SPLITS = ("train", "val", "test")
"""Names of betons under which trainings and evaluations look for them, in the order in which a split is held against
another."""


def shared_samples(beton: str, manifest: Manifest) -> list[str]:
    """A line for each split beside `beton`, a path or a URL, that has samples of it. Empty where that is not known."""
    folder, separator, name = beton.rpartition("/")
    mine = name.removesuffix(".beton")
    if mine not in SPLITS:
        return []
    manifests: dict[str, Manifest | None] = {mine: manifest}
    told = []
    for other in SPLITS:
        if other == mine:
            continue
        first, second = sorted((mine, other), key=SPLITS.index)
        try:
            manifests[other] = find_manifest(f"{folder}{separator}{other}.beton")
            line = _shared(f"{folder}{separator}", first, manifests[first], second, manifests[second])
        except (OSError, UserError) as error:
            line = f"whether {first} and {second} share samples is not known: {error}"
        if line is not None:
            told.append(line)
    return told


def _shared(folder: str, first: str, of_first: Manifest | None, second: str, of_second: Manifest | None) -> str | None:
    if of_first is None or of_second is None:
        return None
    end = "accuracy there says nothing of new images, and trainings refuse more than a few"
    if of_first.digest == of_second.digest:
        return f"{second}.beton is the same data as {first}.beton beside it: {end}"
    within, of = (read_contents(f"{folder}{name}.beton", m) for name, m in ((first, of_first), (second, of_second)))
    found = find_overlap(of, within) if of is not None and within is not None else None
    if found is None:
        return None
    return (
        f"{found.num_shared:,} of {found.num_samples:,} samples of {second}.beton are in {first}.beton beside it too "
        f"(first: sample {found.first[0]} is its sample {found.first[1]}): {end}"
    )
