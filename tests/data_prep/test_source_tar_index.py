"""The tar reader finds what `tarfile` finds, and refuses what is damaged or hostile, naming the member."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.sources.tar_index import Member, walk_tar

TarOf = Callable[[dict[str, bytes]], bytes]


def walk(data: bytes, *, stream: bool = False) -> list[Member]:
    return list(walk_tar(lambda start, length: data[start : start + length], 0, None if stream else len(data), "a.tar"))


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


def test_folders_and_dots_are_no_files(tar_of: TarOf) -> None:
    data = packed(member("./a", kind=tarfile.DIRTYPE), member("././a/b.jpg", 3), member("old/", kind=tarfile.AREGTYPE))
    assert walk(data) == [Member("a/b.jpg", 1024, 3)]
    assert walk(tar_of({})) == []


def test_sizes_beyond_octal_are_read() -> None:
    size = 9 << 30
    header = member("big", size).tobuf(tarfile.GNU_FORMAT)
    reads = {0: header, 512 + size: bytes(1024)}
    found = list(walk_tar(lambda start, length: reads[start][:length].ljust(length, b"\0"), 0, 512 + size + 1024, "a"))
    assert found == [Member("big", 512, size)]


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
def test_what_a_data_set_never_holds_is_refused(info: tarfile.TarInfo, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        walk(packed(member("fine.jpg", 700), info))


def test_damage_is_named(tar_of: TarOf) -> None:
    data = tar_of({"a.jpg": b"1" * 600, "b.jpg": b"2" * 600})
    with pytest.raises(UserError, match=r"cut short: b\.jpg ends 88 bytes behind the end"):
        walk(data[: 1536 + 512 + 512])
    with pytest.raises(UserError, match=r"cut short: it has no end mark behind b\.jpg"):
        walk(data[: 2 * 1536])
    with pytest.raises(UserError, match="cut short: it has no end mark behind its start"):
        walk(b"", stream=True)
    flipped = bytearray(data)
    flipped[1536 + 3] ^= 4
    with pytest.raises(UserError, match=r"the header behind a\.jpg is damaged: its check sum is wrong"):
        walk(bytes(flipped))
    with pytest.raises(UserError, match="is it a tar"):
        walk(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"1,537,024 bytes lie behind its end mark, after b\.jpg"):
        walk(data[:3072] + bytes(1 << 20) + data[:3072] + bytes(485376))


def test_hostile_extensions_are_bounded() -> None:
    with pytest.raises(UserError, match="has a header of 33,554,432 bytes"):
        walk(packed(member("././@LongLink", 1 << 25, kind=tarfile.GNUTYPE_LONGNAME)))
    pax = member("pax", 512, kind=tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT)
    with pytest.raises(UserError, match="pax header that is damaged"):
        walk(pax + b"0 path=x\n".ljust(512, b"\0") + bytes(1024))
    record = b"16 path=../../x\n"
    assert len(record) == 16
    short = member("pax", 16, kind=tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
    with pytest.raises(UserError, match=r"\.\./\.\./x is a name that leads out"):
        walk(short + packed(member("y.jpg")))
