"""Paths behind a URL, through fsspec: `s3://`, `gs://`, `hf://`, `http://`, `memory://`, ... whatever is installed.

Every failure becomes an OSError without credentials in its message; transient ones are retried. HTTP is bounded: a
server that sends more than was asked for, something else, or nothing for a while, ends a request with one line.
"""

from __future__ import annotations

import io
import itertools
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal

import aiohttp
import xxhash

from data_prep.errors import UserError
from data_prep.sources.files.paths import (
    MAX_SAMPLE_BYTES,
    FileStatus,
    FolderListing,
    ListedFile,
    RangeReader,
    StoragePath,
    changed,
    check_sample_size,
    without_credentials,
)

DENIED, MISSING = (401, 403), (404, 410)
"""HTTP statuses."""
ATTEMPTS = 3
FIRST_PAUSE_S = 0.5
PROBE_BYTES = 4096
SMALL_BYTES = 8 << 20
"""Over HTTP a file up to this size, or of unknown size, is fetched in one request."""
BUFFER_BYTES = 1 << 20
FILE_SUFFIXES = (".tar", ".parquet", ".gz", ".tgz", ".zip", ".csv", ".tsv", ".txt", ".json")
"""A name that ends so is not taken for a folder, even if the server sends HTML for it."""
READ_AHEAD_BYTES = 8 << 20
"""Size of a request when a large file is read in order: 8 MiB take as long as the latency of an object store."""
MAX_GAP_BYTES = 64 << 10
"""Between two reads that count as in order: a tar has headers, padding and label files there."""
TAGS = (
    "etag", "ETag", "md5Hash", "md5", "mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created",
)  # fmt: skip
"""Entries of fsspec's `info` that change with the file; which ones exist depends on the storage."""


MAX_PAGE_BYTES = 64 << 20
"""Largest page of links, the form in which a server lists a folder."""
MAX_REFUSAL_BYTES = 64 << 10
"""How much of an error response is read."""
PIECE_BYTES = 256 << 10
TIMEOUT = aiohttp.ClientTimeout(total=300, sock_connect=30, sock_read=60)
RANGE = re.compile(r"bytes=(\d+)-(\d+)")
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class NotAsAsked(OSError):
    """A server sends something other than what it was asked for; retrying does not help."""


def remote_path(url: str) -> RemotePath:
    path = RemotePath(url, _file_system(url)[1])
    path.file_system.invalidate_cache()
    return path


def remote_glob(pattern: str) -> list[StoragePath]:
    with failures(pattern):
        file_system, path = _file_system(pattern)
        file_system.invalidate_cache()
        return [RemotePath(pattern, found) for found in sorted(file_system.glob(path))]


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec.core

    options = {"get_client": bounded_session} if _is_http(url) else {}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise UserError(f"{without_credentials(url)}: cannot be opened: {without_credentials(str(error))}") from None


