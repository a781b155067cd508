"""`<name>.samples.bin`, beside a beton: a digest of each image's source file, to find images that two betons share.

16 bytes per sample, in order: xxh3_128 of the file as it is in the source, so it does not depend on settings. The
manifest has the digest of all of it. This finds equal files and is no protection against an attacker: who wants to hide
shared images can change a byte of each, whatever the digest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.beton.digest import digest_bytes
from data_prep.beton.files import BETON, beside, read_location
from data_prep.beton.manifest import Manifest, find_manifest
from data_prep.beton.paths import read_paths
from data_prep.errors import UserError
from data_prep.shown import shown

CONTENTS = ".samples.bin"
"""Replaces `.beton` in the name."""
CONTENT = np.dtype("V16")
NO_CONTENT = bytes(CONTENT.itemsize)
SPLITS = ("train", "val", "test")
"""Names of betons that are compared, each with those before it."""


def content_of(data: bytes | memoryview) -> bytes:
    return xxhash.xxh3_128_digest(data)


def read_contents(beton: str | Path, manifest: Manifest) -> NDArray[np.void] | None:
    """[num_samples] `CONTENT` of `beton`, a path or a URL; None if there is none.

    UserError when it does not match the manifest.
    """
    if not manifest.samples_digest:
        return None
    where = beside(beton, CONTENTS)
    try:
        data = read_location(where, manifest.num_samples * CONTENT.itemsize)
        if digest_bytes(data) != manifest.samples_digest:
            raise ValueError("does not have the digest in the manifest")
        return np.frombuffer(data, dtype=CONTENT)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{where}: {reason}; copy it again, or remove it: then samples that train and val share are not found"
        ) from None


@dataclass(frozen=True)
class Overlap:
    """The samples of one beton that are in another too."""

    num_shared: int
    num_samples: int
    first: tuple[int, int]
    """Ids of the first sample that is in both: here, there."""

    @property
    def share(self) -> float:
        return self.num_shared / self.num_samples


def find_overlap(of: NDArray[np.void], within: NDArray[np.void]) -> Overlap | None:
    """How many of the samples `of` one beton are also `within` another; None if none is. A second for ImageNet."""
    low_of, low_within = _halves(of)[:, 0], _halves(within)[:, 0]
    candidates = np.flatnonzero(np.isin(low_of, low_within))
    places = {item.tobytes(): int(place) for place, item in _reversed(within, np.isin(low_within, low_of[candidates]))}
    shared = [int(index) for index in candidates if of[index].tobytes() in places]
    if not shared:
        return None
    return Overlap(len(shared), len(of), (shared[0], places[of[shared[0]].tobytes()]))


def _halves(contents: NDArray[np.void]) -> NDArray[np.uint64]:
    return np.ascontiguousarray(contents).view(np.uint64).reshape(-1, 2)


def _reversed(contents: NDArray[np.void], chosen: NDArray[np.bool_]) -> Iterable[tuple[np.int64, np.void]]:
    """From last to first, so that a dict keeps the first of equal ones."""
    places = np.flatnonzero(chosen)[::-1]
    return zip(places, contents[places], strict=True)


def shared_samples(beton: str, manifest: Manifest) -> list[str]:
    """A line for each split beside `beton`, a path or a URL, that shares samples with it, as far as is known."""
    folder, separator, name = beton.rpartition("/")
    mine = name.removesuffix(BETON)
    if mine not in SPLITS:
        return []
    manifests: dict[str, Manifest | None] = {mine: manifest}
    lines = []
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
            lines.append(line)
    return lines


def _shared(folder: str, first: str, of_first: Manifest | None, second: str, of_second: Manifest | None) -> str | None:
    if of_first is None or of_second is None:
        return None
    end = "accuracy there says nothing about new images, and training refuses more than a few"
    if of_first.digest == of_second.digest:
        return f"{second}.beton is the same data as {first}.beton beside it: {end}"
    within, of = (read_contents(f"{folder}{name}.beton", m) for name, m in ((first, of_first), (second, of_second)))
    found = find_overlap(of, within) if of is not None and within is not None else None
    if found is None:
        return None
    here, there = (
        f"sample {index}{f' ({shown(paths[index])})' if paths else ''}"
        for index, paths in zip(
            found.first,
            (read_paths(f"{folder}{name}.beton", m) for name, m in ((second, of_second), (first, of_first))),
            strict=True,
        )
    )
    return (
        f"{found.num_shared:,} of {found.num_samples:,} samples of {second}.beton are in {first}.beton beside it too "
        f"(first: {here} is its {there}): {end}"
    )
