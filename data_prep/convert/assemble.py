"""Parts -> beton and manifest: rows first (they give the layout), then the images' bytes, streamed into pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_prep.beton.digest import CHUNK_BYTES, FileDigest
from data_prep.beton.manifest import (
    MANIFEST_SCHEMA_VERSION,
    Manifest,
    count_classes,
    count_modes,
    write_manifest,
)
from data_prep.beton.pages import BetonLayout, lay_out
from data_prep.beton.writer import write_beton
from data_prep.convert.part import open_part, part_path
from data_prep.convert.plan import Plan
from data_prep.errors import Fault


def assemble(
    plan: Plan,
    class_names: tuple[str, ...],
    folder: Path,
    output: Path,
    after_page: Callable[[int, int], None],
) -> Manifest:
    """Writes `output` and, last, its manifest. `after_page(pages written, pages in all)` may raise to stop.

    Fault when a part is damaged, or the disk is full.
    """
    try:
        return _assemble(plan, class_names, folder, output, after_page)
    except OSError as error:
        raise Fault(
            f"{output}: cannot be written: {error.strerror}; mend that, then run the same command again"
        ) from None


def _assemble(
    plan: Plan,
    class_names: tuple[str, ...],
    folder: Path,
    output: Path,
    after_page: Callable[[int, int], None],
) -> Manifest:
    rows = []
    for unit in plan.units:
        with open_part(part_path(folder, unit), plan.digest, unit) as part:
            rows.append(part.rows)
    stored = np.concatenate(rows)
    beton = lay_out(stored, plan.settings.page_bytes)
    digest = write_beton(
        output,
        beton,
        _PayloadStream(_payload(plan, folder)),
        temporary=folder / "beton.tmp",
        after_page=lambda page: after_page(page, beton.num_pages),
    )
    manifest = _describe(plan, class_names, beton, int(stored["untouched"].sum()), digest)
    write_manifest(output, manifest)
    return manifest


def _payload(plan: Plan, folder: Path) -> Iterator[bytes]:
    for unit in plan.units:
        with open_part(part_path(folder, unit), plan.digest, unit) as part:
            yield from part.payload()


class _PayloadStream:
    """An iterator of pieces as something that fills buffers."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        while not len(self._rest):
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _describe(
    plan: Plan, class_names: tuple[str, ...], beton: BetonLayout, num_untouched: int, digest: FileDigest
) -> Manifest:
    image = beton.metadata["image"]
    return Manifest(
        schema_version=MANIFEST_SCHEMA_VERSION,
        digest=digest.whole,
        beton_bytes=beton.total_bytes,
        page_bytes=beton.page_bytes,
        num_samples=beton.num_samples,
        class_names=class_names,
        class_counts=count_classes(beton.metadata["label"], len(class_names)),
        max_height=int(image["height"].max()),
        max_width=int(image["width"].max()),
        min_height=int(image["height"].min()),
        min_width=int(image["width"].min()),
        mode_counts=count_modes(image["mode"]),
        num_untouched=num_untouched,
        settings=plan.settings.as_dict(),
        source=asdict(plan.source),
        versions=plan.versions,
        quarantined=(),
        chunk_bytes=CHUNK_BYTES,
        chunks=digest.chunks,
    )
