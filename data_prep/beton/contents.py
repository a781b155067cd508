"""`<name>.samples.bin`, beside a beton: what each of its images was in the source, to tell whether two share any.

16 bytes per sample, in their order: xxh3_128 of the image's file as the source has it, so that other settings hide
nothing. Its own digest stands in the manifest. These find equal files, not forged ones: who wants to hide that images
are shared changes a byte of each, whatever the digest; who can add images needs no forgery to make it seem so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from data_prep.beton.digest import digest_bytes
from data_prep.beton.manifest import Manifest

CONTENTS = ".samples.bin"
"""In place of `.beton`."""
CONTENT = np.dtype("V16")
NO_CONTENT = bytes(CONTENT.itemsize)


def content_of(data: bytes | memoryview) -> bytes:
    return xxhash.xxh3_128_digest(data)


def parse_contents(data: bytes, manifest: Manifest) -> NDArray[np.void]:
    """[num_samples], `CONTENT`. ValueError unless they are those of the manifest's beton."""
    if digest_bytes(data) != manifest.samples_digest:
        raise ValueError("is not what the manifest says")
    return np.frombuffer(data, dtype=CONTENT)


@dataclass(frozen=True)
class Overlap:
    """What of one beton's samples is in another too."""

    num_shared: int
    num_samples: int
    first: tuple[int, int]
    """Ids of the first that is in both: here, there."""

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
    """From the last to the first, so that of equal ones the first stays."""
    places = np.flatnonzero(chosen)[::-1]
    return zip(places, contents[places], strict=True)
