"""The images of one row group of a parquet file, in little memory whatever its size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from data_prep.errors import UserError
from data_prep.sources.local_place import LocalPlace
from data_prep.sources.places import Place

LARGE_GROUP_BYTES = 64 << 20
"""The Hub's row groups of images have 100 rows, some 11 MB."""
LARGE_BATCH_ROWS = 32
STREAM_BYTES = 1 << 20


class RowGroup:
    """The images of one row group, forwards only. A large one is read a few rows at a time: pyarrow takes three times a
    row group's size to read it at once."""

    def __init__(self, place: Place, number: int, image_column: str, is_large: bool) -> None:
        self._stack = ExitStack()
        table = self._stack.enter_context(open_parquet(place, is_streamed=is_large))
        num_rows = LARGE_BATCH_ROWS if is_large else table.metadata.row_group(number).num_rows
        column = [f"{image_column}.bytes"]
        self._batches = table.iter_batches(batch_size=num_rows, row_groups=[number], columns=column, use_threads=False)
        self.first = 0
        """Row that the images in memory begin with."""
        self._images: Any = ()

    def image_bytes(self, row: int) -> bytes | None:
        """`row` must not lie before `first`."""
        while row >= self.first + len(self._images):
            self.first += len(self._images)
            self._images = ()
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError("the row group ends before it")
            self._images = batch.column(0).field("bytes")
        return self._images[row - self.first].as_py()

    def close(self) -> None:
        self._images = ()
        self._stack.close()


@contextmanager
def open_parquet(place: Place, *, is_streamed: bool = False) -> Iterator[Any]:
    """`is_streamed`: read through a small buffer, not by whole columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    options = {"pre_buffer": False, "buffer_size": STREAM_BYTES} if is_streamed else {}
    if isinstance(place, LocalPlace):
        try:
            table = pq.ParquetFile(place.path, memory_map=not is_streamed, **options)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{place.shown}: cannot be read as parquet: {error}") from None
        with table:
            yield table
        return
    with place.open() as file:
        try:
            table = pq.ParquetFile(file, **{"pre_buffer": True, **options})
        except pa.ArrowInvalid as error:
            raise UserError(f"{place.shown}: cannot be read as parquet: {error}") from None
        with table:
            yield table


def column_bytes(row_group: Any, path: str) -> int:
    columns = (row_group.column(number) for number in range(row_group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema == path)
