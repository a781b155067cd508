"""WebDataset shards: samples are assembled by name, shards found by folder, glob and braces."""

from __future__ import annotations

import errno
import io
import pickle
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.sources.base import Source
from data_prep.sources.file_source import FileSource
from data_prep.sources.files.find import expand_braces
from data_prep.sources.files.local import LocalPath
from data_prep.sources.files.paths import HEAD_BYTES, TAIL_BYTES, FileStatus
from data_prep.sources.splits import SplitRequest
from tests.data_prep.sources.opening import TarOf, data_of, named, opened, refused


def sample(number: int) -> dict[str, bytes]:
    files = {"cls": b"%d" % (number % 3), "jpg": b"jpg %d" % number, "json": b'{"label": "nine", "x": 9}'}
    return {f"s/{number:04d}.{extension}": data for extension, data in files.items()}


def write_shard(path: Path, tar_of: TarOf, contents: list[bytes], extension: str = "cls") -> None:
    """Samples `0`, `1`, ... with an image and one more file each."""
    files: dict[str, bytes] = {}
    for number, text in enumerate(contents):
        files |= {f"{number}.jpg": b"1", f"{number}.{extension}": text}
    path.write_bytes(tar_of(files))


@pytest.fixture
def shards(tmp_path: Path, tar_of: TarOf) -> Path:
    """Three train shards of two samples, one validation shard of one."""
    root = tmp_path / "wds"
    root.mkdir()
    for shard in range(3):
        data = tar_of(sample(2 * shard) | sample(2 * shard + 1))
        (root / f"in1k-train-{shard:02d}.tar").write_bytes(data)
    (root / "in1k-validation-00.tar").write_bytes(tar_of(sample(77)))
    (root / "_info.json").write_text("{}")
    return root


def test_webdataset_reads_shards_in_order(shards: Path) -> None:
    source = pickle.loads(pickle.dumps(opened("webdataset", shards, SplitRequest("train"))))
    assert [source[i].data for i in (*range(6), 0)] == [b"jpg %d" % i for i in (*range(6), 0)]
    assert (source.labels.tolist(), source.class_names) == ([0, 1, 2, 0, 1, 2], ("0", "1", "2"))
    assert source.key(3) == "in1k-train-01.tar/s/0003"
    val = opened("webdataset", shards, named("val"))
    assert (val.description.split, len(val), val[0].data, val[0].label) == ("validation", 1, b"jpg 77", 2)
    refused("holds the splits train, validation; say which", "webdataset", shards)


def test_the_ends_of_an_image_are_read_from_the_shard(tmp_path: Path, tar_of: TarOf) -> None:
    images = [bytes(size) + b"end" for size in (0, HEAD_BYTES - 3, HEAD_BYTES, HEAD_BYTES + TAIL_BYTES)]
    members = {f"{n}.{end}": data for n, image in enumerate(images) for end, data in (("jpg", image), ("cls", b"0"))}
    (tmp_path / "train-0.tar").write_bytes(tar_of(members))
    source = opened("webdataset", tmp_path)
    assert isinstance(source, FileSource)
    ends = source.ends(range(len(images)))
    assert ends.num_bytes.tolist() == list(map(len, images))
    for index, image in enumerate(images):
        assert ends.of(index) == (image[:HEAD_BYTES], image[max(HEAD_BYTES, len(image) - TAIL_BYTES) :])
    together = memoryview(bytearray(sum(map(len, images))))
    source.read_into([3, 0, 2, 1], together)
    assert together == b"".join(images[index] for index in (3, 0, 2, 1))
    long = source.ends(range(len(images)), 2 * HEAD_BYTES)
    assert [long.of(index) for index in range(len(images))] == [(image, b"") for image in images]


def test_an_unreadable_shard_is_reported_when_its_images_are_read(
    tmp_path: Path, tar_of: TarOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "train-0.tar", tar_of, [b"0"])
    source = opened("webdataset", tmp_path)

    def denied(self: LocalPath, expected: FileStatus) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(LocalPath, "reader", denied)
    assert source.ends([0]).num_bytes.tolist() == [-1]
    with pytest.raises(PermissionError):
        source[0]


