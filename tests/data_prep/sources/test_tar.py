"""The tar reader finds what `tarfile` finds, and refuses what is damaged or hostile, naming the member."""

from __future__ import annotations

import gzip
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.sources.files.tar import TarEntry, walk_tar
from tests.data_prep.sources.opening import TarOf, refuses


def walk(data: bytes, *, stream: bool = False) -> list[TarEntry]:
    def read_at(start: int, length: int) -> bytes:
        assert start >= 0
        assert length >= 0  # of which a file descriptor makes an error
        return data[start : start + length]

    return list(walk_tar(read_at, 0, None if stream else len(data), "a.tar"))


def packed(*infos: tarfile.TarInfo, form: int = tarfile.GNU_FORMAT, end: bool = True) -> bytes:
    data = b""
    for info in infos:
        data += info.tobuf(form) + bytes(-(-info.size // 512) * 512)
    return data + (bytes(1024) if end else b"")


def member(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


names = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0/."), min_size=1, max_size=40), min_size=1, max_size=6
).map("/".join)


@settings(max_examples=60, deadline=None)
@given(
    files=st.dictionaries(names, st.binary(max_size=1500), max_size=6),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    stream=st.booleans(),
)
def test_it_finds_what_tarfile_wrote(files: dict[str, bytes], form: int, stream: bool) -> None:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5  # a fraction: pax writes a header for it
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:  # ustar ends at 255 bytes of name
                return
    data = target.getvalue()
    found = walk(data, stream=stream)
    assert [(m.name, data[m.offset : m.offset + m.num_bytes]) for m in found] == list(files.items())


def test_folders_and_dots_are_not_files(tar_of: TarOf) -> None:
    data = packed(member("./a", kind=tarfile.DIRTYPE), member("././a/b.jpg", 3), member("old/", kind=tarfile.AREGTYPE))
    assert walk(data) == [TarEntry("a/b.jpg", 1024, 3)]
    assert walk(tar_of({})) == []


def test_sizes_beyond_octal_are_read() -> None:
    size = 9 << 30
    header = member("big", size).tobuf(tarfile.GNU_FORMAT)
    reads = {0: header, 512 + size: bytes(1024)}
    found = list(walk_tar(lambda start, length: reads[start][:length].ljust(length, b"\0"), 0, 512 + size + 1024, "a"))
    assert found == [TarEntry("big", 512, size)]


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (member("../x.jpg"), r"a\.tar: \.\./x\.jpg is a name that leads out of the archive"),
        (member("a/../../x.jpg"), "leads out of the archive"),
        (member("/etc/x.jpg"), "leads out of the archive"),
        (member(".//etc/x.jpg"), "leads out of the archive"),
        (member("x.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"), r"a\.tar: x\.jpg is a symbolic link"),
        (member("x.jpg", kind=tarfile.LNKTYPE, link="y.jpg"), "is a hard link"),
        (member("x.jpg", kind=tarfile.CHRTYPE), "is a device"),
        (member("x.jpg", kind=tarfile.FIFOTYPE), "is a pipe"),
        (member("x.jpg", kind=tarfile.GNUTYPE_SPARSE), "is a sparse file"),
        (member("x.jpg", kind=b"Z"), "of the unknown kind b'Z'"),
    ],
)
def test_members_a_data_set_never_contains_are_refused(info: tarfile.TarInfo, reason: str) -> None:
    refuses(reason, walk, packed(member("fine.jpg", 700), info))


