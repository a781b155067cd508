"""`<name>.manifest.json`, beside every beton: what is in it, where it came from, how to prove that it is intact.

It is written last and atomically: a beton without one is unfinished. It contains no time and no host name, so the same
source and settings give the same manifest.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.beton import layout
from data_prep.beton.digest import (
    ALGORITHM,
    CHUNK_BYTES,
    Algorithm,
    FileDigest,
    combine,
    is_hex_digest,
    parse_digest,
)
from data_prep.beton.files import beside, read_location, write_text_atomically
from data_prep.beton.layout import MODE_NAMES, BetonLayout
from data_prep.beton.statistics import is_statistics
from data_prep.errors import UserError
from data_prep.shown import shown
from data_prep.strict_json import parse

ADOPTED = "adopted"
"""Name of the source of a beton that another writer made."""
MANIFEST_SCHEMA_VERSION = 3
_ALGORITHM_OF: Mapping[int, Algorithm] = {2: "xxh3_128", MANIFEST_SCHEMA_VERSION: ALGORITHM}
"""Schema versions that can be read, and their digests."""
MANIFEST = ".manifest.json"
"""Replaces `.beton` in the name."""
MAX_MANIFEST_BYTES = 64 << 20
"""ImageNet's has 1.3 MB, for 17,000 chunks."""
MAX_CLASS_NAME_CHARACTERS = 1000


@dataclass(frozen=True)
class Manifest:
    schema_version: int
    digest: str
    """`blake3_tree:<hex>` of the beton, see `beton/digest.py`; xxh3_128 in schema 2."""
    beton_bytes: int
    page_bytes: int
    num_samples: int
    class_names: tuple[str, ...]
    """Indexed by label."""
    class_counts: tuple[int, ...]
    """Samples of each class."""
    max_height: int
    max_width: int
    min_height: int
    min_width: int
    """px, over all stored images."""
    mode_counts: Mapping[str, int]
    """Samples stored as `jpeg` and as `raw` pixels."""
    num_untouched: int
    """Samples whose stored bytes are the source's own."""
    settings: Mapping[str, Any]
    """The conversion's settings, all of them."""
    source: Mapping[str, Any]
    """`name`, `location`, `split`, `identity` (equal for a copy elsewhere), `state` (changes with every file)."""
    versions: Mapping[str, str]
    """Versions of the libraries that encode images."""
    quarantined: tuple[Mapping[str, Any], ...]
    """Samples left out at the user's request: `index` in the source, `key`, `reason`. Empty: nothing was left out."""
    chunk_bytes: int
    chunks: tuple[str, ...]
    """Hex digests of consecutive chunks of `chunk_bytes`."""
    samples_digest: str = ""
    """`blake3:<hex>` of `<name>.samples.bin`, see `beton/contents.py`. Empty: there is none."""
    paths_digest: str = ""
    """`blake3:<hex>` of the text in `<name>.paths.txt.gz`, see `beton/paths.py`. Empty: there is none."""
    salvaged: tuple[Mapping[str, Any], ...] = ()
    """Samples whose files are damaged, stored as far as they decode: `index`, `key`, `reason` as in `quarantined`."""
    statistics: Mapping[str, Any] = field(default_factory=dict)
    """`mean` and `std` of R, G and B in grey levels, over `num_pixels` pixels of `num_images` images decoded at `size`
    px, see `beton/statistics.py`. Empty: not computed."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm of all digests."""
        return parse_digest(self.digest).algorithm

    @property
    def is_proof(self) -> bool:
        """Whether the digests detect tampering, not only accidents: those of schema 2 can be forged."""
        return parse_digest(self.digest).is_proof

    def to_json(self) -> str:
        """UserError when it is larger than `from_json` accepts."""
        lines = [
            f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in asdict(self).items()
        ]
        text = "{\n" + ",\n".join(lines) + "\n}\n"
        if len(text) * 4 > MAX_MANIFEST_BYTES < len(text.encode("utf-8", errors="backslashreplace")):
            raise UserError(
                f"the manifest would have more than {MAX_MANIFEST_BYTES >> 20} MiB, with "
                f"{len(self.quarantined) + len(self.salvaged):,} samples left out or salvaged; remove them from "
                "the source instead"
            )
        return text

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """`where` names the file in errors. UserError, naming the field, when `text` is not a valid manifest."""
        try:
            tree = parse(text, max_bytes=MAX_MANIFEST_BYTES)
        except ValueError as error:
            raise UserError(f"{where}: is not valid JSON ({error}); make the beton again") from None
        if not isinstance(tree, dict):
            raise UserError(f"{where}: expected a JSON object; make the beton again")
        version = tree.get("schema_version")
        if type(version) is not int or version not in _ALGORITHM_OF:
            raise UserError(
                f"{where}: schema_version is {shown(repr(version), 60)}, this version of data_prep reads "
                f"{' and '.join(map(str, _ALGORITHM_OF))}; make the beton again"
            )
        manifest = cls(**{field.name: _read_field(tree, field.name, str(field.type), where) for field in fields(cls)})
        reason = _contradiction(manifest)
        if reason is not None:
            raise UserError(f"{where}: {reason}; get the manifest that was made with the beton, or make both again")
        return manifest