# --- patterns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "num_samples"), [("in1k-train-{00..02}.tar", 6), ("*-train-0[12].tar", 4), ("in1k-train-01.tar", 2)]
)
def test_webdataset_patterns(shards: Path, pattern: str, num_samples: int) -> None:
    assert len(opened("webdataset", shards / pattern)) == num_samples


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a", "a"),
        ("a-{08..11}", "a-08 a-09 a-10 a-11"),
        ("{1..2}{x,y}", "1x 1y 2x 2y"),
        ("{a}-{0..1}", "{a}-0 {a}-1"),
    ],
)
def test_expand_braces(pattern: str, expanded: str) -> None:
    assert expand_braces(pattern) == expanded.split()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..9999999}.tar", "counts to more than 1,000,000"),
        ("{0..999999}{0..999999}.tar", "counts to more than 1,000,000"),
        ("{a,b}" * 30, "counts to more than 1,000,000"),
        ("{0..9}" * 2000, "counts to more than 1,000,000"),
        ("{9..0}.tar", "counts down"),
        ("{0..%s}.tar" % ("9" * 5000), "does not exist|too long"),
    ],
)
def test_braces_are_bounded(tmp_path: Path, pattern: str, message: str) -> None:
    refused(message, "webdataset", f"{tmp_path}/{pattern}")


# --- samples ----------------------------------------------------------------------------------------------------------


def test_labels_from_json_and_names_from_a_file(tmp_path: Path, tar_of: TarOf) -> None:
    files = {"a.b/x.png": b"png", "a.b/x.json": b'{"label": 1}', "y.JPEG": b"jpeg", "y.json": b'{"label": 0}'}
    (tmp_path / "0.tar").write_bytes(tar_of(files | {"notes.txt": b"?", ".hidden": b"?", "._x.png": b"?"}))
    names = tmp_path / "names.txt"
    names.write_text("n01000001 cat, pussy\nn02000002 dog\n")
    source = opened("webdataset", tmp_path, labels=names)
    assert [(source[i].data, source[i].label) for i in range(2)] == [(b"png", 1), (b"jpeg", 0)]
    assert source.key(0) == "0.tar/a.b/x"
    assert (source.class_names, source.description.label_map["n02000002"]) == (("n01000001", "n02000002"), 1)
    assert (source.description.num_left_out, source.description.left_out) == (2, ["0.tar/notes.txt", "0.tar/.hidden"])
    names.write_text("cat\n")
    refused(r"0\.tar/a\.b/x has label 1, expected 0\.\.0: 1 classes have a name", "webdataset", tmp_path, labels=names)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jpg": b"1"}, r"0\.tar: a: has neither \.cls nor \.json next to it, so no label"),
        ({"a.jpg": b"1", "a.cls": b"1", "b.jpg": b"2"}, r"0\.tar: b: has neither \.cls nor \.json"),
        ({"a.jpg": b"1", "a.json": b"{}"}, r"a\.json: has no label under the key label; say with --label-column"),
        ({"a.jpg": b"1", "a.json": b"[" * 100_000}, r"0\.tar: a\.json: holds JSON nested too deeply"),
        ({"a.jpg": b"1", "a.json": b"[1]"}, "is not a JSON object"),
        ({"a.jpg": b"1", "a.json": b"label"}, "is not JSON: Expecting value"),
        ({"a.jpg": b"1", "a.json": b"\xff\xff"}, "is not JSON"),
        ({"a.jpg": b"1", "a.json": b'{"label": 1, "label": 2}'}, "has a key twice"),
        ({"a.jpg": b"1", "a.json": b'{"label": 0.33}'}, r"a\.json: the label is 0\.33, a float"),
        ({"a.jpg": b"1", "a.json": b'{"label": %s}' % (b"9" * 5000)}, r"a\.json: "),
        ({"a.jpg": b"1", "a.json": b'{"label": [3, 4]}'}, "a list"),
        ({"a.jpg": b"1", "a.cls": b"3", "a.json": b'{"label": 4}'}, r"\.cls says 3, and label in \.json 4; say which"),
        ({"a.jpg": b"1", "a.cls": b"1" * 2_000_000}, r"a\.cls: has 2,000,000 bytes, expected a label"),
        ({"a.jpg": b"1", "a.cls": b"-1"}, r"a\.cls: the label is '-1'; expected a whole number from 0: hidden labels"),
        ({"a.jpg": b"1", "a.cls": b""}, r"a\.cls: the label is missing"),
        ({"a.jpg": b"1", "a.cls": b"\xff"}, r"a\.cls: is not text"),
        ({"a.jpg": b"1", "a.cls": b"9999999999" * 3000}, "the label has 30,000 digits"),
        ({"a.jpg": b"1", "a.cls": b"1", "b.jpg": b"2", "b.cls": b"cat"}, "numbers and texts: 1 in 0.tar/a, 'cat'"),
        ({"a.txt": b"1"}, "holds no samples"),
        ({}, "0.tar holds no files: an empty archive, or a download that was not finished"),
        ({"/a.jpg": b"1", "/a.cls": b"1"}, "leads out of the archive"),
        # files that would be samples of their own, or another's image, were it not for their names
        ({"a.v1.jpg": b"1", "a.v1.cls": b"1"}, r"0\.tar: a\.v1\.jpg: a sample's name ends at its first dot"),
        ({"a.jpg": b"1", "a.cls": b"1", "a.v2.jpg": b"2", "a.v2.cls": b"0"}, r"a\.v2\.jpg: a sample's name ends at"),
        ({"a.jpg": b"1", "a.cls": b"1", "a.seg.png": b"2"}, r"a\.seg\.png: .*say with --image-column .*such as jpg"),
        ({"a.jpg": b"1", "a.png": b"2", "a.cls": b"1"}, r"a: has 2 images, \.jpg, \.png; say which with --image-colu"),
        ({"a.heic": b"1", "a.cls": b"1"}, r"0\.tar: a: has a label but no image that can be read, only \.heic, \.cls"),
        # files of one sample that are not side by side
        ({"a.jpg": b"1", "b.jpg": b"2", "a.cls": b"1", "b.cls": b"1"}, "a: has neither"),
        (
            {"a.jpg": b"1", "a.cls": b"1", "b.jpg": b"2", "b.cls": b"1", "./a.cls": b"1"},
            "the files of the sample a occur twice, or are not adjacent",
        ),
        ({"a.jpg": b"1", "a.cls": b"1", "./a.jpg": b"2", "./a.cls": b"0"}, r"0\.tar: a\.jpg occurs twice"),
        ({"\x1b[31m.jpg": b"1"}, r"0\.tar: \\x1b\[31m: has neither"),
    ],
)
def test_webdataset_mistakes(files: dict[str, bytes], message: str, tmp_path: Path, tar_of: TarOf) -> None:
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    refused(message, "webdataset", tmp_path)


