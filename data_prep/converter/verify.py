"""Checks a beton against its manifest and its source. A changed chunk is reported with the samples in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.beton import layout
from data_prep.beton.class_names import difference
from data_prep.beton.contents import read_contents
from data_prep.beton.digest import CHUNK_BYTES, digest_file
from data_prep.beton.manifest import Manifest, count_classes, count_modes, read_manifest, require_file
from data_prep.beton.paths import read_paths
from data_prep.beton.reader import BetonReader
from data_prep.converter.encode import encode, encoder_versions
from data_prep.converter.picture import BadSample
from data_prep.converter.settings import ConvertSettings
from data_prep.converter.source import open_named
from data_prep.converter.split import divided_as, source_split
from data_prep.errors import UserError
from data_prep.jpeg.check import why_unfit
from data_prep.shown import few
from data_prep.sources.base import NO_OPTIONS, Source, SourceOptions, UnreadableSample, read_sample
from data_prep.sources.splits import SplitRequest

MAX_NAMED = 5
"""Samples or chunks named in one problem; the rest are counted."""


@dataclass(frozen=True)
class VerifyReport:
    manifest: Manifest
    problems: tuple[str, ...]
    """One readable line each; empty if nothing is wrong."""
    num_decoded: int
    """Images that were decoded."""

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    beton: str | Path,
    *,
    decode: int | None = 1000,
    source: str | Source | None = None,
    input: str | None = None,
    split: str | None = None,
    options: SourceOptions = NO_OPTIONS,
    classes: str | None = None,
    skip_unlisted: bool = False,
    on_decoded: Callable[[int, int], None] = lambda *_: None,
) -> VerifyReport:
    """Checks a beton against its manifest: size, digests, structure, counts, and that its images decode.

    >>> import data_prep, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = data_prep.convert("synthetic", f"{folder}/train.beton", input="n=5,size=32..64")
    ...     report = data_prep.verify(f"{folder}/train.beton", source="synthetic", input="n=5,size=32..64")
    >>> report.ok, report.num_decoded
    (True, 5)

    Args:
        decode: how many images to decode, spread evenly; None: all.
        source: if no problem is found, as many of its samples are encoded again and compared with the stored ones. A
            name as in `convert`, with its arguments (`split` None: the beton's), or an open source.
        on_decoded: called with the number of images decoded or compared so far, and their total.

    Raises:
        UserError: the beton, its manifest or the source does not exist or is unreadable.
    """
    beton = Path(beton).expanduser().absolute()
    require_file(beton)
    manifest = read_manifest(beton)
    if isinstance(source, str):
        name = source_split(manifest.source) if split is None else split
        request = SplitRequest(name, explicit=name is not None)
        whole = open_named(source, input, request, options, classes, skip_unlisted=skip_unlisted)
        source = divided_as(manifest.source, whole)
    try:
        reader = BetonReader(beton)
    except UserError as error:
        return VerifyReport(manifest, (*_check_bytes(beton, manifest, None), str(error)), 0)
    problems = _check_bytes(beton, manifest, reader) + _check_counts(reader, manifest)
    for read in (read_contents, read_paths):
        try:
            read(str(beton), manifest)
        except UserError as error:
            problems.append(str(error))
    chosen = spread(len(reader), decode)
    bad = []
    for done, index in enumerate(chosen.tolist(), 1):
        reason = problem_of(reader, index)
        if reason is not None:
            bad.append(f"{index} ({reason})")
        on_decoded(done, len(chosen))
    if bad:
        problems.append(f"{len(bad)} of {len(chosen)} images do not decode: {few(bad, most=MAX_NAMED)}")
    if source is not None and not problems:
        problems += _compare_with_source(reader, manifest, source, decode, on_decoded)
    return VerifyReport(manifest, tuple(problems), len(chosen))


def _check_bytes(beton: Path, manifest: Manifest, reader: BetonReader | None) -> list[str]:
    actual_bytes = beton.stat().st_size
    if actual_bytes != manifest.beton_bytes:
        return [f"the file has {actual_bytes} bytes, the manifest says {manifest.beton_bytes}: copied in part?"]
    found = digest_file(beton, manifest.algorithm)
    wrong = [i for i, (a, b) in enumerate(zip(found.chunks, manifest.chunks, strict=False)) if a != b]
    if len(found.chunks) != len(manifest.chunks):
        return ["the file's size changed while it was read"]
    problems = []
    for chunk in wrong[:MAX_NAMED]:
        start, end = chunk * CHUNK_BYTES, min((chunk + 1) * CHUNK_BYTES, actual_bytes)
        problems.append(f"bytes {start}..{end - 1} changed since they were written; {_touched(reader, start, end)}")
    if len(wrong) > MAX_NAMED:
        problems.append(f"{len(wrong) - MAX_NAMED} more chunks of {CHUNK_BYTES} bytes changed")
    return problems


def _touched(reader: BetonReader | None, start: int, end: int) -> str:
    if reader is None:
        return "the samples there are not known"
    (samples,) = np.nonzero((reader.pointers < end) & (reader.pointers + reader.sizes > start))
    if not len(samples):
        return "it contains tables or padding, no image"
    return f"the images of {len(samples)} samples are there: {few(map(str, samples.tolist()), most=MAX_NAMED)}"


def _check_counts(reader: BetonReader, manifest: Manifest) -> list[str]:
    labels_fit = len(reader) and int(reader.labels.min()) >= 0 and int(reader.labels.max()) < manifest.num_classes
    found = {
        "page_bytes": reader.page_bytes,
        "num_samples": len(reader),
        "class_counts": count_classes(reader.labels, manifest.num_classes) if labels_fit else "labels outside them",
        "mode_counts": count_modes(reader.modes),
        "max_height": int(reader.heights.max(initial=0)),
        "max_width": int(reader.widths.max(initial=0)),
        "min_height": int(reader.heights.min(initial=layout.MAX_SIDE_PX)),
        "min_width": int(reader.widths.min(initial=layout.MAX_SIDE_PX)),
    }
    return [
        f"{name}: the beton has {value}, the manifest says {getattr(manifest, name)}"
        for name, value in found.items()
        if value != getattr(manifest, name)
    ]


def spread(num_samples: int, count: int | None) -> NDArray[np.int64]:
    """`count` indices, evenly from first to last; all if `count` is None or not smaller."""
    if count is None or count >= num_samples:
        return np.arange(num_samples)
    return np.unique(np.linspace(0, num_samples - 1, num=count).astype(np.int64))


def problem_of(reader: BetonReader, index: int) -> str | None:
    """Why this image does not match its metadata or cannot be decoded in full; None if it does and can."""
    from data_prep.pixels import BadPicture, require_size  # Pillow is not needed to show a command's help

    try:
        require_size(reader.width(index), reader.height(index), "convert it again with --max-side")
    except BadPicture as error:
        return str(error)
    if reader.mode(index) == layout.MODE_RAW:
        return None  # its size was checked by the reader; any bytes are pixels
    return why_unfit(bytes(reader.image_bytes(index)), reader.height(index), reader.width(index))


# --- the source -------------------------------------------------------------------------------------------------------


def _compare_with_source(
    reader: BetonReader, manifest: Manifest, source: Source, count: int | None, on_compared: Callable[[int, int], None]
) -> list[str]:
    """One readable line per problem. `count`: how many samples, spread evenly; None for all.

    Encoding is a pure function of bytes and settings, so with the same libraries the comparison is exact; with others
    only what is stored untouched can be compared. UserError when the beton was not made by `data-prep convert`.
    """
    settings = _settings_of(manifest, reader.path)
    indices = _source_indices(manifest, len(source))
    if len(indices) != len(reader):
        left_out = len(manifest.quarantined)
        return [f"the source has {len(source):,} samples, the beton {len(reader):,} and {left_out} left out"]
    if source.class_names != manifest.class_names:
        words = difference(source.class_names, manifest.class_names, "the source", "the beton")
        return [f"has other classes than its source: {words}; if it was made with --classes, give that here too"]
    same_libraries = manifest.versions == encoder_versions()
    wrong = []
    chosen = spread(len(reader), count)
    for done, sample in enumerate(chosen.tolist(), 1):
        reason = _difference(reader, sample, source, int(indices[sample]), settings, same_libraries)
        if reason is not None:
            wrong.append(f"{sample} ({source.key(int(indices[sample]))}: {reason})")
        on_compared(done, len(chosen))
    if not wrong:
        return []
    return [f"{len(wrong)} of {len(chosen)} samples are not what the source gives: {few(wrong, most=MAX_NAMED)}"]


def _settings_of(manifest: Manifest, beton: Path) -> ConvertSettings:
    try:
        return ConvertSettings.from_dict(manifest.settings)
    except (TypeError, ValueError):
        raise UserError(
            f"{beton}: its manifest has no settings of a conversion; verify the betons that it was made from"
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
