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
from data_prep.shown import shown

BLOCK_BYTES = 512
WINDOW_BYTES = 4096
"""Read at a time: a header, and often the small files and headers behind it."""
MAX_EXTENSION_BYTES = 1 << 20
"""Of a long name or a pax header."""
MAX_NAME_BYTES = 4096
"""As long as a path may be on Linux."""
MAX_TAIL_BYTES = 64 << 20
"""Of zeros behind the end mark: writers fill up a record, of 10 KiB or, on tapes, some MiB."""
TAIL_PIECE_BYTES = 64 << 10
MAX_SIZE_DIGITS = 20
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


class _Damaged(ValueError):
    """What is wrong with a header, to follow the place where it is."""


def walk_tar(read_at: ReadAt, start: int, stop: int | None, where: str) -> Iterator[Member]:
    """The files of the archive in the bytes start..stop-1, in its order; `stop` None: of a stream whose length is not
    known, where `read_at` gives fewer bytes at the end, and members' ends are for the caller to check.

    UserError, naming `where` and the member, when the archive is damaged, cut short, holds something refused, or when
    anything but zeros follows it.
    """
    window = _Window(read_at, stop)
    at = start
    long_name: bytes | None = None
    long_size: int | None = None
    before: bytes | None = None
    while True:
        header = b"" if stop is not None and at + BLOCK_BYTES > stop else window.read(at, BLOCK_BYTES)
        if len(header) < BLOCK_BYTES:
            if at == start and (told := told_by_head(header or window.read(at, (stop or BLOCK_BYTES) - at))):
                raise UserError(f"{where}: {told}")
            raise UserError(
                f"{where}: is cut short: it has no end mark behind {_told(before)}; copy or download it again"
            )
        if header.count(0) == BLOCK_BYTES:
            _check_tail(window, start, at, stop, f"{where}: ", _told(before))
            if long_name is not None or long_size is not None:
                raise UserError(
                    f"{where}: ends where a member should follow {_told(before)}; copy or download it again"
                )
            return
        try:
            _check_sum(header)
            kind = header[156:157]
            name = long_name or _name(header)
            size = 0 if kind == FOLDER else _number(header[124:136])
        except _Damaged as error:
            told = told_by_head(header) if at == start else None
            raise UserError(
                f"{where}: {told}"
                if told
                else f"{where}: the header behind {_told(before)} is damaged: {error}; is it a tar? copy or download "
                "it again"
            ) from None
        if long_size is not None and kind in REGULAR:
            size = long_size
        data_at = at + BLOCK_BYTES
        at = data_at + -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if stop is not None and data_at + size > stop:
            raise UserError(
                f"{where}: is cut short: {_told(name)} ends {data_at + size - stop:,} bytes behind the end; "
                "copy or download it again"
            )
        if kind in (GNU_LONG_NAME, PAX, PAX_GLOBAL):
            if size > MAX_EXTENSION_BYTES:
                raise UserError(
                    f"{where}: {_told(name)} has a header of {size:,} bytes; the archive is damaged or hostile"
                )
            extension = window.read(data_at, size)
            try:
                if kind == GNU_LONG_NAME:
                    long_name = extension.split(b"\0", 1)[0]
                elif kind == PAX:
                    long_name, long_size = _read_pax(extension, long_name, long_size)
                elif _read_pax(extension, None, None) != (None, None):
                    raise _Damaged("gives all members one name or size")
            except _Damaged as error:
                raise UserError(
                    f"{where}: the extended header behind {_told(before)} {error}; copy or download the archive again"
                ) from None
            continue
        before = name
        if kind in REGULAR and not (name.endswith(b"/") and not size):
            yield Member(_safe(name, where), data_at, size)
        elif kind in REFUSED:
            raise UserError(f"{where}: {_told(name)} is {REFUSED[kind]}; expected plain files, pack what it stands for")
        elif kind not in (*REGULAR, FOLDER, GNU_LONG_LINK, GNU_LABEL):
            raise UserError(f"{where}: {_told(name)} is of the unknown kind {kind!r}; expected plain files")
        if kind != GNU_LONG_LINK:
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


