"""Makes betons from samples of other betons, without encoding again: merge and subset.

Each chunk that is used is first compared with its manifest: a damaged beton must not become a new one that verifies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.class_names import difference
from data_prep.beton.contents import CONTENT, CONTENTS, read_contents
from data_prep.beton.digest import CHUNK_BYTES, chunk_digest, digest_bytes
from data_prep.beton.files import BETON, cannot_be_written, require_space, temporary_beside, write_bytes_atomically
from data_prep.beton.layout import STORED_ROW, lay_out
from data_prep.beton.manifest import Manifest, describe_beton, manifest_path, write_manifest
from data_prep.beton.paths import PATHS, pack_paths, read_paths
from data_prep.beton.ranges import payload_of, write_beton
from data_prep.beton.reader import BetonReader, open_beton
from data_prep.beton.statistics import Stored, measure_all
from data_prep.errors import Fault, UserError
from data_prep.shown import few

MAX_GENERATIONS = 3
"""Levels of inputs of inputs that a manifest names: a chain of merges has no end."""


def merge(
    betons: Sequence[str | Path], output: str | Path, on_written: Callable[[int, int], None] = lambda *_: None
) -> Manifest:
    """All samples of the first, then all of the second, ...

    Args:
        on_written: called with the bytes written so far and in all; may raise to stop.

    Raises:
        UserError: their class names differ, the same images are given twice, or the output exists.
        Fault: the disk is full, or an input is damaged.
    """
    if len(betons) < 2:
        raise UserError("merge needs at least two betons")
    inputs = [open_beton(beton) for beton in betons]
    _require_different(inputs)
    _require_same_classes(inputs)
    chosen = ChosenSamples(
        inputs=np.concatenate([np.full(len(beton), number) for number, beton in enumerate(inputs)]),
        samples=np.concatenate([np.arange(len(beton)) for beton in inputs]),
        labels=np.concatenate([beton.labels for beton in inputs]),
        class_names=inputs[0].manifest.class_names,
    )
    identity = digest_bytes(" ".join(beton.manifest.digest for beton in inputs).encode())
    source = {"name": "merge", "location": "", "split": inputs[0].manifest.source.get("split", "all")}
    return copy_samples(inputs, chosen, Path(output), source={**source, "identity": identity}, on_written=on_written)


def _require_different(inputs: Sequence[BetonReader]) -> None:
    """UserError if two inputs have the same content, whatever their names: their samples would be there twice."""
    first: dict[str, BetonReader] = {}
    for beton in inputs:
        same = first.setdefault(beton.manifest.digest, beton)
        if same is not beton:
            raise UserError(
                f"merge: {same.path} and {beton.path} hold the same images; name them once (samples are repeated on "
                "purpose with `data-prep subset BETON --output FILE --indices FILE`)"
            )


def _require_same_classes(inputs: Sequence[BetonReader]) -> None:
    names = inputs[0].manifest.class_names
    for other in inputs[1:]:
        differ = difference(names, other.manifest.class_names, str(inputs[0].path), str(other.path))
        if differ is not None:
            raise UserError(
                f"merge: the betons have different classes, so their labels do not mean the same: {differ}; convert "
                "them with the same class folders"
            )


@dataclass(frozen=True)
class Selection:
    """Which samples to keep: at most one of `every`, `first` and `indices`, applied to the samples of `classes`.

    UserError for any other combination.
    """

    classes: tuple[str, ...] = ()
    """Classes to keep, in the order they had, with labels from 0 again. Empty: all."""
    every: int | None = None
    """Every k-th sample, starting with the first."""
    first: int | None = None
    indices: tuple[int, ...] | None = None
    """Ids in the beton, in the new order; not together with `classes`."""

    def __post_init__(self) -> None:
        given = [name for name in ("every", "first", "indices") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"--{given[0]} and --{given[1]}: give only one of them")
        if not given and not self.classes:
            raise UserError("say what to keep: --classes, --every, --first or --indices")
        if self.indices is not None and self.classes:
            raise UserError("--indices and --classes: give only one of them")
        for name in ("every", "first"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: expected at least 1")

    def as_dict(self) -> Mapping[str, Any]:
        """The values given; for indices only their number, since there may be a million."""
        values = {name: value for name, value in asdict(self).items() if value}
        return values | ({"indices": len(self.indices)} if self.indices is not None else {})


def subset(
    beton: str | Path,
    selection: Selection,
    output: str | Path,
    on_written: Callable[[int, int], None] = lambda *_: None,
) -> Manifest:
    """The selected samples of a beton. `on_written` and errors are those of `merge`."""
    whole = open_beton(beton)
    class_names, new_labels = _keep_classes(whole, selection)
    samples = _choose(whole, selection, new_labels)
    chosen = ChosenSamples(np.zeros(len(samples), np.int64), samples, new_labels[whole.labels[samples]], class_names)
    source = {
        "name": "subset",
        "location": "",
        "split": whole.manifest.source.get("split", "all"),
        "selection": selection.as_dict(),
    }
    return copy_samples([whole], chosen, Path(output), source=source, on_written=on_written)


def _keep_classes(beton: BetonReader, selection: Selection) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names of the classes that are kept, and the new label of each old one, -1 for the others."""
    names = beton.manifest.class_names
    if not selection.classes:
        return names, np.arange(len(names))
    unknown = sorted(set(selection.classes) - set(names))
    if unknown:
        raise UserError(f"--classes: {beton.path} has no class {few(unknown)}; it has {few(names)}")
    kept = [label for label, name in enumerate(names) if name in set(selection.classes)]
    new_labels = np.full(len(names), -1, dtype=np.int64)
    new_labels[kept] = np.arange(len(kept))
    return tuple(names[label] for label in kept), new_labels


