"""Where the files lie within a tar: its headers are read, nothing is unpacked.

Read here and not by `tarfile`, whose objects cost some 30 us and 2 kB a member: ImageNet has 1.28 million. What an
image data set never holds (links, devices, names that lead out of the folder) is refused with the member's name.
Formats: POSIX ustar and pax, GNU long names and large sizes.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data_prep.errors import UserError

BLOCK_BYTES = 512
WINDOW_BYTES = 4096
"""Read at a time: a header, and often the small files and headers behind it."""
MAX_EXTENSION_BYTES = 1 << 20
"""Of a long name or a pax header."""
MAX_TAIL_BYTES = 1 << 20
"""Behind the end mark; writers pad to 10 KiB. More means that another archive was appended."""
ADLER_MODULUS = 65521

REGULAR, FOLDER = (b"0", b"\0", b"7"), b"5"
GNU_LONG_NAME, GNU_LONG_LINK, GNU_LABEL, PAX, PAX_GLOBAL = b"L", b"K", b"V", b"x", b"g"
REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}

ReadAt = Callable[[int, int], bytes]


class Member(NamedTuple):
    name: str
    offset: int
    """Of its bytes, from the start of the file."""
    num_bytes: int


def walk_tar(read_at: ReadAt, start: int, stop: int | None, where: str) -> Iterator[Member]:
    """The files of the archive in the bytes start..stop-1, in its order; `stop` None: of a stream whose length is not
    known, where `read_at` gives fewer bytes at the end, and members' ends are for the caller to check.

    UserError, naming `where` and the member, when the archive is damaged, cut short or holds something refused.
    """
    window = _Window(read_at, stop)
    at = start
    long_name: str | None = None
    long_size: int | None = None
    before = "its start"
    while True:
        header = b"" if stop is not None and at + BLOCK_BYTES > stop else window.read(at, BLOCK_BYTES)
        if len(header) < BLOCK_BYTES:
            raise UserError(f"{where}: is cut short: it has no end mark behind {before}; copy or download it again")
        if header.count(0) == BLOCK_BYTES:
            if stop is not None and stop - at > MAX_TAIL_BYTES:
                raise UserError(
                    f"{where}: {stop - at:,} bytes lie behind its end mark, after {before}; was another "
                    "archive appended? name archives one by one"
                )
            return
        _check_sum(header, f"{where}: the header behind {before}")
        kind = header[156:157]
        name = long_name or _name(header)
        size = _number(header[124:136], f"{where}: {name}")
        if long_size is not None and kind in REGULAR:
            size = long_size
        data_at = at + BLOCK_BYTES
        at = data_at + -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if stop is not None and data_at + size > stop:
            raise UserError(
                f"{where}: is cut short: {name} ends {data_at + size - stop:,} bytes behind the end; "
                "copy or download it again"
            )
        if kind in (GNU_LONG_NAME, PAX):
            if size > MAX_EXTENSION_BYTES:
                raise UserError(f"{where}: {name} has a header of {size:,} bytes; the archive is damaged or hostile")
            extension = window.read(data_at, size)
            if kind == GNU_LONG_NAME:
                long_name = os.fsdecode(extension.rstrip(b"\0"))
            else:
                long_name, long_size = _read_pax(extension, long_name, f"{where}: {name}")
            continue
        before = name
        if kind in REGULAR and not name.endswith("/"):
            yield Member(_safe(name, where), data_at, size)
        elif kind in REFUSED:
            raise UserError(f"{where}: {name} is {REFUSED[kind]}; expected plain files, pack what it stands for")
        elif kind not in (*REGULAR, FOLDER, GNU_LONG_LINK, GNU_LABEL, PAX_GLOBAL):
            raise UserError(f"{where}: {name} is of the unknown kind {kind!r}; expected plain files")
        if kind not in (GNU_LONG_LINK, PAX_GLOBAL):
            long_name = long_size = None


class _Window:
    """Small reads close to one another by one larger one."""

    def __init__(self, read_at: ReadAt, stop: int | None) -> None:
        self._read_at = read_at
        self._stop = stop
        self._start = 0
        self._data = b""

    def read(self, start: int, length: int) -> bytes:
        at = start - self._start
        if at < 0 or at + length > len(self._data):
            wanted = max(length, WINDOW_BYTES)
            self._data = self._read_at(start, wanted if self._stop is None else min(wanted, self._stop - start))
            self._start, at = start, 0
        return self._data[at : at + length]


def _check_sum(header: bytes, what: str) -> None:
    """The header's sum is that of its bytes, its own eight taken as blanks.

    Adler-32's low half is 1 + the sum of bytes modulo 65,521: the sum at C speed.
    """
    field = header[148:156]
    stored = _number(field, what)
    if (stored + sum(field) - 8 * ord(" ") + 1 - (zlib.adler32(header) & 0xFFFF)) % ADLER_MODULUS:
        raise UserError(f"{what} is damaged: its check sum is wrong; is it a tar? copy or download it again")


def _number(field: bytes, what: str) -> int:
    """Octal digits, or GNU's base 256 for large ones."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    if not digits.isdigit() or max(digits) > ord("7"):
        raise UserError(f"{what} is damaged: {digits!r} is no number; is it a tar? copy or download it again")
    return int(digits, 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return os.fsdecode(name)


def _read_pax(records: bytes, name: str | None, what: str) -> tuple[str | None, int | None]:
    """The path and size of the next member, where the records (`<length> <key>=<value>\\n`) say them."""
    size: int | None = None
    at = 0
    while at < len(records):
        digits, _, _ = records[at : at + 16].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = records[at + len(digits) + 1 : at + length - 1].partition(b"=")
        if length <= len(digits) or not equals:
            raise UserError(f"{what} has a pax header that is damaged; copy or download the archive again")
        if key == b"path":
            name = os.fsdecode(value)
        elif key == b"size" and value.isdigit():
            size = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise UserError(f"{what} belongs to a sparse file; expected plain files")
        at += length
    return name, size


def _safe(name: str, where: str) -> str:
    """UserError on a name that leads out of the archive's folder."""
    while name.startswith("./"):
        name = name[2:]
    if name.startswith("/") or ".." in name.split("/"):
        raise UserError(f"{where}: {name} is a name that leads out of the archive; it is damaged or hostile")
    return name