def test_no_sample_is_lost(tmp_path: Path, tar_of: TarOf) -> None:
    """Two archives in one file, and keys that begin again in each shard."""
    first, second = (tar_of({"0.jpg": data, "0.cls": b"0"}) for data in (b"a", b"b"))
    (tmp_path / "0.tar").write_bytes(first)
    (tmp_path / "1.tar").write_bytes(second)
    source = opened("webdataset", tmp_path)
    assert [(source.key(i), source[i].data) for i in range(2)] == [("0.tar/0", b"a"), ("1.tar/0", b"b")]
    (tmp_path / "1.tar").write_bytes(first + second)
    refused(r"1\.tar: has data after its end mark, .* was another archive appended", "webdataset", tmp_path)


def test_folders_within_a_shard_may_be_splits(tmp_path: Path, tar_of: TarOf) -> None:
    files = {}
    for split in ("Train", "val"):
        files |= {f"d/{split}/{n}.{end}": data for n in "01" for end, data in (("jpg", b"1"), ("cls", b"0"))}
    (tmp_path / "all.tar").write_bytes(tar_of(files))
    refused("samples of several splits, by the folders Train, val: .*--split all", "webdataset", tmp_path)
    assert len(opened("webdataset", tmp_path, named("all"))) == 4
    (tmp_path / "all.tar").write_bytes(tar_of({name: data for name, data in files.items() if "val" in name}))
    assert len(opened("webdataset", tmp_path)) == 2


@pytest.mark.parametrize("with_cls", [False, True])
def test_the_tables_of_samples_may_say_the_split(tmp_path: Path, tar_of: TarOf, with_cls: bool) -> None:
    files = {}
    for n, split in enumerate((b"train", b"validation")):
        files |= {f"{n}.jpg": b"1", f"{n}.json": b'{"label": 0, "split": "%s"}' % split}
        files |= {f"{n}.cls": b"0"} if with_cls else {}
    (tmp_path / "all.tar").write_bytes(tar_of(files))
    refused(r"several splits, by the key split in \.json train, validation", "webdataset", tmp_path)
    assert len(opened("webdataset", tmp_path, named("all"))) == 2


