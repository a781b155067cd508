"""A run in an object store, through fsspec's `s3`: credentials and endpoint from the environment, as for `aws`.

There is no rename and no append. A checkpoint is its files, uploaded one after the other, `checkpoint.json` last:
without it the checkpoint is not complete. A file that grows (the spool) is uploaded in parts named by their offset,
`00001-00001.jsonl/000000065536`: at most 256 KiB are sent again when it grows.
"""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from resnet_dist.errors import Fault, UserError
from resnet_dist.storage.base import MAX_SMALL_BYTES

_PART_BYTES = 256 << 10
_CONNECT_LIMIT_S = 10
_READ_LIMIT_S = 60
_LARGE = ("epoch=", "best/")
"""Begin the names of checkpoints, which `pull` leaves where they are."""
_GROWING = ".jsonl"


class StorageFault(Fault, OSError):
    """The store cannot be reached, or refuses. Also an OSError, so that whatever writes a file tries again."""


class ObjectStorage:
    def __init__(self, url: str) -> None:
        self._url = url
        self._root = url.partition("://")[2]
        self._part_starts: dict[Path, int] = {}

    def __reduce__(self) -> tuple[type[ObjectStorage], tuple[str]]:
        return ObjectStorage, (self._url,)

    @property
    def location(self) -> str:
        return self._url

    @cached_property
    def _work(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(prefix="resnet-dist-run-")

    @property
    def folder(self) -> Path:
        """This process's own working copy, removed when it ends."""
        return Path(self._work.name)

    @property
    def sync_every_s(self) -> float:
        return 5.0

    @cached_property
    def _fs(self) -> Any:
        return connect()

    def pull(self, group: str = "") -> None:
        with self._failures("reading"):
            names = [key.removeprefix(self._root + "/") for key in self._find(group)]
            small = [name for name in names if not name.startswith(_LARGE) and _is_plain(name)]
            contents = self._fs.cat([f"{self._root}/{name}" for name in small]) if small else {}
        growing: dict[Path, bytearray] = {}
        for name in sorted(small):  # parts of one file in the order of their offsets
            data, path = contents[f"{self._root}/{name}"], self.folder / name
            if path.parent.suffix == _GROWING and not path.name.isdecimal():
                continue  # not a part of ours
            if path.parent.suffix == _GROWING:
                whole = growing.setdefault(path.parent, bytearray())
                del whole[int(path.name) :]
                whole += data
            else:
                _write(path, data)
        for path, whole in growing.items():
            _write(path, bytes(whole))

    def upload(self, path: Path) -> None:
        with self._failures("writing"):
            self._fs.pipe_file(self._key(path), path.read_bytes())

    def create_exclusive(self, path: Path) -> bool:
        # A file that grows is a folder of parts in the store; any other is a file there too, for `pull`.
        key = f"{self._key(path)}/{0:012d}" if path.suffix == _GROWING else self._key(path)
        with self._failures("writing"):
            try:
                self._fs.pipe_file(key, b"", mode="create")
            except FileExistsError:
                return False
        _write(path, b"")
        return True

    def extended(self, path: Path, num_bytes: int) -> None:
        start = self._part_starts.get(path, 0)
        with path.open("rb") as file:
            file.seek(start)
            part = file.read(num_bytes - start)
        with self._failures("writing"):
            self._fs.pipe_file(f"{self._key(path)}/{start:012d}", part)
        if len(part) >= _PART_BYTES:
            self._part_starts[path] = num_bytes

    def names(self, group: str = "") -> list[str]:
        prefix = f"{self._root}/{group}".rstrip("/")
        with self._failures("listing"):
            try:
                found = self._fs.ls(prefix, detail=False, refresh=True)
            except FileNotFoundError:
                return []
        return sorted(PurePosixPath(key).name for key in found if key.rstrip("/") != prefix)

    def commit(self, name: str, write: Callable[[Path], None], last: str) -> None:
        with tempfile.TemporaryDirectory(prefix="resnet-dist-checkpoint-") as scratch:
            write(Path(scratch))
            files = sorted(Path(scratch).iterdir(), key=lambda path: path.name == last)
            with self._failures("writing"):
                self.remove(name)
                for path in files:
                    self._fs.put_file(str(path), f"{self._root}/{name}/{path.name}")

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="resnet-dist-checkpoint-") as scratch:
            with self._failures("reading"):
                for key in self._find(name):
                    try:
                        self._fs.get_file(key, str(Path(scratch) / PurePosixPath(key).name))
                    except FileNotFoundError:
                        continue  # just removed by another process
            yield Path(scratch)

    def read(self, name: str) -> bytes | None:
        key = f"{self._root}/{name}"
        with self._failures("reading"):
            try:
                if (num_bytes := self._fs.info(key, refresh=True)["size"]) > MAX_SMALL_BYTES:
                    raise StorageFault(f"{self._url}/{name}: has {num_bytes:,} bytes; remove it")
                content: bytes = self._fs.cat_file(key)
            except FileNotFoundError:
                return None
        return content

    def remove(self, name: str) -> None:
        """JSON files first: a checkpoint without its `checkpoint.json` is not complete."""
        with self._failures("removing"):
            for key in sorted(self._find(name), key=lambda key: not key.endswith(".json")):
                self._fs.rm_file(key)
        path = self.folder / name
        shutil.rmtree(path, ignore_errors=True)
        if path.is_file():
            path.unlink()

    def require_writable(self) -> None:
        probe = f"{self._root.rpartition('/')[0]}/.write-test-{uuid.uuid4().hex}"
        try:
            with self._failures("writing"):
                self._fs.pipe_file(probe, b"resnet-dist")
                self._fs.rm_file(probe)
        except StorageFault as fault:
            raise UserError(f"storage is not writable: {fault}") from None

    def _find(self, name: str) -> list[str]:
        """The keys of every object at or under `name`."""
        found: list[str] = self._fs.find(f"{self._root}/{name}".rstrip("/"), refresh=True)
        return found

    def _key(self, path: Path) -> str:
        return f"{self._root}/{path.relative_to(self.folder).as_posix()}"

    @contextmanager
    def _failures(self, doing: str) -> Iterator[None]:
        from aiohttp import ClientError as ConnectionFailure
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except StorageFault:
            raise
        except (OSError, BotoCoreError, ClientError, ConnectionFailure) as error:
            if isinstance(error, FileExistsError):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise StorageFault(
                f"{doing} {self._url} failed: {reason} (bucket, credentials and endpoint come from the environment: "
                "AWS_PROFILE or AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL)"
            ) from None


def connect() -> Any:
    """fsspec's S3, without a cache of listings; it waits at most a minute for a response."""
    import fsspec

    return fsspec.filesystem(
        "s3",
        use_listings_cache=False,
        config_kwargs={
            "connect_timeout": _CONNECT_LIMIT_S,
            "read_timeout": _READ_LIMIT_S,
            "retries": {"mode": "standard", "max_attempts": 4},
        },
    )


def _is_plain(key: str) -> bool:
    """Whether a key names a file below the run's folder: others may write to the bucket."""
    return not key.startswith("/") and all(part not in ("", ".", "..") for part in key.split("/")) and "\0" not in key


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
