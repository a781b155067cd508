"""A beton in an S3 bucket: its ranges are the parts of one multipart upload, which the store assembles at the end.

Until then there is nothing under the final name; the manifest follows as the last object. Parts and notes of the work
are under `<output>.work/`. Credentials and endpoint come from the environment, as for `aws`.
"""

from __future__ import annotations

import errno
import socket
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, BinaryIO

from data_prep.beton import ranges
from data_prep.beton.files import BETON
from data_prep.beton.manifest import MAX_MANIFEST_BYTES
from data_prep.beton.ranges import FileRange, Payload, Written
from data_prep.errors import UserError
from data_prep.sources.files.paths import without_credentials
from data_prep.sources.files.remote import READ_AHEAD_BYTES, failures

MAX_PARTS = 10_000
"""S3's limit for one upload."""
CONNECT_LIMIT_S = 10
READ_LIMIT_S = 60
MAX_ATTEMPTS = 5
OWNER, UPLOAD = "owner", "upload-"


class ObjectOutput:
    """UserError for a URL of another kind of store."""

    def __init__(self, url: str) -> None:
        scheme, _, self._key = url.partition("://")
        self._url = url
        self._token = ""
        if scheme.lower() != "s3" or "/" not in self._key:
            raise UserError(
                f"--output {without_credentials(url)}: betons are written to a file system or to "
                "s3://bucket/name.beton (other stores by their S3 interface: AWS_ENDPOINT_URL)"
            )

    def __reduce__(self) -> tuple[type[ObjectOutput], tuple[str]]:
        return ObjectOutput, (self._url,)

    @cached_property
    def _fs(self) -> Any:
        try:
            import fsspec

            return fsspec.filesystem(
                "s3",
                use_listings_cache=False,
                config_kwargs={
                    "connect_timeout": CONNECT_LIMIT_S,
                    "read_timeout": READ_LIMIT_S,
                    "retries": {"mode": "standard", "max_attempts": MAX_ATTEMPTS},
                },
            )
        except ImportError as error:
            raise UserError(f"--output {self._url}: {error}") from None

    def _call(self, method: str, **arguments: Any) -> Any:
        bucket, _, key = self._key.partition("/")
        with failures(self._url):
            return self._fs.call_s3(method, Bucket=bucket, Key=key, **arguments)

    @property
    def shown(self) -> str:
        return self._url

    @property
    def work_shown(self) -> str:
        return f"{self._url}.work"

    def _named(self, end: str) -> str:
        return self._key.removesuffix(BETON) + end

    def _work(self, name: str) -> str:
        return f"{self._key}.work/{name}"

    def name_of(self, end: str) -> str:
        return f"s3://{self._named(end)}"

    def num_bytes(self) -> int | None:
        try:
            return self._size(self._key)
        except FileNotFoundError:
            return None

    def read_text(self, end: str) -> str | None:
        try:
            num_bytes = self._size(self._named(end))
            if num_bytes > MAX_MANIFEST_BYTES:
                raise OSError(errno.EFBIG, f"has more than {MAX_MANIFEST_BYTES:,} bytes", self.name_of(end))
            with failures(self.name_of(end)):
                return self._fs.cat_file(self._named(end)).decode("utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def write_bytes(self, end: str, data: bytes) -> None:
        with failures(self.name_of(end)):
            self._fs.pipe_file(self._named(end), data)

    def write_text(self, end: str, text: str | None) -> None:
        if text is not None:
            self.write_bytes(end, text.encode("utf-8", errors="backslashreplace"))
        elif self.read_text(end) is not None:
            self._rm(self._named(end))

    @contextmanager
    def owned(self) -> Iterator[None]:
        """A store has no locks that end with their process. So the newest driver owns the work, and an older one ends
        when it checks; until then both write the same bytes."""
        self._token = f"{socket.gethostname()} {uuid.uuid4().hex}"
        try:
            self.write(OWNER, self._token.encode())
        except OSError as error:
            raise UserError(f"{self.work_shown}: cannot be written: {error}; choose another --output") from None
        yield

    def require_owned(self) -> None:
        with failures(self.work_shown):
            owner = self._fs.cat_file(self._work(OWNER)).decode()
        if owner != self._token:
            raise UserError(f"{self.shown}: another data-prep, on {owner.split()[0]}, has taken over; this one ends")

    def names(self) -> set[str]:
        folder = self._work("")
        try:
            with failures(self.work_shown):
                return {key.removeprefix(folder) for key in self._fs.ls(folder, detail=False, refresh=True)} - {""}
        except FileNotFoundError:
            return set()

    def reader(self, name: str) -> _ObjectReader:
        return _ObjectReader(self._fs, self._work(name), self.size_of(name))

    def size_of(self, name: str) -> int:
        return self._size(self._work(name))

    def _size(self, key: str) -> int:
        with failures(f"s3://{key}"):
            return int(self._fs.info(key, refresh=True)["size"])

    def write(self, name: str, data: bytes) -> None:
        with failures(f"{self.work_shown}/{name}"):
            self._fs.pipe_file(self._work(name), data)

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        with tempfile.NamedTemporaryFile(prefix="data-prep-part-") as file:
            yield file  # type: ignore[misc]  # a wrapper that does the same
            file.flush()
            with failures(f"{self.work_shown}/{name}"):
                self._fs.put_file(file.name, self._work(name))

    def remove(self, name: str) -> None:
        self._rm(self._work(name))

    def _rm(self, key: str) -> None:
        try:
            with failures(f"s3://{key}"):
                self._fs.rm_file(key)
        except FileNotFoundError:
            pass

    def remove_work(self) -> None:
        for name in sorted(self.names()):
            if name.startswith(UPLOAD):
                self._abort(name)
            self.remove(name)

    def range_bytes(self, total_bytes: int | None) -> int | None:
        if total_bytes is None:
            return None
        return ranges.RANGE_BYTES * -(-total_bytes // (ranges.RANGE_BYTES * MAX_PARTS))

    def begin(self, plan_digest: str, *, is_new: bool = False) -> str:
        note = f"{UPLOAD}{plan_digest[:16]}"
        names = self.names()
        for stale in names:
            if stale.startswith(UPLOAD) and (stale != note or is_new):
                self._abort(stale)
                self.remove(stale)
        if note in names and not is_new:
            upload = self._upload_of(note)
            try:
                self._call("list_parts", UploadId=upload, MaxParts=1)
                return upload
            except OSError:
                pass  # completed or removed since
        upload = self._call("create_multipart_upload")["UploadId"]
        self.write(note, upload.encode())
        return str(upload)

    def has_space(self, target: str, num_bytes: int) -> bool:
        return True

    def reserve(self, target: str, total_bytes: int) -> None:
        pass

    def _upload_of(self, note: str) -> str:
        with failures(f"{self.work_shown}/{note}"):
            return self._fs.cat_file(self._work(note)).decode()

    def _abort(self, note: str) -> None:
        """An upload that is not completed uses storage until this is done."""
        with suppress(OSError):  # completed or removed
            self._call("abort_multipart_upload", UploadId=self._upload_of(note))

    def write_range(self, target: str, file_range: FileRange, payload: Payload) -> Written:
        """Holds the range in memory."""
        body = bytearray(file_range.stop - file_range.start)

        def write(data: memoryview, offset: int) -> None:
            at = offset - file_range.start
            body[at : at + len(data)] = data

        chunks = ranges.write_range(write, file_range, payload)
        uploaded = self._call("upload_part", UploadId=target, PartNumber=file_range.number + 1, Body=body)
        return Written(chunks, uploaded["ETag"])

    def holds(self, target: str, file_range: FileRange, written: Written) -> bool:
        listed = self._call("list_parts", UploadId=target, PartNumberMarker=file_range.number, MaxParts=1)
        expected = (file_range.number + 1, written.receipt, file_range.stop - file_range.start)
        return any((part["PartNumber"], part["ETag"], part["Size"]) == expected for part in listed.get("Parts", ()))

    def complete(self, target: str, receipts: Sequence[str]) -> None:
        parts = [{"PartNumber": number + 1, "ETag": receipt} for number, receipt in enumerate(receipts)]
        self._call("complete_multipart_upload", UploadId=target, MultipartUpload={"Parts": parts})


class _ObjectReader:
    """Reads ahead by `READ_AHEAD_BYTES`, so that pieces in order need few requests."""

    def __init__(self, fs: Any, key: str, num_bytes: int) -> None:
        self._fs, self._key, self._num_bytes = fs, key, num_bytes
        self._start, self._data = 0, b""

    def read_at(self, start: int, num_bytes: int) -> bytes:
        stop = start + num_bytes
        if not (self._start <= start and stop <= self._start + len(self._data)):
            far = min(max(stop, start + READ_AHEAD_BYTES), self._num_bytes)
            with failures(f"s3://{self._key}"):
                self._data = self._fs.cat_file(self._key, start=start, end=far) if start < far else b""
            self._start = start
        return self._data[start - self._start : stop - self._start]

    def close(self) -> None:
        self._data = b""
