"""Sources behind URLs equal those on a disk: `memory://`, and HTTP from a local server."""

from __future__ import annotations

import http.server
import io
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import Fault, UserError
from data_prep.sources import SourceOptions, open_source
from data_prep.sources.files.places import without_credentials
from data_prep.sources.files.remote import READ_AHEAD_BYTES, RemotePlace, remote_place
from data_prep.sources.label_file import read_class_names
from data_prep.sources.splits import SplitRequest

TarOf = Callable[[dict[str, bytes]], bytes]


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


def write_parquet(path: Path, labels: list[int], paths: list[str] | None = None, names: int = 3) -> None:
    rows = [{"bytes": b"image %d" % i, "path": paths[i] if paths else None} for i in range(len(labels))]
    struct = pa.array(rows, type=pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    features = {"label": {"names": [f"name {n}" for n in range(names)], "_type": "ClassLabel"}}
    table = pa.table({"image": struct, "label": pa.array(labels, type=pa.int64())})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}),
        path,
        row_group_size=2,
    )


def put(memory: Any, root: str, tree: Path) -> None:
    for file in tree.rglob("*"):
        if file.is_file():
            memory.pipe_file(f"{root}/{file.relative_to(tree)}", file.read_bytes())


# --- each source, remote and local ------------------------------------------------------------------------------------


def test_a_folder_in_memory_is_the_folder_on_disk(image_tree: Path, memory: Any) -> None:
    (image_tree / "cat" / "notes.txt").write_text("no image")
    (image_tree / "cat" / "deep").mkdir()
    (image_tree / "cat" / "deep" / "z.png").write_bytes(b"png")
    put(memory, "/bucket/tree", image_tree)
    remote = pickle.loads(pickle.dumps(open_source("image-folder", "memory://bucket/tree")))
    local = open_source("image-folder", str(image_tree))
    assert [remote[i] for i in range(len(remote))] == [local[i] for i in range(len(local))]
    assert remote.description.identity == local.description.identity
    assert remote.description.location == "memory://bucket/tree"
    memory.pipe_file("/bucket/tree/cat/0.JPEG", b"another size")
    with pytest.raises(Fault, match=r"memory://bucket/tree/cat/0\.JPEG: changed while it was being read"):
        remote[0]