def _choose(beton: BetonReader, selection: Selection, new_labels: NDArray[np.int64]) -> NDArray[np.int64]:
    if selection.indices is not None:
        largest = max(selection.indices, default=0)
        if largest >= len(beton):
            raise UserError(f"--indices: {beton.path} has the samples 0..{len(beton) - 1}, asked for {largest}")
        return np.array(selection.indices, dtype=np.int64)
    samples = np.flatnonzero(new_labels[beton.labels] >= 0)
    return samples[:: selection.every][: selection.first]


# --- copying ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChosenSamples:
    """Samples of the new beton, in order."""

    inputs: NDArray[np.int64]
    """[num_samples] number of the input that has it."""
    samples: NDArray[np.int64]
    """[num_samples] id there."""
    labels: NDArray[np.int64]
    """[num_samples] label in the new beton."""
    class_names: tuple[str, ...]


class CheckedChunks:
    """Compares an input's chunks with its manifest, each once. Fault when one differs."""

    def __init__(self, beton: BetonReader) -> None:
        self._beton = beton
        self._done: set[int] = set()

    def require(self, start: int, stop: int) -> None:
        """Compares the chunks of the bytes start..stop-1."""
        reader, manifest = self._beton, self._beton.manifest
        for number in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)):
            if number in self._done:
                continue
            if chunk_digest(reader.chunk(number), manifest.algorithm) != manifest.chunks[number]:
                raise Fault(
                    f"{reader.path}: bytes from {number * CHUNK_BYTES:,} on are not what its manifest says; run "
                    f"`data-prep verify {quote(str(reader.path))}`, which names the samples, and get a good copy"
                )
            self._done.add(number)

    def require_tables(self) -> None:
        reader, end = self._beton, self._beton.manifest.beton_bytes
        self.require(0, int(reader.pointers.min(initial=end)))
        self.require(int((reader.pointers + reader.sizes).max(initial=0)), end)


