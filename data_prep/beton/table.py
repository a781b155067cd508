"""Tables with a row per sample, as parquet or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from data_prep.beton.files import cannot_be_written, written_atomically
from data_prep.errors import UserError

Columns = Mapping[str, Sequence[Any]]
"""Some rows, by column; the columns are equally long lists of one type."""
ENDS = (".parquet", ".csv")


def require_table_name(option: str, path: Path) -> None:
    if path.suffix not in ENDS:
        raise UserError(f"{option} {path}: expected a name that ends in {' or '.join(ENDS)}")


def write_table(path: Path, parts: Iterable[Columns]) -> None:
    """The rows of all `parts`, in order; holds one part in memory. The file gets its name when it is complete.

    Raises Fault when it cannot be written.
    """
    with cannot_be_written(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as file:
            if path.suffix == ".parquet":
                _write_parquet(file, parts)
            else:
                text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
                write_csv(text, parts)
                text.detach()


def write_csv(stream: TextIO, parts: Iterable[Columns]) -> None:
    rows = csv.writer(stream, lineterminator="\n")
    for number, part in enumerate(parts):
        if number == 0:
            rows.writerow(part)
        rows.writerows(zip(*part.values(), strict=True))


def _write_parquet(file: Any, parts: Iterable[Columns]) -> None:
    import pyarrow
    from pyarrow import parquet

    writer = None
    for part in parts:
        table = pyarrow.table(dict(part))
        if writer is None:
            writer = parquet.ParquetWriter(file, table.schema, compression="zstd")
        writer.write_table(table)
    if writer is not None:
        writer.close()
