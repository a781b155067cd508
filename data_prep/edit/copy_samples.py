"""A new beton from samples of others: their rows give the layout, their bytes are copied.

Each chunk of an input that is used is compared with its manifest first: a damaged beton must not become a new one that
verifies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.contents import CONTENT, CONTENTS
from data_prep.beton.digest import CHUNK_BYTES, chunk_digest, digest_bytes
from data_prep.beton.files import temporary_beside, write_bytes_atomically
from data_prep.beton.manifest import Manifest, describe_beton, load_manifest, manifest_path, write_manifest
from data_prep.beton.pages import STORED_ROW, lay_out
from data_prep.beton.ranges import payload_of, write_beton
from data_prep.beton.reader import BetonReader
from data_prep.beton.space import require_space
from data_prep.beton.stage import read_contents
from data_prep.errors import Fault, UserError

MAX_GENERATIONS = 3
"""Of inputs of inputs, that a manifest tells of."""


@dataclass(frozen=True)
class Input:
    reader: BetonReader
    manifest: Manifest


@dataclass(frozen=True)
class Chosen:
    """Samples of the new beton, in order."""

    inputs: NDArray[np.int64]
    """Number of the input that each comes from."""
    samples: NDArray[np.int64]
    """Its id there."""
    labels: NDArray[np.int64]
    """Its label in the new beton."""
    class_names: tuple[str, ...]


class _Compared:
    """The chunks of an input as its manifest says, or Fault."""

    def __init__(self, item: Input) -> None:
        self._item = item
        self._done: set[int] = set()

    def require(self, start: int, stop: int) -> None:
        """Compares what of the bytes start..stop-1 was not compared before."""
        reader, manifest = self._item.reader, self._item.manifest
        for number in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)):
            if number in self._done:
                continue
            if chunk_digest(reader.chunk(number), manifest.algorithm) != manifest.chunks[number]:
                raise Fault(
                    f"{reader.path}: bytes {number * CHUNK_BYTES:,} and on are not what its manifest says; run "
                    f"`data-prep verify {quote(str(reader.path))}`, which names the samples, and get a good copy"
                )
            self._done.add(number)

    def require_tables(self) -> None:
        reader = self._item.reader
        first = int(reader.pointers.min(initial=self._item.manifest.beton_bytes))
        last = int((reader.pointers + reader.sizes).max(initial=0))
        self.require(0, first)
        self.require(last, self._item.manifest.beton_bytes)


def open_input(beton: Path) -> Input:
    """UserError when the beton or its manifest is missing or not whole by its size."""
    manifest = load_manifest(beton)
    return Input(BetonReader(beton), manifest)


def copy_samples(
    inputs: Sequence[Input],
    chosen: Chosen,
    output: Path,
    *,
    source: Mapping[str, Any],
    on_written: Callable[[int, int], None] = lambda *_: None,
) -> Manifest:
    """Writes `output` and its manifest. `source`: what the manifest says of where the samples come from.

    UserError when the output exists or nothing is chosen, Fault when the disk is full or an input is damaged.
    `on_written(bytes, in all)` may raise to stop.
    """
    if output.suffix != ".beton":
        raise UserError(f"--output {output}: expected a name that ends in .beton")
    for path in (output, manifest_path(output), output.with_suffix(CONTENTS)):
        if path.exists():
            raise UserError(f"{path}: exists; remove it or choose another --output")
    if not len(chosen.samples):
        raise UserError("no sample was chosen; a beton needs at least one")
    page_bytes = max(item.manifest.page_bytes for item in inputs)
    beton = lay_out(_rows(inputs, chosen), page_bytes)

    compared = [_Compared(item) for item in inputs]
    for item in compared:
        item.require_tables()

    def stored(sample: int) -> memoryview:
        number, index = int(chosen.inputs[sample]), int(chosen.samples[sample])
        reader = inputs[number].reader
        start = int(reader.pointers[index])
        compared[number].require(start, start + int(reader.sizes[index]))
        return reader.image_bytes(index)

    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(output)
        require_space(temporary, beton.total_bytes)
        contents = _contents(inputs, chosen)
        digest = write_beton(output, beton, payload_of(stored), temporary=temporary, after_range=on_written)
        settings = [item.manifest.settings for item in inputs]
        manifest = describe_beton(
            beton,
            digest,
            class_names=chosen.class_names,
            num_untouched=beton.num_samples,
            settings=settings[0] if all(s == settings[0] for s in settings) else {"inputs": settings},
            source={**source, "inputs": [_name_of(item) for item in inputs]},
            versions=inputs[0].manifest.versions,
            samples_digest="" if contents is None else digest_bytes(contents),
        )
        if contents is not None:
            write_bytes_atomically(output.with_suffix(CONTENTS), contents)
        write_manifest(output, manifest)
    except OSError as error:
        raise Fault(f"{output}: cannot be written: {error.strerror}; fix that, then run the same command") from None
    return manifest


def _contents(inputs: Sequence[Input], chosen: Chosen) -> bytes | None:
    """Of the new beton's samples; None when one of the inputs does not tell."""
    contents = np.zeros(len(chosen.samples), dtype=CONTENT)
    for number, item in enumerate(inputs):
        theirs = read_contents(item.reader.path, item.manifest)
        if theirs is None:
            return None
        here = chosen.inputs == number
        contents[here] = theirs[chosen.samples[here]]
    return contents.tobytes()


def _rows(inputs: Sequence[Input], chosen: Chosen) -> NDArray[np.void]:
    rows = np.zeros(len(chosen.samples), dtype=STORED_ROW)
    rows["untouched"] = 1
    rows["label"] = chosen.labels
    for number, item in enumerate(inputs):
        here = chosen.inputs == number
        samples = chosen.samples[here]
        for name in ("mode", "width", "height", "size"):
            rows[name][here] = getattr(item.reader, f"{name}s")[samples]
    return rows


def _ancestry(source: Mapping[str, Any], generations: int) -> dict[str, Any]:
    """Where the samples of an input come from; of its own inputs' inputs only so many, for a chain of merges has no
    end."""
    inputs = source.get("inputs", ())
    kept = [
        {**entry, "source": _ancestry(entry["source"], generations - 1)}
        for entry in inputs
        if generations and isinstance(entry, dict) and isinstance(entry.get("source"), dict)
    ]
    return {**source, "inputs": kept} if inputs else dict(source)


def _name_of(item: Input) -> dict[str, Any]:
    manifest = item.manifest
    return {
        "file": item.reader.path.name,
        "digest": manifest.digest,
        "num_samples": manifest.num_samples,
        "source": _ancestry(manifest.source, MAX_GENERATIONS),
        "quarantined": list(manifest.quarantined),
    }
