"""Text files and tables written by hand or by a spreadsheet: read within limits, or refused by line."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from data_prep.errors import UserError
from data_prep.shown import shown
from data_prep.sources.files.paths import StoragePath, read_small

MAX_TEXT_BYTES = 256 << 20
"""A line for each of ImageNet's images takes 60 MB."""
MAX_LINES = 20_000_000
MAX_LINE_CHARACTERS = 128 << 10
MAX_LINES_OF_ROW = 20
"""A quoted name may contain line ends; a quote that is never closed contains the rest of the file."""
LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
SEPARATORS = "\t,;"
NUM_HEAD_LINES = 200
"""Lines by which a table's separator is recognised."""


class TableRow(NamedTuple):
    line: int
    cells: list[str]


def read_text(path: StoragePath) -> str:
    """UTF-8, or UTF-16 with a byte order mark. UserError when it does not exist, is not a file, too large, or not
    text."""
    try:
        data = read_small(path, MAX_TEXT_BYTES, "a text file")
    except OSError as error:
        raise UserError(f"{path.shown}: cannot be read: {error.strerror or error}") from None
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path.shown}: line {line} cannot be read as text ({error.reason}); save the file as UTF-8"
        ) from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path.shown}: line {line} holds a NUL character, so it is not text; save the file as UTF-8")
    if max(text.count("\n"), text.count("\r")) > MAX_LINES:
        raise UserError(f"{path.shown}: has more than {MAX_LINES:,} lines; expected fewer")
    return text


def read_lines(path: StoragePath) -> list[TableRow]:
    """One cell per line, without surrounding white space; empty lines are skipped."""
    lines = enumerate(_lines(read_text(path), path.shown), start=1)
    return [TableRow(number, [line.strip()]) for number, line in lines if line.strip()]


def read_table(path: StoragePath) -> Iterator[TableRow]:
    """Rows of cells separated by tabs, commas or semicolons, with or without quotes, or of a word and the rest of its
    line.

    Empty lines are skipped, and so are empty cells at a row's end that the first row does not have. UserError, naming
    the line, where quotes do not match or a row has more cells than the first.
    """
    text = read_text(path)
    if text.lstrip()[:1] in ("[", "{"):
        raise UserError(f"{path.shown}: looks like JSON; expected a table, with commas or tabs between columns")
    separator = _separator(text, path.shown)
    rows = _split_at(text, separator, path.shown) if separator else _split_at_blanks(text, path.shown)
    width = 0
    for line, cells in rows:
        if not any(cells):
            continue
        while width and len(cells) > width and not cells[-1]:
            cells.pop()
        width = width or len(cells)
        if len(cells) > width:
            raise UserError(
                f"{path.shown}: line {line} has {len(cells)} columns, the first line {width}; put a name that holds "
                f"{'a tab' if separator == chr(9) else shown(separator)} in quotes"
            )
        yield TableRow(line, cells)


def _lines(text: str, where: str) -> Iterator[str]:
    """With their line ends, as csv wants them; not StringIO, which takes four bytes per character."""
    for number, match in enumerate(LINE.finditer(text), start=1):
        if len(match[0]) > MAX_LINE_CHARACTERS:
            raise UserError(f"{where}: line {number} has {len(match[0]):,} characters; expected a file and its class")
        yield match[0]


def _separator(text: str, where: str) -> str | None:
    """The separator that cuts the first lines into the same number of cells, more than one; None: white space."""
    head = [line for line in islice(_lines(text, where), NUM_HEAD_LINES) if line.strip()]
    candidates = [separator for separator in SEPARATORS if head and separator in head[0]]
    for separator in candidates:
        if len(set(_widths(head, separator))) == 1:
            return separator
    return candidates[0] if candidates else None


def _widths(lines: Sequence[str], separator: str) -> Iterator[int]:
    try:
        for row in csv.reader(lines, delimiter=separator, skipinitialspace=True):
            yield len(row)
    except csv.Error:
        yield 0


def _split_at(text: str, separator: str, where: str) -> Iterator[TableRow]:
    num_waiting = 0

    def lines() -> Iterator[str]:
        nonlocal num_waiting
        for line in _lines(text, where):
            num_waiting += 1
            if num_waiting > MAX_LINES_OF_ROW:
                raise csv.Error(f"it has more than {MAX_LINES_OF_ROW} lines")
            yield line

    reader = csv.reader(lines(), delimiter=separator, skipinitialspace=True, strict=True)
    while True:
        line, num_waiting = reader.line_num + 1, 0
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{where}: line {line} cannot be read ({error}); is a quote not closed? One within a name is doubled"
            ) from None
        yield TableRow(line, [cell.strip() for cell in cells])


def _split_at_blanks(text: str, where: str) -> Iterator[TableRow]:
    for number, line in enumerate(_lines(text, where), start=1):
        yield TableRow(number, [cell.strip() for cell in line.split(None, 1)])
