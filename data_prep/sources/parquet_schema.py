"""Which columns of a parquet file hold images and labels, of which types they are, and what its classes are called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.beton.class_names import difference
from data_prep.errors import UserError
from data_prep.shown import shown
from data_prep.sources.labels import MAX_CLASSES

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


@dataclass(frozen=True)
class Columns:
    image: str
    is_struct: bool
    """Of `bytes` and perhaps `path`, as the `datasets` library stores images; else the bytes themselves."""
    has_paths: bool
    label: str
    has_text_labels: bool

    @property
    def image_leaf(self) -> str:
        """The images' bytes, as the file names its innermost columns."""
        return f"{self.image}.bytes" if self.is_struct else self.image

    @property
    def path_leaf(self) -> str | None:
        return f"{self.image}.path" if self.has_paths else None


def find_columns(schema: Any, image: str | None, label: str | None, where: str) -> Columns:
    """`image`, `label`: what the user calls them. UserError, with column and type, when there are none to be read."""
    image = _find(schema, image, IMAGE_COLUMNS, "--image-column", where)
    label = _find(schema, label, LABEL_COLUMNS, "--label-column", where)
    image_type, label_type = schema.field(image).type, schema.field(label).type
    children = _children(image_type)
    is_struct = bool(children)
    image_types = children.get("bytes", []) if is_struct else [image_type]
    if len(image_types) != 1 or not _is_binary(image_types[0]):
        raise UserError(
            f"{where}: the column {shown(image)} is of type {shown(image_type)}; expected the images' bytes (binary), "
            "or a struct with bytes; say with --image-column which column has them"
        )
    paths = children.get("path", [])
    if not _is_text(label_type) and not _is_integer(label_type):
        raise UserError(
            f"{where}: the column {shown(label)} is of type {shown(label_type)}; expected whole numbers or text; "
            "several labels for one image and regression are not supported; --label-column says which column has the "
            "labels"
        )
    return Columns(image, is_struct, len(paths) == 1 and _is_text(paths[0]), label, _is_text(label_type))


def names_of_classes(schema: Any, label: str, where: str) -> tuple[str, ...] | None:
    """From the schema's metadata, as the `datasets` library writes it; None when that says nothing of the column.

    UserError when what it says is no list of names. Names may occur twice, as `crane` does in ImageNet.
    """
    remedy = "name the classes with --labels FILE"
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return None
    try:
        described = json.loads(metadata)
    except (RecursionError, ValueError):
        raise UserError(f"{where}: the schema's metadata (key huggingface) is no JSON; {remedy}") from None
    for key in ("info", "features", label):
        described = described.get(key) if isinstance(described, dict) else None
    if not isinstance(described, dict) or "names" not in described:
        return None
    names = described["names"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{where}: the schema's metadata (key huggingface) has {shown(json.dumps(names), 60)} for the names of the "
            f"classes of {shown(label)}, expected a list of texts; {remedy}"
        )
    if len(names) > MAX_CLASSES:
        raise UserError(f"{where}: names {len(names):,} classes, expected at most {MAX_CLASSES:,}")
    return tuple(names)


def compare_columns(first: Columns, other: Columns, first_file: str, other_file: str) -> None:
    """UserError when a file stores images or labels otherwise than the first one does."""
    if first.has_text_labels != other.has_text_labels:
        kinds = ("texts", "numbers") if first.has_text_labels else ("numbers", "texts")
        raise UserError(
            f"{other_file}: the labels in {shown(other.label)} are {kinds[1]}, in {first_file} {kinds[0]}; name "
            "files of one kind with a glob"
        )
    if first.is_struct != other.is_struct:
        raise UserError(
            f"{other_file}: the images in {shown(other.image)} are of another type than in {first_file}; name files of "
            "one kind with a glob"
        )


def compare_names(
    first: tuple[str, ...] | None, other: tuple[str, ...] | None, first_file: str, other_file: str
) -> None:
    """UserError when two files of one data set call the same label by different names."""
    if first == other:
        return
    if first is None or other is None:
        with_names, without = (other_file, first_file) if first is None else (first_file, other_file)
        raise UserError(
            f"{without}: does not name its classes, and {with_names} does; name the classes with --labels FILE"
        )
    told = difference(first, other, first_file, other_file)
    raise UserError(f"{told}; convert the files one by one, or write them again with the same class names")


def _find(schema: Any, asked: str | None, usual: Sequence[str], option: str, where: str) -> str:
    found = [name for name in ((asked,) if asked is not None else usual) if name in schema.names]
    listed = shown(", ".join(schema.names))
    if not found:
        expected = f"none of them {shown(asked)}" if asked is not None else f"expected one named {' or '.join(usual)}"
        raise UserError(f"{where}: has the columns {listed}, {expected}; {option} says which it is")
    if len(found) > 1:
        raise UserError(f"{where}: has the columns {' and '.join(found)}; say with {option} which is meant")
    if schema.names.count(found[0]) > 1:
        raise UserError(
            f"{where}: has {schema.names.count(found[0])} columns named {shown(found[0])}; rename one of them"
        )
    return found[0]


def _children(kind: Any) -> dict[str, list[Any]]:
    """Types by name, of a struct's fields."""
    import pyarrow as pa

    children: dict[str, list[Any]] = {}
    if pa.types.is_struct(kind):
        for number in range(kind.num_fields):
            children.setdefault(kind.field(number).name, []).append(kind.field(number).type)
    return children


def _is_binary(kind: Any) -> bool:
    import pyarrow.types as of

    kind = kind.value_type if of.is_dictionary(kind) else kind
    return of.is_binary(kind) or of.is_large_binary(kind) or of.is_fixed_size_binary(kind) or of.is_binary_view(kind)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as of

    kind = kind.value_type if of.is_dictionary(kind) else kind
    return of.is_string(kind) or of.is_large_string(kind) or of.is_string_view(kind)


def _is_integer(kind: Any) -> bool:
    import pyarrow.types as of

    return of.is_integer(kind.value_type if of.is_dictionary(kind) else kind)
