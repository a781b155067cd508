"""A parquet file of images: its columns of images and labels, its class names, and the images of a row group."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from data_prep.beton.class_names import difference
from data_prep.errors import Fault, UserError
from data_prep.shown import one_line, shown
from data_prep.sources.files.local import LocalPath
from data_prep.sources.files.paths import MAX_SAMPLE_BYTES, StoragePath, check_sample_size
from data_prep.sources.files.tar import HEAD_BYTES, kind_by_head
from data_prep.sources.labels import MAX_CLASSES

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")

LARGE_GROUP_BYTES = 64 << 20
"""The Hub's row groups of images have 100 rows, some 11 MB."""
BATCH_ROWS = 32
"""More are slower: images of one batch are copied into one piece of memory."""
BATCH_BYTES = 64 << 20
"""Limit on the images of a batch, whatever the file claims; pyarrow takes some four times as much to assemble them."""
STREAM_BYTES = 1 << 20
PAGE_HEAD = re.compile(rb"\x15\x04\x15([\x80-\xff]{0,4}[\0-\x7f])")
PAGE_HEAD_BYTES = 16
ENCODINGS_IN_FULL = frozenset({"PLAIN", "RLE", "BIT_PACKED", "DELTA_LENGTH_BYTE_ARRAY"})
"""Each value is stored in full, so all of them together have no more bytes than the column's pages."""


@dataclass(frozen=True)
class Columns:
    image: str
    is_struct: bool
    """A struct of `bytes` and perhaps `path`, as the `datasets` library stores images; else the bytes themselves."""
    has_paths: bool
    label: str
    has_text_labels: bool

    @property
    def image_leaf(self) -> str:
        """Path of the column with the images' bytes among the file's leaf columns."""
        return f"{self.image}.bytes" if self.is_struct else self.image

    @property
    def path_leaf(self) -> str | None:
        return f"{self.image}.path" if self.has_paths else None


def find_columns(schema: Any, image: str | None, label: str | None, where: str) -> Columns:
    """`image`, `label`: names the user gave. UserError, with column and type, when none can be read."""
    image = _find(schema, image, IMAGE_COLUMNS, "--image-column", where)
    label = _find(schema, label, LABEL_COLUMNS, "--label-column", where)
    image_type, label_type = schema.field(image).type, schema.field(label).type
    children = _children(image_type)
    is_struct = bool(children)
    image_types = children.get("bytes", []) if is_struct else [image_type]
    if [_kind(each) for each in image_types] != ["bytes"]:
        raise UserError(
            f"{where}: the column {shown(image)} is of type {shown(image_type)}; expected the images' bytes (binary), "
            "or a struct with bytes; say with --image-column which column has them"
        )
    paths = children.get("path", [])
    if _kind(label_type) not in ("text", "number"):
        raise UserError(
            f"{where}: the column {shown(label)} is of type {shown(label_type)}; expected whole numbers or text; "
            "several labels for one image and regression are not supported; --label-column says which column has the "
            "labels"
        )
    has_paths = [_kind(each) for each in paths] == ["text"]
    return Columns(image, is_struct, has_paths, label, _kind(label_type) == "text")


def names_of_classes(schema: Any, label: str, where: str) -> tuple[str, ...] | None:
    """From the schema's metadata, as the `datasets` library writes it; None if it has nothing about the column.

    UserError when it has something other than a list of names. Names may occur twice, as `crane` does in ImageNet.
    """
    remedy = "name the classes with --labels FILE"
    metadata = (schema.metadata or {}).get(b"huggingface")
    if metadata is None:
        return None
    try:
        described = json.loads(metadata)
    except (RecursionError, ValueError):
        raise UserError(f"{where}: the schema's metadata (key huggingface) is not JSON; {remedy}") from None
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
    """UserError when a file stores images or labels in another way than the first one."""
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
    words = difference(first, other, first_file, other_file)
    raise UserError(f"{words}; convert the files one by one, or write them again with the same class names")


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


def _kind(column: Any) -> str | None:
    """What a column's type stores, in whatever layout: `bytes`, `text` or `number`; None: something else."""
    import pyarrow.types as of

    column = column.value_type if of.is_dictionary(column) else column
    layouts = {
        "bytes": (of.is_binary, of.is_large_binary, of.is_fixed_size_binary, of.is_binary_view),
        "text": (of.is_string, of.is_large_string, of.is_string_view),
        "number": (of.is_integer,),
    }
    return next((kind for kind, checks in layouts.items() if any(check(column) for check in checks)), None)


# --- reading images in little memory, whatever the size of a row group ------------------------------------------------