def test_labels_may_be_names_or_numbers(tmp_path: Path, tar_of: TarOf) -> None:
    def of(contents: list[bytes], extension: str = "cls", **options: object) -> Source:
        write_shard(tmp_path / "0.tar", tar_of, contents, extension)
        return opened("webdataset", tmp_path, **options)

    texts = of([b"dog\n", b"\xef\xbb\xbfcat", b"dog"])
    assert (texts.class_names, texts.labels.tolist()) == (("cat", "dog"), [1, 0, 1])
    padded = of([b"0003", b"0001\r\n"])
    assert (padded.class_names, padded.labels.tolist()) == (("0", "1", "2", "3"), [3, 1])
    assert padded.notes == ("no sample has 2 of the labels 0..3, first 0",)
    table = of([b'{"id": 1, "label": "x"}', b'{"id": 0, "label": null}'], "json", label_column="id")
    assert table.labels.tolist() == [1, 0]
    assert of([b"1", b"0"], "category.cls", label_column="category.cls").labels.tolist() == [1, 0]
    assert of([b"c2", b"c10"], class_order="number").class_names == ("c2", "c10")
    names = tmp_path / "names.txt"
    names.write_text("dog\ncat\n")
    assert of([b"cat", b"dog"], labels=names).labels.tolist() == [1, 0]
    for contents, options, message in [
        ([b"1"], {"label_column": "txt"}, r"has no \.txt \(--label-column\) and no \.json"),
        ([b"cat", b"emu"], {"labels": names}, r"0\.tar/1 has the label 'emu', which is none of the 2 class names"),
        ([b"c%d" % n for n in (2, 10, 1, 3)], {}, "say --class-order number"),
    ]:
        write_shard(tmp_path / "0.tar", tar_of, contents)
        refused(message, "webdataset", tmp_path, **options)


def test_the_user_may_name_the_image_of_a_sample(tmp_path: Path, tar_of: TarOf) -> None:
    extensions = ("jpg", "seg.png", "TIF")
    files = {f"{n}.{end}": f"{end} {n}".encode() for n in range(2) for end in (*extensions, "cls")}
    files |= {"0.cls": b"0", "1.cls": b"0", "info.json": b"{}"}
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    for extension, stored in (("jpg", "jpg"), ("seg.png", "seg.png"), ("tif", "TIF"), (".TIF", "TIF")):
        source = opened("webdataset", tmp_path, image_column=extension)
        assert data_of(source) == [f"{stored} {i}".encode() for i in range(2)]
        assert source.description.left_out == ["0.tar/info.json"]
    message = r"0: has no \.webp \(--image-column\), only \.jpg, \.seg\.png, \.tif, \.cls"
    refused(message, "webdataset", tmp_path, image_column="webp")


member_names = st.builds(
    "{}{}.{}".format,
    st.sampled_from(["", "s/", "s/.x/", "./"]),
    st.sampled_from(["a", "b", "c.d", "", "._a"]),
    st.sampled_from(["jpg", "JPG", "png", "cls", "json", "txt", "v2.jpg", "seg.png", "heic", ""]),
)
contents = st.sampled_from([b"0", b"1", b"01", b"cat", b"-1", b"1.5", b'{"label": 1}', b'{"label": 0.5}', b"", b"\xff"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(member_names, contents), min_size=1, max_size=9))
@example([("a.jpg", b"0"), ("a.cls", b"1"), ("b.jpg", b"1"), ("b.json", b'{"label": 1}'), ("c.txt", b"0")])
def test_every_file_is_in_a_sample_or_counted_as_left_out(members: list[tuple[str, bytes]]) -> None:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:  # not `tar_of`: a name may be there twice
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "0.tar").write_bytes(target.getvalue())
        try:
            source = opened("webdataset", folder)
        except UserError as error:
            assert str(error).isprintable()  # noqa: PT017  # either may be
            return
        samples = {source.key(i).removeprefix("0.tar/"): source[i].data for i in range(len(source))}
    seen = [(n.removeprefix("./"), data) for n, data in members if not n.rpartition("/")[2].startswith("._")]
    shown = [(name, data) for name, data in seen if not name.rpartition("/")[2].startswith(".")]
    assert sorted(data for name, data in shown if name.lower().endswith((".jpg", ".png"))) == sorted(samples.values())
    stems = ["/".join([*name.split("/")[:-1], name.split("/")[-1].partition(".")[0]]) for name, _ in seen]
    assert source.description.num_left_out == sum(stem not in samples for stem in stems)