def test_remote_files_are_fetched_ahead_in_order_only(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(60):
        memory.pipe_file(f"/b/cat/{number:02d}.jpg", b"%d" % number)
    source = open_source("image-folder", "memory://b")
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
    options = SourceOptions(labels="memory://b/labels.csv")
    assert open_source("image-folder", "memory://b/val", SplitRequest(), options)[0].data == b"x"
    for source in ("image-folder", "kaggle", "ilsvrc", "webdataset", "hf-parquet", "cifar10"):
        with pytest.raises(UserError, match=r"memory://none"):
            open_source(source, "memory://none", SplitRequest("train"))
    with pytest.raises(UserError, match="nosuch://bucket: cannot be opened"):
        open_source("image-folder", "nosuch://bucket")


def test_shards_in_memory(memory: Any, tar_of: TarOf) -> None:
    for shard in range(3):
        memory.pipe_file(f"/wds/train-{shard}.tar", wds_tar(tar_of, range(2 * shard, 2 * shard + 2)))
    for location in ("memory://wds", "memory://wds/train-{0..2}.tar", "memory://wds/train-*.tar"):
        source = open_source("webdataset", location, SplitRequest("train"))
        assert [source[i].data for i in range(6)] == [b"jpg %d" % i for i in range(6)]
        assert source.description.location == location


def test_parquet_in_memory(memory: Any, tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", [0, 1, 2, 0, 1])
    put(memory, "/hub", tmp_path)
    for location in ("memory://hub", "memory://hub/data/*.parquet", "memory://hub/data/train-00000-of-00001.parquet"):
        source = open_source("hf-parquet", location, SplitRequest("train"))
        assert [(source[i].data, source[i].label) for i in range(5)] == [(b"image %d" % i, i % 3) for i in range(5)]


def test_imagenets_parquet_is_proved_by_its_paths(tmp_path: Path) -> None:
    file = tmp_path / "train-00000-of-00001.parquet"
    paths = ["n02000002_1_n02000002.JPEG", "n01000001_7_n01000001.JPEG", "n02000002_2_n02000002.JPEG"]
    write_parquet(file, [1, 0, 1], paths)
    described = open_source("hf-parquet", str(file)).description
    assert described.label_map == {"n01000001": 0, "n02000002": 1}
    write_parquet(file, [1, 0, 2], paths)
    with pytest.raises(UserError, match="the paths' wnids contradict the labels: wnid 2000002 goes with several"):
        open_source("hf-parquet", str(file))
    write_parquet(file, [1, 1, 1], paths)
    with pytest.raises(UserError, match="the paths' wnids contradict the labels: label 1 goes with several"):
        open_source("hf-parquet", str(file))
    write_parquet(file, [-1, -1, -1], [f"ILSVRC2012_test_{i:08d}.JPEG" for i in range(3)])
    with pytest.raises(
        UserError, match=r"row 0: label: the label is -1; hidden test labels are -1: choose another split"
    ):
        open_source("hf-parquet", str(file))


def test_a_parquet_file_that_changes_is_not_read_on(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    write_parquet(file, [0, 1, 2])
    packed = pickle.dumps(open_source("hf-parquet", str(file)))
    os.utime(file, ns=(1, 1))
    with pytest.raises(Fault, match=r"train\.parquet: changed"):
        pickle.loads(packed)[0]


# --- HTTP -------------------------------------------------------------------------------------------------------------


def test_shards_over_http_reopen_in_another_process(server: tuple[Path, str], tar_of: TarOf) -> None:
    root, url = server
    (root / "train-0.tar").write_bytes(wds_tar(tar_of, range(30)))
    source = open_source("webdataset", f"{url}/train-{{0..0}}.tar")
    script = "import pickle, sys; s = pickle.load(sys.stdin.buffer); print([s[i].data.decode() for i in (29, 0, 1, 2)])"
    result = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(source), capture_output=True, timeout=60, check=True
    )
    assert result.stdout.decode().strip() == str(["jpg 29", "jpg 0", "jpg 1", "jpg 2"])


def test_a_folder_over_http(server: tuple[Path, str], image_tree: Path) -> None:
    root, url = server
    image_tree.rename(root / "tree")
    source = open_source("image-folder", f"{url}/tree")
    assert source.class_names == ("cat", "dog", "emu")
    assert source[3].data == (root / "tree/dog/1.JPEG").read_bytes()


def test_a_large_file_is_read_in_order_by_few_requests(server: tuple[Path, str]) -> None:
    root, url = server
    data = bytes(range(256)) * (3 << 12)
    (root / "large").write_bytes(data)
    place = remote_place(f"{url}/large")
    reader = place.reader(place.status())
    RangeHandler.requests.clear()
    pieces = [reader.read_at(start, 1000) for start in range(0, len(data) - 1000, 1500)]
    assert all(
        piece == data[start : start + 1000] for piece, start in zip(pieces, range(0, len(data), 1500), strict=False)
    )
    assert len(RangeHandler.requests) <= 1 + len(data) // READ_AHEAD_BYTES + 1
    RangeHandler.requests.clear()
    assert reader.read_at(2_000_000, 10) == data[2_000_000:2_000_010]
    with pytest.raises(OSError, match="ends 10 bytes early"):
        reader.read_at(len(data) - 10, 20)


@pytest.mark.parametrize("small_bytes", [0, 8 << 20])
def test_parquet_over_http_in_parts_and_in_full(
    server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, small_bytes: int
) -> None:
    root, url = server
    write_parquet(root / "train-00000-of-00001.parquet", [0, 1, 2, 0, 1])
    monkeypatch.setattr("data_prep.sources.files.remote.SMALL_BYTES", small_bytes)
    source = open_source("hf-parquet", f"{url}/train-00000-of-00001.parquet")
    assert [(source[i].data, source[i].label) for i in (0, 4, 2)] == [(b"image %d" % i, i % 3) for i in (0, 4, 2)]
    assert any(part is not None for _, part in RangeHandler.requests) == (small_bytes == 0)
    with remote_place(f"{url}/train-00000-of-00001.parquet").open() as file:
        assert (file.read(4), file.seek(-4, io.SEEK_END) > 0, file.read(), file.read()) == (b"PAR1", True, b"PAR1", b"")


def test_a_server_without_ranges_is_named(
    server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tar_of: TarOf
) -> None:
    root, url = server
    (root / "a.tar").write_bytes(wds_tar(tar_of, range(20)))
    monkeypatch.setattr(RangeHandler, "serves_ranges", False)
    with pytest.raises(
        UserError,
        match=r"a\.tar: the server does not send the part of a file.*range requests.*; copy the data to a disk",
    ):
        open_source("webdataset", f"{url}/a.tar")


class OddHandler(http.server.BaseHTTPRequestHandler):
    """Answers as the path says, whatever is asked for."""

    num_sent: ClassVar[int] = 0

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        kind = self.path.split("/")[1]
        if kind == "loop":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.end_headers()
            return
        is_part = "Range" in self.headers and kind in ("endless-part", "other-part")
        self.send_response(206 if is_part else 500 if kind == "broken" else 200)
        self.send_header("Content-Type", "text/html" if kind in ("page", "links") else "application/octet-stream")
        if is_part:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            other = (kind == "other-part") * 512
            self.send_header("Content-Range", f"bytes {first + other}-{last + other}/1000000")
        if kind in ("endless-part", "other-part") and not with_body:
            self.send_header("Content-Length", "1000000")
        if kind == "short":
            self.send_header("Content-Length", "1000000")
        if kind == "page":
            self.send_header("Content-Length", "6")
        self.end_headers()
        if not with_body:
            return
        if kind in ("page", "short"):
            self.wfile.write(b"<html>")
            return
        try:
            while True:  # until the other side has had enough
                self.wfile.write(bytes(1 << 16))
                type(self).num_sent += 1 << 16
        except OSError:
            pass

    def log_message(self, *_: Any) -> None: ...


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("endless/0.tar", "the server does not say how long it is; copy the data to a disk first"),
        (
            "endless-part/0.tar",
            "the server sends more than the 1,000,000 bytes that may come|more than the [0-9,]+ bytes",
        ),
        ("other-part/0.tar", "the server does not send the part of a file that it is asked for"),
        ("page/0.tar", r"page/0\.tar: the server sends a web page, not the file; is a login needed"),
        ("short/0.tar", "part of a file"),
        ("links", "the server sends more than the 1,048,576 bytes that may come"),
        ("loop/0.tar", r"loop/0\.tar: TooManyRedirects"),
        ("broken/0.tar", r"broken/0\.tar: ClientResponseError: 500"),
    ],
)
def test_a_server_with_odd_responses_ends_in_one_line(path: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.sources.files.remote.FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr("data_prep.sources.files.remote.MAX_PAGE_BYTES", 1 << 20)
    OddHandler.num_sent = 0
    with serving(OddHandler) as url, pytest.raises(UserError, match=message) as refused:
        open_source("webdataset", f"{url}/{path}")
    assert str(refused.value).isprintable()
    assert OddHandler.num_sent < 64 << 20  # what was in flight


def test_an_endless_text_is_read_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.sources.files.remote.MAX_SAMPLE_BYTES", 1 << 20)
    message = "sends more than the 1,048,576 bytes that may come"
    with serving(OddHandler) as url, pytest.raises(UserError, match=message):
        read_class_names(remote_place(f"{url}/endless/labels.txt"))


@pytest.mark.parametrize(("failures", "succeeds"), [(2, True), (3, False)])
def test_a_passing_failure_is_tried_again(
    memory: Any, monkeypatch: pytest.MonkeyPatch, failures: int, succeeds: bool
) -> None:
    memory.pipe_file("/b/a", b"data")
    monkeypatch.setattr("data_prep.sources.files.remote.FIRST_PAUSE_S", 0.0)
    calls: list[int] = []
    real = type(memory).cat_file

    def flaky(self: Any, *arguments: Any, **options: Any) -> bytes:
        calls.append(1)
        if len(calls) <= failures:
            raise ConnectionResetError("the line is down")
        return real(self, *arguments, **options)

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    if succeeds:
        assert remote_place("memory://b/a").read() == b"data"
    else:
        with pytest.raises(OSError, match="/b/a: ConnectionResetError: the line is down"):
            remote_place("memory://b/a").read()
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
        (
            "GET 'https://u:p@h/a?token=t' failed, then https://h/b?token=t",
            "GET 'https://h/a' failed, then https://h/b",
        ),
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
    source = open_source("webdataset", signed)
    assert source[1].data == b"jpg 1"
    assert "hush" not in str(source.description)
    assert source.key(0) == "a.tar/0"
    with pytest.raises(UserError) as refused:
        open_source("webdataset", f"{url}/secret/a.tar?X-Amz-Signature=hush")
    assert f"{url}/secret/a.tar: access denied" in str(refused.value)
    assert "hush" not in str(refused.value)
    with pytest.raises(UserError) as refused:
        open_source("image-folder", "nosuch://user:hush@bucket/a?token=hush")
    assert "hush" not in str(refused.value)
    assert isinstance(pickle.loads(pickle.dumps(remote_place(signed))), RemotePlace)
