"""Sources behind URLs equal those on a disk: `memory://`, and HTTP from a local server."""

from __future__ import annotations

import http.server
import io
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import Fault
from data_prep.sources.files.paths import without_credentials
from data_prep.sources.files.remote import READ_AHEAD_BYTES, RemotePath, remote_path
from data_prep.sources.label_file import read_class_names
from data_prep.sources.splits import SplitRequest
from tests.data_prep.sources.opening import TarOf, data_of, opened, refused, refuses

REMOTE = "data_prep.sources.files.remote"


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files, and parts of them; counts requests; asks for a password under /secret/."""

    requests: ClassVar[list[tuple[str, str | None]]] = []
    serves_ranges = True

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.requests.append((self.path, wanted))
        if self.path.startswith("/secret/") and "Authorization" not in self.headers:
            self.send_error(403)
            return
        local = Path(self.translate_path(self.path))
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
        if not match or not local.is_file() or not self.serves_ranges:
            super().do_GET()
            return
        data = local.read_bytes()
        part = data[int(match[1]) : int(match[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {match[1]}-{match[2]}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def serving(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Gives the URL of a server of this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.daemon_threads = True
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_address[1]}"
        finally:
            httpd.shutdown()
            thread.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the URL that serves it."""
    root = tmp_path / "served"
    root.mkdir()
    RangeHandler.requests.clear()
    with serving(partial(RangeHandler, directory=str(root))) as url:
        yield root, url


@pytest.fixture
def memory() -> Iterator[Any]:
    file_system = fsspec.filesystem("memory")
    yield file_system
    file_system.store.clear()
    file_system.pseudo_dirs[:] = [""]


def wds_tar(tar_of: TarOf, numbers: range) -> bytes:
    files: dict[str, bytes] = {}
    for n in numbers:
        files |= {f"{n}.jpg": b"jpg %d" % n, f"{n}.cls": b"%d" % (n % 2)}
    return tar_of(files)


def parquet(count: int) -> bytes:
    file = io.BytesIO()
    rows = {"image": [b"image %d" % i for i in range(count)], "label": [i % 3 for i in range(count)]}
    pq.write_table(pa.table(rows), file, row_group_size=2)
    return file.getvalue()


# --- each source, remote and local ------------------------------------------------------------------------------------


def test_a_folder_in_memory_is_the_folder_on_disk(image_tree: Path, memory: Any) -> None:
    (image_tree / "cat" / "notes.txt").write_text("no image")
    (image_tree / "cat" / "deep").mkdir()
    (image_tree / "cat" / "deep" / "z.png").write_bytes(b"png")
    memory.put(str(image_tree), "/bucket/tree", recursive=True)
    remote = pickle.loads(pickle.dumps(opened("image-folder", "memory://bucket/tree")))
    local = opened("image-folder", image_tree)
    assert [remote[i] for i in range(len(remote))] == [local[i] for i in range(len(local))]
    assert remote.description.identity == local.description.identity
    assert remote.description.location == "memory://bucket/tree"
    memory.pipe_file("/bucket/tree/cat/0.JPEG", b"another size")
    with pytest.raises(Fault, match=r"memory://bucket/tree/cat/0\.JPEG: changed while it was being read"):
        remote[0]