def test_damage_is_named(tar_of: TarOf) -> None:
    data = tar_of({"a.jpg": b"1" * 600, "b.jpg": b"2" * 600})
    in_padding = tar_of({"b.jpg": b"2" * 6000})[: 512 + 6100]
    flipped = bytearray(data)
    flipped[1536 + 3] ^= 4
    for damaged, message in [
        (data[: 1536 + 512 + 512], r"cut short: b\.jpg ends 88 bytes after the end"),
        (data[: 2 * 1536], r"cut short: it has no end mark after b\.jpg"),
        (in_padding, r"cut short: it has no end mark after b\.jpg"),
        (bytes(flipped), r"the header after a\.jpg is damaged: its checksum is wrong"),
        (b"no tar at all" * 100, "is it a tar"),
        (packed(member("././@LongLink", 1 << 25, kind=tarfile.GNUTYPE_LONGNAME)), "has a header of 33,554,432 bytes"),
    ]:
        refuses(message, walk, damaged)
    refuses("cut short: it has no end mark after its start", walk, b"", stream=True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("gap", [512, 1024, 9728, 200_192])
def test_data_after_the_end_mark_is_never_ignored(tar_of: TarOf, gap: int, stream: bool) -> None:
    data = tar_of({"a.jpg": b"1", "b.jpg": b"2"})[:2048]
    assert [m.name for m in walk(data + bytes(gap), stream=stream)] == ["a.jpg", "b.jpg"]
    refuses(
        f"separate them with `head -c {2048 + gap}` and `tail -c .{2049 + gap}`",
        walk,
        data + bytes(gap) + data,
        stream=stream,
    )
    for rest in (data, b"\0" * 700 + b"x", data[:300]):
        refuses(
            r"has data after its end mark, from byte \d+ on, after b\.jpg",
            walk,
            data + bytes(gap) + rest,
            stream=stream,
        )


def test_zeros_after_the_end_mark_are_read_to_a_limit(monkeypatch: pytest.MonkeyPatch, tar_of: TarOf) -> None:
    monkeypatch.setattr("data_prep.sources.files.tar.MAX_TAIL_BYTES", 1 << 20)
    assert walk(tar_of({}) + bytes(1 << 20)) == []
    refuses(
        "more than 1,048,576 bytes after its end mark",
        next,
        walk_tar(lambda start, length: bytes(length), 0, 1 << 60, "a.tar"),
    )


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (gzip.compress(b"x" * 999, mtime=0), r"a\.tar: is compressed with gzip.*unpack it first \(gunzip\)"),
        (b"BZh91AY&SY", "compressed with bzip2"),
        (b"\xfd7zXZ\0\0", "compressed with xz"),
        (b"\x28\xb5\x2f\xfd\0", "compressed with zstd"),
        (b"PK\x03\x04", "is a zip file"),
        (b"PAR1", "is a parquet file"),
        (b"\n<!DOCTYPE html><html>Please log in", "is a web page; is a login needed"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b'{"error": "not found"}', "is JSON text"),
    ],
)
@pytest.mark.parametrize("fill", [0, 2000])
def test_a_file_that_is_not_a_tar_is_named_by_what_it_is(head: bytes, reason: str, fill: int) -> None:
    refuses(reason, walk, head + b" " * fill)


def pax_header(records: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return member("pax", len(records), kind=kind).tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0")


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (b"12 size=-1\n\n", r"gives the size b'-1"),
        (b"410 size=" + b"9" * 400 + b"\n", "gives the size b'999"),
        (b"14 size=0x10\n\n", "gives the size"),
        (b"99 path=x\n", "the extended header after its start is damaged"),
        (b"0 path=x\n", "is damaged"),
        (b"9 path=ab", "is damaged"),
        (b"22 GNU.sparse.major=1\n", "belongs to a sparse file"),
        (b"12 path=a\0b\n", r"holds a file named a\\x00b"),
        (b"13 path=abc/\n", "holds a file named abc/"),
        (b"16 path=../../x\n", r"\.\./\.\./x is a name that leads out"),
    ],
)
def test_extended_headers_are_read_exactly(records: bytes, reason: str) -> None:
    refuses(reason, walk, pax_header(records) + packed(member("y.jpg", 3)))


def test_an_extended_header_is_of_one_member() -> None:
    comment = pax_header(b"20 comment=anything\n", tarfile.XGLTYPE)
    assert walk(comment + packed(member("y.jpg"))) == [TarEntry("y.jpg", 1536, 0)]
    of_all = pax_header(b"10 path=a\n", tarfile.XGLTYPE)
    refuses("gives all members one name or size", walk, of_all + packed(member("y.jpg", 3)))
    refuses("ends where a member should follow its start", walk, pax_header(b"10 path=a\n") + bytes(1024))


def test_names_do_not_reach_the_terminal_as_they_are() -> None:
    link = member("\x1b[31m\nx.jpg", kind=tarfile.SYMTYPE, link="y")
    refuses(r"\\x1b\[31m\\nx\.jpg is a symbolic link", walk, packed(link))
    refuses(r"5,000 bytes\); expected a name of at most 4,096 bytes", walk, packed(member("x" * 5000)))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_of_any_kind_is_refused_or_harmless(data: st.DataObject) -> None:
    """Any byte changed, cut or added: the same files are found, or one line tells that they are not."""
    members = member("a/x.jpg", 700), member("b.cls", 1), member("c.png", 600)
    whole = packed(*members, form=data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])))
    kind = data.draw(st.sampled_from(["change", "cut", "add", "move"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    if kind == "change":
        damaged = whole[:at] + data.draw(st.binary(min_size=1, max_size=12)) + whole[at + 1 :]
    elif kind == "cut":
        damaged = whole[:at]
    elif kind == "add":
        damaged = whole + data.draw(st.binary(max_size=600))
    else:
        damaged = whole[:at] + whole[at + data.draw(st.sampled_from([1, 512, 1024])) :]
    try:
        found = [m.name for m in walk(damaged, stream=data.draw(st.booleans()))]
    except UserError as error:
        assert str(error).isprintable()  # noqa: PT017  # either may be
        return
    assert set(found) <= {info.name for info in members}
    assert found == sorted(found)