def manifest_path(beton: Path) -> Path:
    """`train.beton` -> `train.manifest.json`."""
    return beton.with_suffix(MANIFEST)


def find_manifest(beton: str | Path) -> Manifest | None:
    """The manifest beside `beton`, a path or a URL; None if there is none. UserError when it cannot be read."""
    where = beside(beton, MANIFEST)
    try:
        text = read_location(where, MAX_MANIFEST_BYTES).decode("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{where}: cannot be read: {reason}") from None
    return Manifest.from_json(text, where)


def read_manifest(beton: str | Path) -> Manifest:
    """As `find_manifest`, but UserError when it is missing. The beton itself need not exist."""
    manifest = find_manifest(beton)
    if manifest is None:
        where, name = beside(beton, MANIFEST), str(beton).rpartition("/")[2]
        remedy = (
            f"; run the command that was making it again, or, if ffcv's own writer made it, `data-prep adopt {name}`"
        )
        raise UserError(
            f"{where}: does not exist, so {name} is unfinished or was not made by data-prep"
            + ("" if "://" in where else remedy)
        )
    return manifest


def require_file(beton: Path) -> None:
    """UserError unless `beton` is a regular file, and not a manifest."""
    if beton.name.endswith(MANIFEST):
        raise UserError(f"{beton}: is a manifest; give the beton beside it, NAME.beton")
    if beton.is_dir():
        inside = sorted(path.name for path in beton.glob("*.beton"))
        such_as = f", such as {inside[0]} in it" if inside else ""
        raise UserError(f"{beton}: is a folder; expected a .beton{such_as}")
    if not beton.exists():
        raise UserError(f"{beton}: does not exist; `data-prep convert --help` says how to make one")
    if not beton.is_file():
        raise UserError(f"{beton}: is not a regular file; expected a .beton")


def load_manifest(beton: Path) -> Manifest:
    """The manifest of a beton that exists and has the size in the manifest. UserError otherwise."""
    require_file(beton)
    manifest = read_manifest(beton)
    require_size(str(beton), beton.stat().st_size, manifest)
    return manifest


def require_size(beton: str, num_bytes: int | None, manifest: Manifest) -> None:
    """UserError unless the beton has the size in its manifest. `num_bytes`: its size; None if it does not exist."""
    if num_bytes is None:
        raise UserError(f"{beton}: does not exist, though its manifest does; copy it there, or remove the manifest")
    if num_bytes != manifest.beton_bytes:
        raise UserError(
            f"{beton}: has {num_bytes} bytes, its manifest says {manifest.beton_bytes}: copied in part, or not the "
            "beton of this manifest; copy or make it again"
        )


def write_manifest(beton: Path, manifest: Manifest) -> None:
    write_text_atomically(manifest_path(beton), manifest.to_json())


def describe_beton(
    beton: BetonLayout,
    digest: FileDigest,
    *,
    class_names: tuple[str, ...],
    num_untouched: int,
    settings: Mapping[str, Any],
    source: Mapping[str, Any],
    versions: Mapping[str, str],
    quarantined: tuple[Mapping[str, Any], ...] = (),
    samples_digest: str = "",
    paths_digest: str = "",
    salvaged: tuple[Mapping[str, Any], ...] = (),
    statistics: Mapping[str, Any] = {},
) -> Manifest:
    """The manifest of a beton with this layout and digest."""
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
        settings=settings,
        source=source,
        versions=versions,
        quarantined=quarantined,
        chunk_bytes=CHUNK_BYTES,
        chunks=digest.chunks,
        samples_digest=samples_digest,
        paths_digest=paths_digest,
        salvaged=salvaged,
        statistics=statistics,
    )


def count_modes(modes: NDArray[np.uint8]) -> dict[str, int]:
    return {name: int((modes == mode).sum()) for mode, name in enumerate(MODE_NAMES)}


def count_classes(labels: NDArray[np.int64], num_classes: int) -> tuple[int, ...]:
    """Number of samples of each label. ValueError when a label is outside 0..num_classes-1."""
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise ValueError(f"labels {int(labels.min())}..{int(labels.max())} do not fit {num_classes} classes")
    return tuple(np.bincount(labels, minlength=num_classes).tolist())


_MAX_INTEGER = (1 << 63) - 1
_SIDE_FILES = ("samples_digest", "paths_digest")
_ITEM_TYPES: Mapping[str, type] = {
    "tuple[str, ...]": str,
    "tuple[int, ...]": int,
    "tuple[Mapping[str, Any], ...]": dict,
}


_OPTIONAL: Mapping[str, Any] = {**dict.fromkeys(_SIDE_FILES, ""), "salvaged": (), "statistics": {}}
"""Fields that manifests of earlier versions, or of betons that were not converted, lack, and what they mean then."""