def test_remote_files_are_fetched_ahead_in_order_only(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(60):
        memory.pipe_file(f"/b/cat/{number:02d}.jpg", b"%d" % number)
    source = opened("image-folder", "memory://b")
    fetched: list[str] = []
    real = type(memory).cat_file

    def counting(self: Any, path: str, **options: Any) -> bytes:
        fetched.append(path)
        return real(self, path, **options)

    monkeypatch.setattr(type(memory), "cat_file", counting)
    assert [source[i].data for i in (50, 7, 30)] == [b"50", b"7", b"30"]
    assert len(fetched) == 3
    assert [source[i].data for i in range(40)] == [b"%d" % i for i in range(40)]
    assert [source[i].data for i in (39, 39, 40, 41)] == [b"39", b"39", b"40", b"41"]
    memory.rm_file("/b/cat/43.jpg")
    assert [source[i].data for i in (41, 42)] == [b"41", b"42"]
    with pytest.raises(Fault, match=r"memory://b/cat/43\.jpg: changed"):
        pickle.loads(pickle.dumps(source))[43]
    assert pickle.loads(pickle.dumps(source))[44].data == b"44"


def test_remote_label_files_and_mistakes(memory: Any) -> None:
    memory.pipe_file("/b/val/x.jpg", b"x")
    memory.pipe_file("/b/labels.csv", b"x.jpg,cat\n")
    assert opened("image-folder", "memory://b/val", labels="memory://b/labels.csv")[0].data == b"x"
    for source in ("image-folder", "kaggle", "ilsvrc", "webdataset", "hf-parquet", "cifar10"):
        refused(r"memory://none", source, "memory://none", SplitRequest("train"))
    refused("nosuch://bucket: cannot be opened", "image-folder", "nosuch://bucket")


@pytest.mark.parametrize("location", ["memory://wds", "memory://wds/train-{0..2}.tar", "memory://wds/train-*.tar"])
def test_shards_in_memory(memory: Any, tar_of: TarOf, location: str) -> None:
    for shard in range(3):
        memory.pipe_file(f"/wds/train-{shard}.tar", wds_tar(tar_of, range(2 * shard, 2 * shard + 2)))
    source = opened("webdataset", location, SplitRequest("train"))
    assert data_of(source) == [b"jpg %d" % i for i in range(6)]
    assert source.description.location == location


@pytest.mark.parametrize("location", ["memory://hub", "memory://hub/data/*.parquet", "memory://hub/data/train.parquet"])
def test_parquet_in_memory(memory: Any, location: str) -> None:
    memory.pipe_file("/hub/data/train.parquet", parquet(5))
    source = opened("hf-parquet", location, SplitRequest("train"))
    assert [(source[i].data, source[i].label) for i in range(5)] == [(b"image %d" % i, i % 3) for i in range(5)]


# --- HTTP -------------------------------------------------------------------------------------------------------------


def test_sources_over_http_are_those_on_a_disk(server: tuple[Path, str], tar_of: TarOf, image_tree: Path) -> None:
    root, url = server
    (root / "train-0.tar").write_bytes(wds_tar(tar_of, range(30)))
    source = opened("webdataset", f"{url}/train-{{0..0}}.tar")
    script = "import pickle, sys; s = pickle.load(sys.stdin.buffer); print([s[i].data.decode() for i in (29, 0, 1, 2)])"
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, input=pickle.dumps(source), capture_output=True, timeout=60, check=True)
    assert result.stdout.decode().strip() == str(["jpg 29", "jpg 0", "jpg 1", "jpg 2"])
    image_tree.rename(root / "tree")
    source = opened("image-folder", f"{url}/tree")
    assert source.class_names == ("cat", "dog", "emu")
    assert source[3].data == (root / "tree/dog/1.JPEG").read_bytes()


def test_a_large_file_is_read_in_order_by_few_requests(server: tuple[Path, str]) -> None:
    root, url = server
    data = bytes(range(256)) * (3 << 12)
    (root / "large").write_bytes(data)
    path = remote_path(f"{url}/large")
    reader = path.reader(path.status())
    RangeHandler.requests.clear()
    for start in range(0, len(data) - 1000, 1500):
        assert reader.read_at(start, 1000) == data[start : start + 1000]
    assert len(RangeHandler.requests) <= 1 + len(data) // READ_AHEAD_BYTES + 1
    assert reader.read_at(2_000_000, 10) == data[2_000_000:2_000_010]
    with pytest.raises(OSError, match="ends 10 bytes early"):
        reader.read_at(len(data) - 10, 20)


@pytest.mark.parametrize("small_bytes", [0, 8 << 20])
def test_parquet_over_http_in_parts_and_in_full(
    server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, small_bytes: int
) -> None:
    root, url = server
    (root / "train.parquet").write_bytes(parquet(5))
    monkeypatch.setattr(f"{REMOTE}.SMALL_BYTES", small_bytes)
    source = opened("hf-parquet", f"{url}/train.parquet")
    assert [(source[i].data, source[i].label) for i in (0, 4, 2)] == [(b"image %d" % i, i % 3) for i in (0, 4, 2)]
    assert any(part is not None for _, part in RangeHandler.requests) == (small_bytes == 0)
    with remote_path(f"{url}/train.parquet").open() as file:
        assert (file.read(4), file.seek(-4, io.SEEK_END) > 0, file.read(), file.read()) == (b"PAR1", True, b"PAR1", b"")


def test_a_server_without_ranges_is_named(
    server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tar_of: TarOf
) -> None:
    root, url = server
    (root / "a.tar").write_bytes(wds_tar(tar_of, range(20)))
    monkeypatch.setattr(RangeHandler, "serves_ranges", False)
    message = r"a\.tar: cannot be read: the server does not send the part of a file.*range requests.*; copy the data"
    refused(message, "webdataset", f"{url}/a.tar")