def copy_samples(
    inputs: Sequence[BetonReader],
    chosen: ChosenSamples,
    output: Path,
    *,
    source: Mapping[str, Any],
    on_written: Callable[[int, int], None],
) -> Manifest:
    """Writes `output` and its manifest. `source`: the manifest's field of that name.

    UserError when the output exists or nothing is chosen, Fault when the disk is full or an input is damaged.
    `on_written(bytes, in all)` may raise to stop.
    """
    if output.suffix != BETON:
        raise UserError(f"--output {output}: expected a name that ends in .beton")
    for path in (output, manifest_path(output), output.with_suffix(CONTENTS), output.with_suffix(PATHS)):
        if path.exists():
            raise UserError(f"{path}: exists; remove it or choose another --output")
    if not len(chosen.samples):
        raise UserError("no sample was chosen; a beton needs at least one")
    page_bytes = max(item.manifest.page_bytes for item in inputs)
    beton = lay_out(_rows(inputs, chosen), page_bytes)

    checked = [CheckedChunks(item) for item in inputs]
    for chunks in checked:
        chunks.require_tables()

    def stored(sample: int) -> Stored:
        number, index = int(chosen.inputs[sample]), int(chosen.samples[sample])
        reader = inputs[number]
        start = int(reader.pointers[index])
        checked[number].require(start, start + int(reader.sizes[index]))
        return reader.stored(index)

    with cannot_be_written(str(output)):
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_beside(output)
        require_space(temporary, beton.total_bytes)
        contents, paths = _contents(inputs, chosen), _paths(inputs, chosen)
        statistics = {}
        if all(item.manifest.statistics for item in inputs):
            statistics = measure_all(beton.num_samples, stored, lambda *_: on_written(0, beton.total_bytes))
        payload = payload_of(lambda sample: stored(sample).data)
        digest = write_beton(output, beton, payload, temporary=temporary, after_range=on_written)
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
            paths_digest="" if paths is None else paths[1],
            statistics=statistics,
        )
        if contents is not None:
            write_bytes_atomically(output.with_suffix(CONTENTS), contents)
        if paths is not None:
            write_bytes_atomically(output.with_suffix(PATHS), paths[0])
        write_manifest(output, manifest)
    return manifest


def _contents(inputs: Sequence[BetonReader], chosen: ChosenSamples) -> bytes | None:
    """`beton.contents` of the new beton's samples; None if an input has none."""
    contents = np.zeros(len(chosen.samples), dtype=CONTENT)
    for number, item in enumerate(inputs):
        theirs = read_contents(item.path, item.manifest)
        if theirs is None:
            return None
        here = chosen.inputs == number
        contents[here] = theirs[chosen.samples[here]]
    return contents.tobytes()


def _paths(inputs: Sequence[BetonReader], chosen: ChosenSamples) -> tuple[bytes, str] | None:
    """`pack_paths` of the new beton's samples, empty for those of an input without paths; None if no input has any."""
    theirs = [read_paths(str(item.path), item.manifest) for item in inputs]
    if all(paths is None for paths in theirs):
        return None
    pairs = zip(chosen.inputs.tolist(), chosen.samples.tolist(), strict=True)
    return pack_paths("" if (paths := theirs[number]) is None else paths[sample] for number, sample in pairs)


def _rows(inputs: Sequence[BetonReader], chosen: ChosenSamples) -> NDArray[np.void]:
    rows = np.zeros(len(chosen.samples), dtype=STORED_ROW)
    rows["untouched"] = 1
    rows["label"] = chosen.labels
    for number, item in enumerate(inputs):
        here = chosen.inputs == number
        samples = chosen.samples[here]
        for name in ("mode", "width", "height", "size"):
            rows[name][here] = getattr(item, f"{name}s")[samples]
    return rows


def _ancestry(source: Mapping[str, Any], generations: int) -> dict[str, Any]:
    """An input's `source`, with `generations` levels of its own inputs."""
    inputs = source.get("inputs", ())
    kept = [
        {**entry, "source": _ancestry(entry["source"], generations - 1)}
        for entry in inputs
        if generations and isinstance(entry, dict) and isinstance(entry.get("source"), dict)
    ]
    return {**source, "inputs": kept} if inputs else dict(source)


def _name_of(item: BetonReader) -> dict[str, Any]:
    manifest = item.manifest
    return {
        "file": item.path.name,
        "digest": manifest.digest,
        "num_samples": manifest.num_samples,
        "source": _ancestry(manifest.source, MAX_GENERATIONS),
        "quarantined": list(manifest.quarantined),
        **({"salvaged": list(manifest.salvaged)} if manifest.salvaged else {}),
    }
