"""`<name>.manifest.json`, beside every beton: what is in it, where it came from, how to prove that it is whole.

It is written last and atomically: a beton without one is unfinished. It holds no time and no host name, so the same
source and settings give the same manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.beton.digest import CHUNK_BYTES, FileDigest
from data_prep.beton.files import write_text_atomically
from data_prep.beton.layout import MODE_NAMES
from data_prep.beton.pages import BetonLayout
from data_prep.errors import UserError

MANIFEST_SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Manifest:
    schema_version: int
    digest: str
    """`xxh3_128_tree:<hex>` of the whole beton: xxh3_128 of the digests in `chunks`, see `beton/digest.py`."""
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
    """Of the libraries that decide re-encoded bytes."""
    quarantined: tuple[Mapping[str, Any], ...]
    """Samples left out on the user's word: `index` in the source, `key`, `reason`. Empty: nothing was left out."""
    chunk_bytes: int
    chunks: tuple[str, ...]
    """Hex xxh3_128 of consecutive chunks of `chunk_bytes`."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def to_json(self) -> str:
        lines = [
            f" {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in asdict(self).items()
        ]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """`where` names the file in errors. UserError, naming the field, when `text` is no such manifest."""
        try:
            tree = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where}: is not valid JSON ({error}); make the beton again") from None
        if not isinstance(tree, dict):
            raise UserError(f"{where}: expected a JSON object; make the beton again")
        if tree.get("schema_version") != MANIFEST_SCHEMA_VERSION:
            raise UserError(
                f"{where}: schema_version is {tree.get('schema_version')!r}, this version of data_prep reads "
                f"{MANIFEST_SCHEMA_VERSION}; make the beton again"
            )
        return cls(**{field.name: _read_field(tree, field.name, where) for field in fields(cls)})


def manifest_path(beton: Path) -> Path:
    """`train.beton` -> `train.manifest.json`."""
    return beton.with_suffix(".manifest.json")


def read_manifest(beton: Path) -> Manifest:
    """The manifest of `beton`, without a look at the beton. UserError when it is missing or not readable."""
    path = manifest_path(beton)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{path}: does not exist, so {beton.name} is unfinished or was not made by data-prep; "
            f"make it with `data-prep convert --output {beton}`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return Manifest.from_json(text, str(path))


def load_manifest(beton: Path) -> Manifest:
    """The manifest of a beton that exists and has the size the manifest says. UserError otherwise."""
    if not beton.is_file():
        raise UserError(f"{beton}: does not exist; make it with `data-prep convert --output {beton}`")
    manifest = read_manifest(beton)
    require_size(str(beton), beton.stat().st_size, manifest)
    return manifest


def require_size(beton: str, num_bytes: int | None, manifest: Manifest) -> None:
    """UserError unless the beton has the size that its manifest says. `num_bytes` is None where there is no beton."""
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
) -> Manifest:
    """The manifest of a beton with that layout and those bytes."""
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
    )


def count_modes(modes: NDArray[np.uint8]) -> dict[str, int]:
    return {name: int((modes == mode).sum()) for mode, name in enumerate(MODE_NAMES)}


def count_classes(labels: NDArray[np.int64], num_classes: int) -> tuple[int, ...]:
    """Samples of each label. ValueError when a label is outside 0..num_classes-1."""
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise ValueError(f"labels {int(labels.min())}..{int(labels.max())} do not fit {num_classes} classes")
    return tuple(np.bincount(labels, minlength=num_classes).tolist())


_INTEGERS = frozenset(
    {
        "schema_version",
        "beton_bytes",
        "page_bytes",
        "num_samples",
        "max_height",
        "max_width",
        "min_height",
        "min_width",
        "num_untouched",
        "chunk_bytes",
    }
)
_LISTS_OF: Mapping[str, type] = {"class_names": str, "class_counts": int, "quarantined": dict, "chunks": str}
_MAPPINGS = frozenset({"mode_counts", "settings", "source", "versions"})


def _read_field(tree: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in tree:
        raise UserError(f"{where}: {name} is missing; make the beton again")
    value = tree[name]
    if name in _INTEGERS:
        valid, expected = type(value) is int and value >= 0, "a number of at least 0"
    elif name in _LISTS_OF:
        valid, expected = _is_list_of(value, _LISTS_OF[name]), f"a list of {_LISTS_OF[name].__name__}"
    elif name in _MAPPINGS:
        valid, expected = isinstance(value, dict), "an object"
    else:
        valid, expected = isinstance(value, str), "a string"
    if not valid:
        raise UserError(f"{where}: {name} should be {expected}; make the beton again")
    return tuple(value) if name in _LISTS_OF else value


def _is_list_of(value: Any, item_type: type) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(type(v) is item_type for v in value)
