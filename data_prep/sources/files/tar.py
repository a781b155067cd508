"""The positions of files within a tar: its headers are read, nothing is unpacked to disk.

Not by `tarfile`, whose objects cost some 30 us and 2 kB per member: ImageNet has 1.28 million. What an image data set
never contains (links, devices, names that lead out of the folder) is refused, naming the member. Formats: POSIX ustar
and pax, GNU long names and large sizes.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, BinaryIO, NamedTuple

from data_prep.errors import UserError
from data_prep.shown import shown

BLOCK_BYTES = 512
WINDOW_BYTES = 4096
"""Read at once: a header, and often the small files and headers after it."""
MAX_EXTENSION_BYTES = 1 << 20
"""Largest long name or pax header."""
MAX_NAME_BYTES = 4096
"""The longest path on Linux."""
MAX_TAIL_BYTES = 64 << 20
"""Zeros allowed after the end mark: writers pad to a record, of 10 KiB or, on tapes, some MiB."""
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

HEAD_BYTES = 512
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".zst", ".lz4", ".zip", ".rar", ".7z")

ReadAt = Callable[[int, int], bytes]


class TarEntry(NamedTuple):
    name: str
    offset: int
    """Where its bytes begin, from the start of the file."""
    num_bytes: int


class _Damaged(ValueError):
    """What is wrong with a header; the message continues its position."""


def walk_tar(read_at: ReadAt, start: int, stop: int | None, where: str) -> Iterator[TarEntry]:
    """The files of the archive in the bytes start..stop-1, in its order.

    Args:
        stop: None for a stream of unknown length, where `read_at` returns fewer bytes at the end; then the caller has
            to check that members are complete.

    Raises:
        UserError, naming `where` and the member: the archive is damaged, cut short, contains something refused, or is
            followed by anything but zeros.
    """
    window = _Window(read_at, stop)
    at = start
    long_name: bytes | None = None
    long_size: int | None = None
    before: bytes | None = None
    while True:
        # Blocks of 512 bytes: for each member a header and its padded bytes, at the end two blocks of zeros.
        header = b"" if stop is not None and at + BLOCK_BYTES > stop else window.read(at, BLOCK_BYTES)
        if len(header) < BLOCK_BYTES:
            if at == start:
                _refuse_other_kind(header or window.read(at, (stop or BLOCK_BYTES) - at), where)
            raise UserError(
                f"{where}: is cut short: it has no end mark after {_shown(before)}; copy or download it again"
            )
        if header.count(0) == BLOCK_BYTES:
            _check_tail(window, start, at, stop, where, _shown(before))
            if long_name is not None or long_size is not None:
                raise UserError(
                    f"{where}: ends where a member should follow {_shown(before)}; copy or download it again"
                )
            return
        try:
            _check_sum(header)
            kind = header[156:157]
            name = long_name or _name(header)
            size = 0 if kind == FOLDER else _number(header[124:136])
        except _Damaged as error:
            if at == start:
                _refuse_other_kind(header, where)
            raise UserError(
                f"{where}: the header after {_shown(before)} is damaged: {error}; is it a tar? download it again"
            ) from None
        if long_size is not None and kind in REGULAR:  # a pax header before it gave the size
            size = long_size
        data_at = at + BLOCK_BYTES
        at = data_at + -(-size // BLOCK_BYTES) * BLOCK_BYTES
        if stop is not None and data_at + size > stop:
            raise UserError(
                f"{where}: is cut short: {_shown(name)} ends {data_at + size - stop:,} bytes after the end; "
                "copy or download it again"
            )
        # Extensions are members of their own, before the member that they are about.
        if kind in (GNU_LONG_NAME, PAX, PAX_GLOBAL):
            if size > MAX_EXTENSION_BYTES:
                raise UserError(
                    f"{where}: {_shown(name)} has a header of {size:,} bytes; the archive is damaged or hostile"
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
                    f"{where}: the extended header after {_shown(before)} {error}; copy or download the archive again"
                ) from None
            continue
        before = name
        if kind in REGULAR and not (name.endswith(b"/") and not size):  # old tars mark folders by the slash only
            yield TarEntry(_safe(name, where), data_at, size)
        elif kind in REFUSED:
            raise UserError(
                f"{where}: {_shown(name)} is {REFUSED[kind]}; expected plain files; pack the file that it refers to"
            )
        elif kind not in (*REGULAR, FOLDER, GNU_LONG_LINK, GNU_LABEL):
            raise UserError(f"{where}: {_shown(name)} is of the unknown kind {kind!r}; expected plain files")
        if kind != GNU_LONG_LINK:
            long_name = long_size = None


class _Window:
    """Serves small reads that are close to one another from one larger one."""

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


def read_members(
    file: BinaryIO, wanted: Collection[str], where: str, expected: str, *, max_bytes: int, max_unpacked_bytes: int
) -> dict[str, bytes]:
    """The wanted files of a small tar, gzipped or not, whatever folder they are in; those that it has.

    UserError when a file occurs twice, they are too large, or the archive is damaged; `expected` says what it should
    be. EOFError, OSError and zlib.error when it cannot be unpacked.
    """
    unpacked = _Unpacked(file, max_unpacked_bytes, where, expected)
    found: dict[str, bytes] = {}
    num_bytes = 0
    for member in walk_tar(unpacked.read_at, 0, None, where):
        name = next((name for name in wanted if f"/{member.name}".endswith(f"/{name}")), None)
        if name is None:
            continue
        if name in found:
            raise UserError(f"{where}: holds {name} twice; expected {expected}")
        num_bytes += member.num_bytes
        if num_bytes > max_bytes:
            raise UserError(
                f"{where}: with {name} its files have {num_bytes:,} bytes, more than {max_bytes:,}; expected {expected}"
            )
        found[name] = unpacked.read_at(member.offset, member.num_bytes)
        if len(found[name]) != member.num_bytes:
            raise UserError(f"{where}: is cut short within {name}; download it again")
    return found


class _Unpacked:
    """A gzip stream (or a plain file) read front to back, up to a limit."""

    def __init__(self, file: BinaryIO, max_bytes: int, where: str, expected: str) -> None:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        self._stream: Any = gzip.GzipFile(fileobj=file) if is_gzip else file
        self._max_bytes = max_bytes
        self._refusal = f"{where}: unpacks to more than {max_bytes:,} bytes; expected {expected}"
        self._start = 0
        self._data = b""
        """The piece read last: the next one may begin within it, never before it."""

    def read_at(self, start: int, length: int) -> bytes:
        """Fewer bytes at the end of the stream."""
        if start + length > self._max_bytes:
            raise UserError(self._refusal)
        skip = start - self._start - len(self._data)
        while skip > 0:
            skipped = len(self._stream.read(min(skip, 1 << 20)))
            if not skipped:
                return b""
            skip -= skipped
        kept = self._data[start - self._start :] if start < self._start + len(self._data) else b""
        self._start, self._data = start, kept + self._stream.read(max(0, length - len(kept)))
        return self._data[:length]


def _check_tail(window: _Window, start: int, at: int, stop: int | None, where: str, before: str) -> None:
    """UserError unless there are only zeros from `at`, where the end mark is, to the end."""
    first = at
    while stop is None or at < stop:
        if at - first > MAX_TAIL_BYTES:
            raise UserError(
                f"{where}: has more than {MAX_TAIL_BYTES:,} bytes after its end mark, which follows {before}"
            )
        piece = window.read(at, TAIL_PIECE_BYTES if stop is None else min(TAIL_PIECE_BYTES, stop - at))
        if not piece:
            return
        if piece.count(0) != len(piece):
            data_at = at + len(piece) - len(piece.lstrip(b"\0")) - start
            raise UserError(
                f"{where}: has data after its end mark, from byte {data_at} on, after {before}; was another archive "
                f"appended? separate them with `head -c {data_at}` and `tail -c +{data_at + 1}`"
            )
        at += len(piece)


def _check_sum(header: bytes) -> None:
    """The checksum is the sum of the header's bytes, its own eight counted as blanks.

    Adler-32's low half is 1 + the sum of bytes modulo 65,521: the sum at C speed.
    """
    field = header[148:156]
    stored = _number(field)
    if (stored + sum(field) - 8 * ord(" ") + 1 - (zlib.adler32(header) & 0xFFFF)) % ADLER_MODULUS:
        raise _Damaged("its checksum is wrong")


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base 256 for large ones."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    if not digits.isdigit() or max(digits) > ord("7"):
        raise _Damaged(f"{digits!r} is not a number")
    return int(digits, 8)


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return name


def _read_pax(records: bytes, name: bytes | None, size: int | None) -> tuple[bytes | None, int | None]:
    """The path and size of the next member, if the records (`<length> <key>=<value>\\n`) have them."""
    at = 0
    records = records.rstrip(b"\0")  # some writers pad with zeros
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
                raise _Damaged(f"gives the size {value[:40]!r}")
            size = int(value)
        elif key.startswith((b"GNU.sparse", b"SCHILY.realsize")):
            raise _Damaged("belongs to a sparse file; expected plain files")
        at += length
    return name, size


def _safe(raw: bytes, where: str) -> str:
    """UserError on a name that leads out of the archive's folder, or is empty or too long."""
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


def _shown(name: bytes | None) -> str:
    return "its start" if name is None else shown(os.fsdecode(name))


# --- files that are of another kind than their name says --------------------------------------------------------------


def _refuse_other_kind(head: bytes, where: str) -> None:
    kind = kind_by_head(head)
    if kind is not None:
        raise UserError(f"{where}: {kind}")


def kind_by_head(head: bytes) -> str | None:
    """What the file is by its first bytes, and what to do; continues its name. None: not recognised."""
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
        return "is a Git LFS pointer, not the file; fetch it first (git lfs pull)"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        return "is a web page; is a login needed, or the address wrong? download it again"
    if text.startswith((b"{", b"[")):
        return "is JSON text, such as a server's refusal; download it again"
    if head and not head.strip(b"\0"):
        return "holds nothing but zeros; its download was not finished, copy or download it again"
    return None
