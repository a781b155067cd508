"""Is a beton what its source gives? Samples are encoded once more, as the manifest's settings say, and compared.

Encoding is a pure function of bytes and settings, so with the same libraries the comparison is exact; with others only
what is stored untouched can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.class_names import difference
from data_prep.beton.manifest import Manifest, load_manifest
from data_prep.beton.reader import BetonReader
from data_prep.beton.verify import shorten, spread
from data_prep.convert.config import ConvertSettings
from data_prep.convert.encode import BadSample, encode, encoder_versions
from data_prep.errors import UserError
from data_prep.sources.base import Source, UnreadableSample, read_sample


def compare_with_source(
    beton: Path, source: Source, count: int | None, on_compared: Callable[[int, int], None] = lambda *_: None
) -> list[str]:
    """One readable line per problem. `count`: how many samples, spread evenly; None for all.

    UserError when the beton was not made by `data-prep convert`, for then there is no source to compare with.
    """
    manifest = load_manifest(beton)
    settings = _settings_of(manifest, beton)
    reader = BetonReader(beton)
    indices = _source_indices(manifest, len(source))
    if len(indices) != len(reader):
        left_out = len(manifest.quarantined)
        return [f"the source has {len(source):,} samples, the beton {len(reader):,} and {left_out} left out"]
    if source.class_names != manifest.class_names:
        words = difference(source.class_names, manifest.class_names, "the source", "the beton")
        return [f"has other classes than its source: {words}; if it was made with --classes, say that here too"]
    same_libraries = manifest.versions == encoder_versions()
    wrong = []
    chosen = spread(len(reader), count)
    for done, sample in enumerate(chosen.tolist(), 1):
        reason = _difference(reader, sample, source, int(indices[sample]), settings, same_libraries)
        if reason is not None:
            wrong.append(f"{sample} ({source.key(int(indices[sample]))}: {reason})")
        on_compared(done, len(chosen))
    return [f"{len(wrong)} of {len(chosen)} samples are not what the source gives: {shorten(wrong)}"] if wrong else []


def _settings_of(manifest: Manifest, beton: Path) -> ConvertSettings:
    try:
        return ConvertSettings.from_dict(manifest.settings)
    except (TypeError, ValueError):
        raise UserError(
            f"{beton}: its manifest has no settings of a conversion; compare the betons that it was made of"
        ) from None


def _source_indices(manifest: Manifest, num_source: int) -> NDArray[np.int64]:
    left_out = {int(entry["index"]) for entry in manifest.quarantined if "index" in entry}
    return np.array([index for index in range(num_source) if index not in left_out], dtype=np.int64)


def _difference(
    reader: BetonReader, sample: int, source: Source, index: int, settings: ConvertSettings, same_libraries: bool
) -> str | None:
    try:
        original = read_sample(source, index)
        encoded = encode(original.data, settings, index)
    except (UnreadableSample, BadSample) as error:
        return str(error)
    if original.label != reader.label(sample):
        return f"label {original.label}, stored is {reader.label(sample)}"
    if encoded.mode != reader.mode(sample):
        return "is stored as another kind"
    if (encoded.height, encoded.width) != (reader.height(sample), reader.width(sample)):
        return f"{encoded.width} x {encoded.height} px, stored are {reader.width(sample)} x {reader.height(sample)}"
    if (encoded.untouched or same_libraries) and encoded.data != reader.image_bytes(sample):
        return "other bytes"
    return None