class OddHandler(http.server.BaseHTTPRequestHandler):
    """Answers as the path says, whatever is asked for."""

    num_sent: ClassVar[int] = 0

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        kind = self.path.split("/")[1]
        is_part = "Range" in self.headers and kind in ("endless-part", "other-part")
        status = 302 if kind == "loop" else 206 if is_part else 500 if kind == "broken" else 200
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if kind in ("page", "links") else "application/octet-stream")
        if kind == "loop":
            self.send_header("Location", self.path)
        if is_part:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            other = (kind == "other-part") * 512
            self.send_header("Content-Range", f"bytes {first + other}-{last + other}/1000000")
        if kind == "short" or (kind in ("endless-part", "other-part") and not with_body):
            self.send_header("Content-Length", "1000000")
        if kind == "page":
            self.send_header("Content-Length", "6")
        self.end_headers()
        if kind in ("page", "short") and with_body:
            self.wfile.write(b"<html>")
        elif kind != "loop" and with_body:
            with suppress(OSError):  # until the other side has had enough
                while True:
                    self.wfile.write(bytes(1 << 16))
                    type(self).num_sent += 1 << 16

    def log_message(self, *_: Any) -> None: ...


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("endless/0.tar", "the server does not say how long it is; copy the data to a disk first"),
        ("endless-part/0.tar", "the server sends more than the [0-9,]+ bytes that may come"),
        ("other-part/0.tar", "the server does not send the part of a file that it is asked for"),
        ("page/0.tar", r"page/0\.tar: the server sends a web page, not the file; is a login needed"),
        ("short/0.tar", "part of a file"),
        ("links", "the server sends more than the 1,048,576 bytes that may come"),
        ("loop/0.tar", r"loop/0\.tar: cannot be read: TooManyRedirects"),
        ("broken/0.tar", r"broken/0\.tar: cannot be read: ClientResponseError: 500"),
    ],
)
def test_a_server_with_odd_responses_ends_in_one_line(path: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{REMOTE}.FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(f"{REMOTE}.MAX_PAGE_BYTES", 1 << 20)
    OddHandler.num_sent = 0
    with serving(OddHandler) as url:
        refused(message, "webdataset", f"{url}/{path}")
    assert OddHandler.num_sent < 64 << 20  # what was in flight


def test_an_endless_text_is_read_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{REMOTE}.MAX_SAMPLE_BYTES", 1 << 20)
    with serving(OddHandler) as url:
        text = remote_path(f"{url}/endless/labels.txt")
        refuses("sends more than the 1,048,576 bytes that may come", read_class_names, text)


@pytest.mark.parametrize(("failures", "succeeds"), [(2, True), (3, False)])
def test_a_passing_failure_is_tried_again(
    memory: Any, monkeypatch: pytest.MonkeyPatch, failures: int, succeeds: bool
) -> None:
    memory.pipe_file("/b/a", b"data")
    monkeypatch.setattr(f"{REMOTE}.FIRST_PAUSE_S", 0.0)
    calls: list[int] = []
    real = type(memory).cat_file

    def flaky(self: Any, *arguments: Any, **options: Any) -> bytes:
        calls.append(1)
        if len(calls) <= failures:
            raise ConnectionResetError("the line is down")
        return real(self, *arguments, **options)

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    if succeeds:
        assert remote_path("memory://b/a").read() == b"data"
    else:
        with pytest.raises(OSError, match="/b/a: ConnectionResetError: the line is down"):
            remote_path("memory://b/a").read()
    assert len(calls) == 3


# --- credentials ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://bucket/key", "s3://bucket/key"),
        ("https://user:pass@host/a/b", "https://host/a/b"),
        ("sftp://user@host/a", "sftp://host/a"),
        ("s3://AKIA:se/cr+et@bucket/key", "s3://bucket/key"),
        ("https://host/a.tar?X-Amz-Signature=abc&x=1#y", "https://host/a.tar"),
        ("hf://datasets/a/b@main/c.parquet", "hf://datasets/a/b@main/c.parquet"),
        ("GET 'https://u:p@h/a?token=t' fails, then https://h/b?token=t", "GET 'https://h/a' fails, then https://h/b"),
        ("/local/a?b#c@d", "/local/a?b#c@d"),
    ],
)
def test_without_credentials(text: str, clean: str) -> None:
    assert without_credentials(text) == clean


def test_credentials_reach_neither_manifests_nor_messages(server: tuple[Path, str], tar_of: TarOf) -> None:
    root, url = server
    (root / "secret").mkdir()
    (root / "secret" / "a.tar").write_bytes(wds_tar(tar_of, range(2)))
    (root / "a.tar").write_bytes(wds_tar(tar_of, range(2)))
    signed = f"{url}/a.tar?X-Amz-Signature=hush"
    source = opened("webdataset", signed)
    assert source[1].data == b"jpg 1"
    assert "hush" not in str(source.description)
    assert source.key(0) == "a.tar/0"
    secret = "(?!.*hush)"  # nowhere in the message
    refused(
        f"^{secret}{url}/secret/a.tar: cannot be read: access denied",
        "webdataset",
        f"{url}/secret/a.tar?X-Amz-Signature=hush",
    )
    refused(f"^{secret}nosuch://", "image-folder", "nosuch://user:hush@bucket/a?token=hush")
    assert isinstance(pickle.loads(pickle.dumps(remote_path(signed))), RemotePath)