class RemotePath:
    def __init__(self, url: str, path: str) -> None:
        self._url = url
        """Names the file system, with what credentials the user put there; never shown."""
        self._path = path.rstrip("/")
        """Within the file system (for HTTP the full URL)."""

    @property
    def file_system(self) -> Any:
        return _file_system(self._url)[0]  # fsspec keeps one per process and URL

    @property
    def name(self) -> str:
        return without_credentials(self._path).rpartition("/")[2]

    @property
    def shown(self) -> str:
        url = self.file_system.unstrip_protocol(self._path).replace("memory:///", "memory://")
        return without_credentials(url)

    def child(self, path: str) -> RemotePath:
        return RemotePath(self._url, f"{self._path}/{path}")

    def parent(self) -> RemotePath:
        return RemotePath(self._url, self._path.rpartition("/")[0])

    def kind(self) -> Literal["file", "folder"] | None:
        try:
            info = self._info()
        except FileNotFoundError:
            return None
        if info["type"] == "directory":
            return "folder"
        if info.get("mimetype") != "text/html":
            return "file"
        if self.name.lower().endswith(FILE_SUFFIXES):
            raise UserError(
                f"{self.shown}: the server sends a web page, not the file; is a login needed, or the address wrong?"
            )
        return "folder"  # over HTTP a page of links

    def subfolders(self) -> list[str]:
        folders = [name for name, info in self._entries() if info["type"] == "directory"]
        return sorted(name for name in folders if not name.startswith("."))

    def files(self, prefix: str = "", *, deep: bool = True) -> FolderListing:
        found = FolderListing([], [])
        for name, info in self._entries():
            if name.startswith("."):
                found.hidden.append(f"{prefix}{name}")
            elif info["type"] != "directory":
                found.files.append(ListedFile(f"{prefix}{name}", *_status(info)))
            elif deep:
                files, hidden = self.child(name).files(f"{prefix}{name}/")
                found.files.extend(files)
                found.hidden.extend(hidden)
        return found

    def status(self) -> FileStatus:
        return _status(self._info())

    def read(self, expected: FileStatus | None = None) -> bytes:
        if expected is not None or not _is_http(self._path):  # what comes over HTTP is bounded anyway
            check_sample_size((expected or self.status()).num_bytes)
        try:
            data = self._fetch(None, None)
        except FileNotFoundError:
            if expected is None:
                raise
            raise changed(self.shown) from None
        if expected is not None and expected.num_bytes not in (-1, len(data)):
            raise changed(self.shown)
        return data

    def reader(self, expected: FileStatus) -> RangeReader:
        if self.status() != expected:
            raise changed(self.shown)
        if expected.num_bytes < 0:
            raise OSError(f"{self.shown}: the server does not say how long it is; copy the data to a disk first")
        if _is_http(self._path) and expected.num_bytes > PROBE_BYTES:  # or each sample would be reported as bad
            self.read_range(PROBE_BYTES // 2, PROBE_BYTES // 2 + 1)
        return _ReadAhead(self, expected.num_bytes)

    def read_range(self, start: int, stop: int) -> bytes:
        data = self._fetch(start, stop)
        if len(data) != stop - start:
            raise OSError(f"{self.shown}: {len(data)} bytes came where {stop - start} were requested")
        return data

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        if not _is_http(self._path):
            with failures(self._path), self.file_system.open(self._path, "rb") as file:
                yield file
            return
        num_bytes = self.status().num_bytes
        whole = self._fetch(None, None) if num_bytes <= SMALL_BYTES else None
        raw = io.BytesIO(whole) if whole is not None else _Pieces(self, num_bytes)
        with raw if isinstance(raw, io.BytesIO) else io.BufferedReader(raw, BUFFER_BYTES) as file:
            yield file

    def _fetch(self, start: int | None, stop: int | None) -> bytes:
        """The whole file, or the bytes start..stop-1."""
        for attempt in itertools.count():
            try:
                with failures(self._path):
                    return self.file_system.cat_file(self._path, start=start, end=stop)
            except (FileNotFoundError, PermissionError, NotAsAsked):  # the same at every attempt
                raise
            except OSError:
                if attempt == ATTEMPTS - 1:
                    raise
            time.sleep(FIRST_PAUSE_S * 4**attempt)
        raise AssertionError("unreachable")

    def _info(self) -> Mapping[str, Any]:
        with failures(self._path):
            return self.file_system.info(self._path)

    def _entries(self) -> list[tuple[str, Mapping[str, Any]]]:
        with failures(self._path):
            # A trailing slash: some HTTP servers list folders only under it, others redirect.
            listed = self.file_system.ls(f"{self._path}/" if _is_http(self._path) else self._path, detail=True)
        entries = [(info["name"].rstrip("/"), info) for info in listed]
        inside = [(name.rpartition("/")[2], info) for name, info in entries if name != self._path and "?" not in name]
        return [(name, info) for name, info in inside if name not in ("", ".", "..")]


class _ReadAhead:
    """Reads pieces of a remote file: in order by large requests, otherwise by requests for just the piece."""

    def __init__(self, file: RemotePath, num_bytes: int) -> None:
        self._file = file
        self._num_bytes = num_bytes
        self._start = 0
        self._data = b""
        self._last_stop = 0

    def read_at(self, start: int, length: int) -> bytes:
        stop = start + length
        if stop > self._num_bytes:
            raise OSError(f"{self._file.shown}: ends {stop - self._num_bytes} bytes early")
        if not (self._start <= start and stop <= self._start + len(self._data)):
            in_order = 0 <= start - self._last_stop <= MAX_GAP_BYTES
            far = min(max(stop, start + READ_AHEAD_BYTES), self._num_bytes) if in_order else stop
            self._start, self._data = start, self._file.read_range(start, far)
        self._last_stop = stop
        return self._data[start - self._start : stop - self._start]

    def read_into(self, start: int, into: memoryview) -> None:
        into[:] = self.read_at(start, len(into))

    def close(self) -> None:
        self._data = b""


class _Pieces(io.RawIOBase):
    """A remote file as a Python file: one request per read."""

    def __init__(self, file: RemotePath, num_bytes: int) -> None:
        super().__init__()
        self._file = file
        self._num_bytes = num_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}[whence]
        return self._at

    def readinto(self, into: Any) -> int:
        stop = min(self._at + len(into), self._num_bytes)
        if stop <= self._at:
            return 0
        data = self._file.read_range(self._at, stop)
        into[: len(data)] = data
        self._at = stop
        return len(data)


