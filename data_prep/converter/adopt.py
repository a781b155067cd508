"""Gives a beton that the stock ffcv `DatasetWriter` made a manifest, after checking every sample."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_prep.beton.contents import CONTENTS, content_of
from data_prep.beton.digest import CHUNK_BYTES, digest_bytes, digest_file
from data_prep.beton.files import cannot_be_written, write_bytes_atomically
from data_prep.beton.manifest import (
    ADOPTED,
    MANIFEST_SCHEMA_VERSION,
    Manifest,
    class_names_problem,
    count_classes,
    count_modes,
    find_manifest,
    manifest_path,
    require_file,
    write_manifest,
)
from data_prep.beton.reader import BetonReader
from data_prep.beton.statistics import measure_all
from data_prep.converter.verify import MAX_NAMED, problem_of
from data_prep.errors import Fault, UserError
from data_prep.shown import few
from data_prep.sources.labels import MAX_CLASSES
from data_prep.sources.splits import WHOLE, splits_in


def adopt(
    beton: str | Path,
    class_names: Sequence[str] | None = None,
    on_decoded: Callable[[int, int], None] = lambda *_: None,
) -> Manifest:
    """Writes the manifest of a beton that ffcv's own writer made, so that everything here takes it.

    The beton itself is only read. All its images are decoded, as `verify` does.

    >>> import data_prep, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = data_prep.convert("synthetic", f"{folder}/a.beton", input="n=5,size=32..64,classes=2")
    ...     pathlib.Path(folder, "a.manifest.json").unlink()
    ...     data_prep.adopt(f"{folder}/a.beton", ["cat", "dog"]).class_counts
    (3, 2)

    Args:
        class_names: by label, and more of them than labels if some have no images; None: the numbers are the names.
        on_decoded: called with the number of images decoded so far, and of all; may raise to stop.

    Raises:
        UserError: it has a manifest already, other fields than an RGB image and a whole number, labels without a name,
            or is damaged; samples that do not decode are named.
        Fault: the beton changed meanwhile, or the manifest cannot be written.
    """
    path = Path(beton).expanduser().absolute()
    require_file(path)
    before = find_manifest(path)
    if before is not None and before.source.get("name") != ADOPTED:
        raise UserError(f"{path}: has a manifest beside it already, so there is nothing to adopt")
    state = _state(path)
    reader = BetonReader(path)
    names = _class_names(reader, class_names)
    _require_sound(reader, on_decoded)
    digest = digest_file(path)
    contents = b"".join(content_of(reader.image_bytes(index)) for index in range(len(reader)))
    if _state(path) != state:
        raise Fault(f"{path}: changed while it was read; run the same command again when it is complete")
    meant = splits_in(path.stem)
    manifest = Manifest(
        schema_version=MANIFEST_SCHEMA_VERSION,
        digest=digest.whole,
        beton_bytes=path.stat().st_size,
        page_bytes=reader.page_bytes,
        num_samples=len(reader),
        class_names=names,
        class_counts=count_classes(reader.labels, len(names)),
        max_height=int(reader.heights.max()),
        max_width=int(reader.widths.max()),
        min_height=int(reader.heights.min()),
        min_width=int(reader.widths.min()),
        mode_counts=count_modes(reader.modes),
        num_untouched=0,
        settings={"writer": "ffcv"},
        source={
            "name": ADOPTED,
            "location": str(path),
            "split": next(iter(meant)) if len(meant) == 1 else WHOLE,
            "identity": digest.whole,
        },
        versions={},
        quarantined=(),
        chunk_bytes=CHUNK_BYTES,
        chunks=digest.chunks,
        samples_digest=digest_bytes(contents),
        statistics=measure_all(len(reader), reader.stored),
    )
    with cannot_be_written(str(manifest_path(path))):
        write_bytes_atomically(path.with_suffix(CONTENTS), contents)
        write_manifest(path, manifest)
    return manifest


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _class_names(reader: BetonReader, given: Sequence[str] | None) -> tuple[str, ...]:
    if not len(reader):
        raise UserError(f"{reader.path}: holds no samples")
    smallest, largest = int(reader.labels.min()), int(reader.labels.max())
    if smallest < 0 or largest >= MAX_CLASSES:
        odd = smallest if smallest < 0 else largest
        raise UserError(
            f"{reader.path}: sample {int(np.argmax(reader.labels == odd))} has label {odd}; expected the number of a "
            "class from 0: hidden labels (-1) and regression are not supported"
        )
    names = tuple(map(str, range(largest + 1))) if given is None else tuple(given)
    if largest >= len(names):
        raise UserError(
            f"{reader.path}: sample {int(np.argmax(reader.labels == largest))} has label {largest}, and {len(names):,} "
            f"classes are listed ({few(names)}): is it the list of another data set?"
        )
    if (problem := class_names_problem(names)) is not None:
        raise UserError(f"{reader.path}: {problem}")
    return names


def _require_sound(reader: BetonReader, on_decoded: Callable[[int, int], None]) -> None:
    bad = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        try:
            for index, reason in enumerate(threads.map(lambda index: problem_of(reader, index), range(len(reader)))):
                if reason is not None:
                    bad.append(f"{index} ({reason})")
                on_decoded(index + 1, len(reader))
        finally:
            threads.shutdown(cancel_futures=True)
    if bad:
        raise UserError(
            f"{reader.path}: {len(bad):,} of {len(reader):,} samples cannot be trained on: "
            f"{few(bad, most=MAX_NAMED)}; make it again from its images, with `data-prep convert --help`"
        )