class RowGroup:
    """The images of one row group, forwards only, a few rows at a time: read at once it takes pyarrow three times its
    size. A large one (`is_large`) is also read from storage in pieces."""

    def __init__(self, path: StoragePath, number: int, columns: Columns, *, is_large: bool) -> None:
        self._stack = ExitStack()
        table = self._stack.enter_context(open_parquet(path, is_streamed=is_large))
        chunk = table.metadata.row_group(number).column(leaf_numbers(table.metadata)[columns.image_leaf])
        self._batches = table.iter_batches(
            batch_size=rows_at_once(chunk, in_dictionary=_dictionary_bytes(path, chunk)),
            row_groups=[number],
            columns=[columns.image_leaf],
            use_threads=False,
        )
        self._is_struct = columns.is_struct
        self.first = 0
        """TableRow of the first image in memory."""
        self._images: Any = ()

    def image_bytes(self, row: int) -> bytes | None:
        """`row` must not be before `first`. OSError or ValueError, with a reason, when it cannot be read."""
        import pyarrow as pa

        try:
            # Batches are read in order and only the last is kept, so memory is bounded by one batch.
            while row >= self.first + len(self._images):
                self.first += len(self._images)
                self._images = ()
                batch = next(self._batches, None)
                if batch is None:
                    raise ValueError("the row group ends before it")
                column = batch.column(0)
                self._images = column.field("bytes") if self._is_struct else column
            image = self._images[row - self.first]
            image = image.value if isinstance(image, pa.DictionaryScalar) else image
            if not image.is_valid:
                return None
            check_sample_size(image.as_buffer().size)
            return image.as_py()
        except MemoryError:
            raise ValueError("the row group takes more memory than there is") from None
        except OSError as error:
            raise OSError(shown(one_line(error))) from None
        except pa.ArrowException as error:
            raise ValueError(f"the row group cannot be read: {shown(one_line(error))}") from None

    def close(self) -> None:
        self._images = ()
        self._stack.close()


@contextmanager
def open_parquet(path: StoragePath, *, is_streamed: bool = False) -> Iterator[Any]:
    """`is_streamed`: read through a small buffer, not by whole columns."""
    import pyarrow.parquet as pq

    options: dict[str, Any] = {"pre_buffer": False, "buffer_size": STREAM_BYTES} if is_streamed else {}
    with ExitStack() as stack:
        with telling_damage(path):
            if isinstance(path, LocalPath):
                table = pq.ParquetFile(path.os_path, memory_map=not is_streamed, **options)
            else:
                table = pq.ParquetFile(stack.enter_context(path.open()), **{"pre_buffer": True, **options})
            stack.enter_context(table)
        yield table


@contextmanager
def telling_damage(path: StoragePath) -> Iterator[None]:
    """Turns whatever pyarrow raises on a damaged file into a UserError of one line."""
    try:
        yield
    except (Fault, UserError):
        raise
    except MemoryError:
        raise UserError(f"{path.shown}: takes more memory to open than there is; it is damaged or hostile") from None
    except Exception as error:  # pyarrow's have no common base, and some are Python's own
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        kind = _other_kind(path) or f"cannot be read as parquet: {shown(one_line(error))}; copy or download it again"
        raise UserError(f"{path.shown}: {kind}") from None


def leaf_numbers(metadata: Any) -> dict[str, int]:
    """Path of each leaf column of a file -> its number."""
    return {metadata.schema.column(number).path: number for number in range(metadata.num_columns)}


def rows_at_once(chunk: Any, most: int = BATCH_ROWS, in_dictionary: int | None = None) -> int:
    """How many rows of a column (`pyarrow.parquet.ColumnChunkMetaData`) have at most some BATCH_BYTES; at least one.

    A value may be stored once and used often (dictionaries), or share its beginning with the one before.
    `in_dictionary`: bytes of the dictionary, if known.
    """
    largest = chunk.total_uncompressed_size
    if set(chunk.encodings) <= ENCODINGS_IN_FULL:
        return most if largest <= MAX_SAMPLE_BYTES else 1
    if in_dictionary is not None and "DELTA_BYTE_ARRAY" not in chunk.encodings and largest <= BATCH_BYTES:
        largest = min(largest, in_dictionary)
    return max(1, min(most, BATCH_BYTES // max(1, largest)))


def _dictionary_bytes(path: StoragePath, chunk: Any) -> int | None:
    """The dictionary's size by the header of its page in a local file, which begins with two fields of Thrift's compact
    protocol: the kind of page and its uncompressed size. None: not known."""
    if not isinstance(path, LocalPath) or not chunk.has_dictionary_page:
        return None
    with path.open() as file:
        file.seek(chunk.dictionary_page_offset)
        head = file.read(PAGE_HEAD_BYTES)
    match = PAGE_HEAD.match(head)
    if match is None:
        return None
    digits = [byte & 0x7F for byte in match[1]]
    return sum(digit << 7 * number for number, digit in enumerate(digits)) >> 1


def _other_kind(path: StoragePath) -> str | None:
    try:
        with path.open() as file:
            head = file.read(HEAD_BYTES)
    except (OSError, ValueError):
        return None
    return None if head.startswith(b"PAR1") else kind_by_head(head)
