"""What is known of each sample of a beton: its file in the source, class, size, how it is stored; and its picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.contents import content_of, read_contents
from data_prep.beton.layout import MODE_JPEG, MODE_NAMES
from data_prep.beton.manifest import ADOPTED
from data_prep.beton.paths import read_paths, why_no_paths
from data_prep.beton.reader import BetonReader, open_beton
from data_prep.beton.table import Columns
from data_prep.errors import Fault, UserError
from data_prep.shown import shown

_ROWS = 1 << 16


@dataclass(frozen=True)
class SampleFacts:
    index: int
    path: str
    """In the source; empty if it is not known."""
    label: int
    class_name: str
    width: int
    height: int
    """px, as stored."""
    kind: str
    """`jpeg`, or `raw` pixels."""
    num_bytes: int
    is_original: bool | None
    """Whether the stored bytes are those of the source's file; None if that is not known."""


class Samples:
    """The samples of a beton by index, and what is recorded beside it.

    Raises UserError if the beton, its manifest or a file beside it cannot be read or do not belong together.
    """

    def __init__(self, beton: Path) -> None:
        self.reader = open_beton(beton)
        self.manifest = self.reader.manifest
        self.paths = read_paths(str(beton), self.manifest)
        self._contents = read_contents(beton, self.manifest)

    @property
    def why_no_paths(self) -> str | None:
        """A line about what to do if there are no source paths."""
        return why_no_paths(str(self.reader.path), self.manifest) if self.paths is None else None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> SampleFacts:
        """UserError for an index outside 0..len-1."""
        reader = self.reader
        if not 0 <= index < len(self):
            raise UserError(f"{reader.path}: has the samples 0..{len(self) - 1}, asked for {index}")
        label = reader.label(index)
        return SampleFacts(
            index=index,
            path=self.path(index),
            label=label,
            class_name=self.manifest.class_names[label],
            width=reader.width(index),
            height=reader.height(index),
            kind=MODE_NAMES[reader.mode(index)],
            num_bytes=int(reader.sizes[index]),
            is_original=self.is_original(index),
        )

    def path(self, index: int) -> str:
        return "" if self.paths is None else self.paths[index]

    def is_original(self, index: int) -> bool | None:
        if self.reader.mode(index) != MODE_JPEG:
            return False
        if self._contents is None or self.manifest.source.get("name") == ADOPTED:
            return None
        return content_of(self.reader.image_bytes(index)) == self._contents[index].tobytes()

    def table(self) -> Iterator[Columns]:
        """All samples, for `write_table`; names are safe to show."""
        reader, names = self.reader, [shown(name, None) for name in self.manifest.class_names]
        for start in range(0, len(self), _ROWS):
            part = slice(start, start + _ROWS)
            labels = reader.labels[part].tolist()
            yield {
                "index": list(range(start, start + len(labels))),
                "path": [shown(self.path(start + row), None) for row in range(len(labels))],
                "label": labels,
                "class": [names[label] for label in labels],
                "width": reader.widths[part].tolist(),
                "height": reader.heights[part].tolist(),
                "bytes": reader.sizes[part].tolist(),
                "kind": [MODE_NAMES[mode] for mode in reader.modes[part].tolist()],
            }


def pixels_of(reader: BetonReader, index: int) -> NDArray[np.uint8]:
    """The picture as stored: uint8 [height, width, 3], RGB. Fault, naming the sample, if it does not decode."""
    from data_prep.jpeg.check import decode

    stored = bytes(reader.image_bytes(index))
    height, width = reader.height(index), reader.width(index)
    if reader.mode(index) != MODE_JPEG:
        return np.frombuffer(stored, np.uint8).reshape(height, width, 3)
    try:
        return decode(stored, height, width)
    except ValueError as error:
        raise Fault(
            f"sample {index} of {reader.path} cannot be decoded: {error}; "
            f"`data-prep verify {quote(str(reader.path))} --decode all` lists all such samples"
        ) from None