def _status(info: Mapping[str, Any]) -> FileStatus:
    size = info.get("size")
    tag = "|".join(f"{name}={info[name]}" for name in TAGS if info.get(name) is not None)
    return FileStatus(-1 if size is None else int(size), xxhash.xxh3_64_intdigest(tag.encode()) >> 1 if tag else 0)


@contextmanager
def failures(path: str) -> Iterator[None]:
    """Turns whatever a file system raises into an OSError with one clean line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  # botocore, aiohttp, ...: no common base
        where = without_credentials(path)
        cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
        status = getattr(cause, "status", None)
        if isinstance(error, PermissionError) or status in DENIED:
            raise PermissionError(f"{where}: access denied: {_clean(cause)}") from None
        # fsspec's HTTP raises FileNotFoundError on every failure
        is_other_failure = _is_http(path) and cause is not None and status not in MISSING
        if isinstance(error, FileNotFoundError) and not is_other_failure:
            raise FileNotFoundError(f"{where}: does not exist") from None
        if isinstance(error, NotAsAsked):
            raise NotAsAsked(f"{where}: {error}; copy the data to a disk first") from None
        raise OSError(f"{where}: {_clean(cause)}") from None


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _clean(error: BaseException | None) -> str:
    text = " ".join(without_credentials(str(error)).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# --- HTTP ------------------------------------------------------------------------------------------------------------
# fsspec reads entire responses into memory; these are cut off at what was requested.


class BoundedResponse(aiohttp.ClientResponse):
    async def read(self) -> bytes:
        if self._body is None:
            try:
                self._body = await self._read_within(self._limit())
            except BaseException:
                self.close()
                raise
        return await super().read()

    def _limit(self) -> int:
        """How many bytes may come. NotAsAsked when they are not those that were asked for."""
        if self.status >= 400:
            return MAX_REFUSAL_BYTES
        asked = RANGE.fullmatch(self.request_info.headers.get("Range", ""))
        if asked is None:
            return MAX_PAGE_BYTES if self.content_type == "text/html" else MAX_SAMPLE_BYTES
        start, last = int(asked[1]), int(asked[2])
        sent = CONTENT_RANGE.fullmatch(self.headers.get("Content-Range", "").strip())
        if self.status == 206 and (sent is None or (int(sent[1]) == start and int(sent[2]) <= last)):
            return last - start + 1
        whole = self.content_length
        if self.status == 200 and start == 0 and whole is not None and whole <= last + 1:
            return whole
        raise NotAsAsked("the server does not send the part of a file that it is asked for (range requests)")

    async def _read_within(self, limit: int) -> bytes:
        pieces, size = [], 0
        async for piece in self.content.iter_chunked(PIECE_BYTES):
            size += len(piece)
            if size > limit:
                if self.status >= 400:
                    break
                raise NotAsAsked(f"the server sends more than the {limit:,} bytes that may come")
            pieces.append(piece)
        return b"".join(pieces)


async def bounded_session(**options: Any) -> aiohttp.ClientSession:
    """For fsspec's `get_client`. Requests uncompressed data: parts of a compressed response cannot be used."""
    return aiohttp.ClientSession(
        response_class=BoundedResponse, timeout=TIMEOUT, headers={"Accept-Encoding": "identity"}, **options
    )