def _check_tail(window: _Window, start: int, at: int, stop: int | None, where: str, before: str) -> None:
    """UserError unless there are only zeros from `at`, where the end mark is, to the end."""
    first = at
    while stop is None or at < stop:
        if at - first > MAX_TAIL_BYTES:
            raise UserError(f"{where}more than {MAX_TAIL_BYTES:,} bytes lie behind its end mark, after {before}")
        piece = window.read(at, TAIL_PIECE_BYTES if stop is None else min(TAIL_PIECE_BYTES, stop - at))
        if not piece:
            return
        if piece.count(0) != len(piece):
            data_at = at + len(piece) - len(piece.lstrip(b"\0")) - start
            raise UserError(
                f"{where}data lies behind its end mark, from byte {data_at} on, after {before}; was another archive "
                f"appended? take them apart with `head -c {data_at}` and `tail -c +{data_at + 1}`"
            )
        at += len(piece)


def _check_sum(header: bytes) -> None:
    """The header's sum is that of its bytes, its own eight taken as blanks.

    Adler-32's low half is 1 + the sum of bytes modulo 65,521: the sum at C speed.
    """
    field = header[148:156]
    stored = _number(field)
    if (stored + sum(field) - 8 * ord(" ") + 1 - (zlib.adler32(header) & 0xFFFF)) % ADLER_MODULUS:
        raise _Damaged("its check sum is wrong")


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base 256 for large ones."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    if not digits.isdigit() or max(digits) > ord("7"):
        raise _Damaged(f"{digits!r} is no number")
    return int(digits, 8)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return name


def _read_pax(records: bytes, name: bytes | None, size: int | None) -> tuple[bytes | None, int | None]:
    """The path and size of the next member, where the records (`<length> <key>=<value>\\n`) say them."""
    at = 0
    records = records.rstrip(b"\0")  # some writers fill up with zeros
    while at < len(records):
        digits, _, _ = records[at : at + 16].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = records[at + len(digits) + 1 : at + length - 1].partition(b"=")
        if length <= len(digits) or not equals or records[at + length - 1 : at + length] != b"\n":
            raise _Damaged("is damaged")
        if key == b"path":
            name = value
        elif key == b"size":
            if not value.isdigit() or len(value) > MAX_SIZE_DIGITS:
                raise _Damaged(f"says {value[:40]!r} for a size")
            size = int(value)
        elif key.startswith((b"GNU.sparse", b"SCHILY.realsize")):
            raise _Damaged("belongs to a sparse file; expected plain files")
        at += length
    return name, size


def _safe(raw: bytes, where: str) -> str:
    """UserError on a name that leads out of the archive's folder, or is none."""
    name = os.fsdecode(raw)
    while name.startswith("./"):
        name = name[2:]
    if name.startswith("/") or ".." in name.split("/"):
        raise UserError(f"{where}: {shown(name)} is a name that leads out of the archive; it is damaged or hostile")
    if not name or name.endswith("/") or "\0" in name or len(raw) > MAX_NAME_BYTES:
        raise UserError(
            f"{where}: holds a file named {shown(name) or 'nothing'} ({len(raw):,} bytes); expected a name of at most "
            f"{MAX_NAME_BYTES:,} bytes; the archive is damaged or hostile"
        )
    return name


def _told(name: bytes | None) -> str:
    return "its start" if name is None else shown(os.fsdecode(name))


# What a file is that is not what its name says: told from its first bytes, for messages.


HEAD_BYTES = 512
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".zst", ".lz4", ".zip", ".rar", ".7z")


def told_by_head(head: bytes) -> str | None:
    """What the file is and what to do, to follow its name; None when nothing is known of it."""
    for magic, (name, command) in _COMPRESSED.items():
        if head.startswith(magic):
            return f"is compressed with {name}, and pieces of it cannot be read in place; unpack it first ({command})"
    if head.startswith(b"PK\x03\x04"):
        return "is a zip file; unpack it first (unzip)"
    if head.startswith(b"PAR1"):
        return "is a parquet file; --source hf-parquet reads those"
    if head[257:262] == b"ustar":
        return "is a tar; --source webdataset reads those"
    if head.startswith(b"version https://git-lfs"):
        return "is Git LFS's note of where the file lies, not the file; fetch it first (git lfs pull)"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "is a web page; is a login needed, or the address wrong? download it again"
    if text.startswith((b"{", b"[")):
        return "is JSON text, such as a server's refusal; download it again"
    if head and not head.strip(b"\0"):
        return "holds nothing but zeros; its download was not finished, copy or download it again"
    return None