def _read_field(tree: Mapping[str, Any], name: str, annotation: str, where: str) -> Any:
    """A field of `Manifest`. `annotation`: its type there, by which the value is checked."""
    if name in _OPTIONAL and name not in tree:
        return _OPTIONAL[name]
    if name not in tree:
        raise UserError(f"{where}: {name} is missing; make the beton again")
    value = tree[name]
    item_type = _ITEM_TYPES.get(annotation)
    if item_type is not None:
        valid, expected = _is_list_of(value, item_type), f"a list of {item_type.__name__}"
    elif annotation == "int":
        valid, expected = _is_count(value), "a number of at least 0"
    elif annotation == "str":
        valid, expected = isinstance(value, str), "a string"
    else:
        valid, expected = isinstance(value, dict), "an object"
    if not valid:
        raise UserError(f"{where}: {name} should be {expected}; make the beton again")
    return tuple(value) if item_type is not None else value


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INTEGER


def _is_list_of(value: object, item_type: type) -> bool:
    if not isinstance(value, list):
        return False
    return all(_is_count(v) if item_type is int else type(v) is item_type for v in value)


def _contradiction(manifest: Manifest) -> str | None:
    """Why the fields, each of the right type, cannot describe one beton; None if they can."""
    try:
        digest = parse_digest(manifest.digest)
        side_files = [(name, parse_digest(text)) for name in _SIDE_FILES if (text := getattr(manifest, name))]
    except ValueError as error:
        return f"digest: {error}"
    num_chunks = -(-manifest.beton_bytes // CHUNK_BYTES)
    smallest_bytes = layout.METADATA_START + manifest.num_samples * layout.SAMPLE_METADATA.itemsize
    modes = manifest.mode_counts
    if not digest.is_tree or digest.algorithm != _ALGORITHM_OF[manifest.schema_version]:
        return f"digest is {manifest.digest}, which does not match schema_version {manifest.schema_version}"
    for name, of_file in side_files:
        if of_file.is_tree or not of_file.is_proof:
            return f"{name} is {getattr(manifest, name)}, expected {ALGORITHM}:..."
    if manifest.chunk_bytes != CHUNK_BYTES:
        return f"chunk_bytes is {manifest.chunk_bytes}, expected {CHUNK_BYTES}"
    if len(manifest.chunks) != num_chunks:
        return f"has {len(manifest.chunks)} chunks, {manifest.beton_bytes} bytes have {num_chunks}"
    for number, chunk in enumerate(manifest.chunks):
        if not is_hex_digest(chunk, digest.algorithm):
            return f"chunks: {number} is {shown(chunk, 40)!r}, which is not a digest"
    if combine(manifest.chunks, digest.algorithm).whole != manifest.digest:
        return "its digest is not that of its chunks"
    if not layout.is_page_size(manifest.page_bytes):
        return f"page_bytes is {manifest.page_bytes}, expected a power of two"
    if not manifest.num_samples or smallest_bytes > manifest.beton_bytes:
        return f"num_samples is {manifest.num_samples}, which {manifest.beton_bytes} bytes do not hold"
    if (reason := class_names_problem(manifest.class_names)) is not None:
        return reason
    if len(manifest.class_counts) != manifest.num_classes or sum(manifest.class_counts) != manifest.num_samples:
        return (
            f"class_counts are of {len(manifest.class_counts)} classes and {sum(manifest.class_counts)} samples, "
            f"expected {manifest.num_classes} and {manifest.num_samples}"
        )
    if set(modes) != set(MODE_NAMES) or not all(map(_is_count, modes.values())):
        return f"mode_counts should be numbers of {' and '.join(MODE_NAMES)}"
    if sum(modes.values()) != manifest.num_samples or manifest.num_untouched > manifest.num_samples:
        return f"mode_counts or num_untouched do not match num_samples {manifest.num_samples}"
    for low, high in (("min_height", "max_height"), ("min_width", "max_width")):
        if not 1 <= getattr(manifest, low) <= getattr(manifest, high) <= layout.MAX_SIDE_PX:
            return f"{low} and {high} are not sides of images: {getattr(manifest, low)}, {getattr(manifest, high)}"
    for field_name in ("quarantined", "salvaged"):
        for entry in getattr(manifest, field_name):
            texts = (entry.get("key"), entry.get("reason"))
            if not (_is_count(entry.get("index")) and all(isinstance(text, str) for text in texts)):
                return f"{field_name}: expected an index, a key and a reason for each"
    if manifest.statistics and not is_statistics(manifest.statistics):
        return "statistics should have size, mean, std, num_images and num_pixels"
    if not all(isinstance(version, str) for version in manifest.versions.values()):
        return "versions should be strings"
    return None


def class_names_problem(names: Sequence[str]) -> str | None:
    """Why these cannot be class names, which are also shown in tables; None if they can."""
    if not names:
        return "class_names is empty"
    for label, name in enumerate(names):
        if not name or len(name) > MAX_CLASS_NAME_CHARACTERS or any(unicodedata.category(c) == "Cc" for c in name):
            expected = f"1..{MAX_CLASS_NAME_CHARACTERS} characters, none of them a control character"
            return f"class_names: class {label} is {shown(repr(name), 80)}, expected {expected}"
    return None
