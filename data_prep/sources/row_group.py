"""The images of one row group of a parquet file, in little memory whatever its size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from data_prep.errors import Fault, UserError
from data_prep.shown import shown
from data_prep.sources.file_kinds import HEAD_BYTES, told_by_head
from data_prep.sources.local_place import LocalPlace
from data_prep.sources.parquet_schema import Columns
from data_prep.sources.places import MAX_SAMPLE_BYTES, Place, check_sample_size

LARGE_GROUP_BYTES = 64 << 20
"""The Hub's row groups of images have 100 rows, some 11 MB."""
BATCH_ROWS = 32
"""More are slower: images of one batch are copied into one piece of memory."""
BATCH_BYTES = 64 << 20
"""Of images in one batch, whatever the file says; pyarrow takes some four times as much to put them together."""
STREAM_BYTES = 1 << 20
PAGE_HEAD = re.compile(rb"\x15\x04\x15([\x80-\xff]{0,4}[\0-\x7f])")
PAGE_HEAD_BYTES = 16
ENCODINGS_IN_FULL = frozenset({"PLAIN", "RLE", "BIT_PACKED", "DELTA_LENGTH_BYTE_ARRAY"})
"""Each value is there in full: all of them together have no more bytes than the column's pages."""


class RowGroup:
    """The images of one row group, forwards only, a few rows at a time: pyarrow takes three times a row group's size
    to read it at once. A large one (`is_large`) is also read from storage piece by piece."""

    def __init__(self, place: Place, number: int, columns: Columns, *, is_large: bool) -> None:
        self._stack = ExitStack()
        table = self._stack.enter_context(open_parquet(place, is_streamed=is_large))
        chunk = table.metadata.row_group(number).column(leaf_numbers(table.metadata)[columns.image_leaf])
        self._batches = table.iter_batches(
            batch_size=rows_at_once(chunk, in_dictionary=_dictionary_bytes(place, chunk)),
            row_groups=[number],
            columns=[columns.image_leaf],
            use_threads=False,
        )
        self._is_struct = columns.is_struct
        self.first = 0
        """Row that the images in memory begin with."""
        self._images: Any = ()

    def image_bytes(self, row: int) -> bytes | None:
        """`row` must not lie before `first`. OSError or ValueError, with a reason, when it cannot be read."""
        import pyarrow as pa

        try:
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
            raise OSError(_one_line(error)) from None
        except pa.ArrowException as error:
            raise ValueError(f"the row group cannot be read: {_one_line(error)}") from None

    def close(self) -> None:
        self._images = ()
        self._stack.close()


@contextmanager
def open_parquet(place: Place, *, is_streamed: bool = False) -> Iterator[Any]:
    """`is_streamed`: read through a small buffer, not by whole columns."""
    import pyarrow.parquet as pq

    options: dict[str, Any] = {"pre_buffer": False, "buffer_size": STREAM_BYTES} if is_streamed else {}
    with ExitStack() as stack:
        with telling_damage(place):
            if isinstance(place, LocalPlace):
                table = pq.ParquetFile(place.path, memory_map=not is_streamed, **options)
            else:
                table = pq.ParquetFile(stack.enter_context(place.open()), **{"pre_buffer": True, **options})
            stack.enter_context(table)
        yield table


@contextmanager
def telling_damage(place: Place) -> Iterator[None]:
    """Whatever pyarrow raises on a file that is damaged, as a UserError of one line."""
    try:
        yield
    except (Fault, UserError):
        raise
    except MemoryError:
        raise UserError(
            f"{place.shown}: takes more memory to open than there is; it is damaged, or made to do that"
        ) from None
    except Exception as error:  # pyarrow's have no common base, and some are Python's own
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        told = _told(place)
        raise UserError(
            f"{place.shown}: {told or f'cannot be read as parquet: {_one_line(error)}; copy or download it again'}"
        ) from None


def leaf_numbers(metadata: Any) -> dict[str, int]:
    """Of a file's innermost columns, by their paths."""
    return {metadata.schema.column(number).path: number for number in range(metadata.num_columns)}


def rows_at_once(chunk: Any, most: int = BATCH_ROWS, in_dictionary: int | None = None) -> int:
    """How many rows of a column (`pyarrow.parquet.ColumnChunkMetaData`) have at most some BATCH_BYTES, or are one
    row, whatever it holds.

    A value may be there once and be meant often (dictionaries), or share its beginning with the one before.
    `in_dictionary`: bytes of the dictionary, where they are known.
    """
    largest = chunk.total_uncompressed_size
    if set(chunk.encodings) <= ENCODINGS_IN_FULL:
        return most if largest <= MAX_SAMPLE_BYTES else 1
    if in_dictionary is not None and "DELTA_BYTE_ARRAY" not in chunk.encodings and largest <= BATCH_BYTES:
        largest = min(largest, in_dictionary)
    return max(1, min(most, BATCH_BYTES // max(1, largest)))


def _dictionary_bytes(place: Place, chunk: Any) -> int | None:
    """Of a local file, as the dictionary's page says: it begins with two fields of Thrift's compact protocol, the kind
    of page and its size once unpacked. None: not known."""
    if not isinstance(place, LocalPlace) or not chunk.has_dictionary_page:
        return None
    with place.open() as file:
        file.seek(chunk.dictionary_page_offset)
        head = file.read(PAGE_HEAD_BYTES)
    match = PAGE_HEAD.match(head)
    if match is None:
        return None
    digits = [byte & 0x7F for byte in match[1]]
    return sum(digit << 7 * number for number, digit in enumerate(digits)) >> 1


def _told(place: Place) -> str | None:
    try:
        with place.open() as file:
            head = file.read(HEAD_BYTES)
    except (OSError, ValueError):
        return None
    return None if head.startswith(b"PAR1") else told_by_head(head)


def _one_line(error: BaseException) -> str:
    return shown(" ".join(str(error).split()) or type(error).__name__)
