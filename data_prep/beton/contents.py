"""`<name>.samples.bin`, beside a beton: what each of its images was in the source, to tell whether two share any.

16 bytes per sample, in their order: xxh3_128 of the image's file as the source has it, so that other settings hide
nothing. Its own digest is in the manifest. These find equal files, not forged ones. Someone who wants to hide shared
images can change a byte of each, whatever the digest; someone who can add images needs no forgery to fake them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.beton.digest import digest_bytes
from data_prep.beton.files import beside, read_location
from data_prep.beton.manifest import Manifest, find_manifest
from data_prep.errors import UserError

CONTENTS = ".samples.bin"
"""In place of `.beton`."""
CONTENT = np.dtype("V16")
NO_CONTENT = bytes(CONTENT.itemsize)
SPLITS = ("train", "val", "test")
"""Names of betons that trainings and evaluations look for; a later one is compared with those before it."""


def content_of(data: bytes | memoryview) -> bytes:
    return xxhash.xxh3_128_digest(data)


def read_contents(beton: str | Path, manifest: Manifest) -> NDArray[np.void] | None:
    """[num_samples] `CONTENT` of `beton`, a path or a URL; None where that is not known.

    UserError when it is not what the manifest says.
    """
    if not manifest.samples_digest:
        return None
    where = beside(beton, CONTENTS)
    try:
        data = read_location(where, manifest.num_samples * CONTENT.itemsize)
        if digest_bytes(data) != manifest.samples_digest:
            raise ValueError("is not what the manifest says")
        return np.frombuffer(data, dtype=CONTENT)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(
            f"{where}: {reason}; copy it again, or remove it: without it nobody can tell which samples train and val "
            "share"
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
    """How many of the samples `of` one beton are `within` another too; None when none is. A second for ImageNet."""
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
    """From the last to the first, so that the first of equal ones stays."""
    places = np.flatnonzero(chosen)[::-1]
    return zip(places, contents[places], strict=True)


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
    end = "accuracy there says nothing about new images, and training refuses more than a few"
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
