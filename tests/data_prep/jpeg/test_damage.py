"""One definition of damage: what conversion keeps, `verify` accepts and training's decoders read, under any crop."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import native as native_library
from data_prep.converter.encode import encode
from data_prep.converter.picture import BadSample
from data_prep.converter.settings import ConvertSettings
from data_prep.jpeg.check import why_unfit
from data_prep.jpeg.header import coefficient_bytes, is_read_by_ffcv, plain, read_jpeg_header
from data_prep.jpeg.turbojpeg import DamagedJpeg, UnreadableJpeg, check, decode_rgb, encode_rgb
from data_prep.pixels import LIMITS
from resnet_dist.fuzz.jpegs import KINDS, made_kinds, mutate
from resnet_dist.fuzz.verdicts import Judge

USUAL = ("gray", "4:4:4", "4:2:2", "4:4:0", "4:2:0", "4:1:1", "runs past", "the same")


@pytest.fixture(scope="module")
def kinds(picture, image_file) -> dict[str, bytes]:
    """Made of coefficients, and by libjpeg with tables that fit the picture."""
    noise = np.random.default_rng(0).normal(128, 50, (61, 75, 3)).clip(0, 255).astype(np.uint8)
    by_libjpeg = {
        f"by libjpeg, {name}": image_file(Image.fromarray(noise), quality=85, **options)
        for name, options in {
            "optimised": {"optimize": True},
            "4:4:4": {"subsampling": "4:4:4"},
            "progressive": {"progressive": True},
            "restarts": {"restart_marker_blocks": 3},
        }.items()
    }
    return {**made_kinds(), **by_libjpeg}


@pytest.fixture(scope="module")
def judge(picture, image_file) -> Judge:
    if find_spec(native_library.DECODE_MODULE) is None:
        pytest.skip("the native kernel was not built")
    return Judge(before=image_file(picture(), optimize=True))


def test_every_kind_is_read_alike_under_every_crop(kinds: dict[str, bytes], judge: Judge) -> None:
    """Also where a progressive file is not complete, and runs pass the last coefficient."""
    places = np.random.default_rng(1)
    verdicts = {name: judge.verdict(data, places) for name, data in kinds.items() for _ in range(3)}
    assert {name: v.disagreement for name, v in verdicts.items() if v.disagreement is not None} == {}
    assert all(verdict.is_sound for verdict in verdicts.values())
    assert {name for name, verdict in verdicts.items() if not verdict.is_kept} == {
        name for name in kinds if not name.startswith((*USUAL, "by libjpeg"))
    }


def test_damaged_copies_are_read_alike_under_every_crop(kinds: dict[str, bytes], judge: Judge) -> None:
    draw, places = random.Random(5), np.random.default_rng(5)
    files = list(kinds.values())
    kept = 0
    for number in range(1200):
        kind = KINDS[number % len(KINDS)]
        damaged = mutate(draw.choice(files), kind, draw, draw.choice(files))
        verdict = judge.verdict(damaged, places)
        assert verdict.disagreement is None, (number, kind)
        kept += verdict.is_kept
    assert 200 < kept < 800


def test_several_bytes_of_255_before_a_zero_are_left_to_libjpeg(judge: Judge) -> None:
    """It takes them for one, but first for a marker, and some of what it then reads stays in the block."""
    places = np.random.default_rng(2)
    draw = random.Random(3)
    noise = draw.randbytes(3 * 200 * 200)
    data = encode_rgb(np.frombuffer(noise, np.uint8).reshape(200, 200, 3), 95, "4:4:4")
    stuffed = [found.start() for found in re.finditer(b"\xff\0", data)]
    for at in draw.sample(stuffed, 8):
        verdict = judge.verdict(data[:at] + b"\xff\xff" + data[at:], places)
        assert verdict == (True, True, None)


# What decides no pixel is no damage, and hides none


def after(marker: bytes, extra: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(marker, extra + marker, 1)


def adobe(transform: int) -> bytes:
    return b"\xff\xee\x00\x0eAdobe\0\x64\0\0\0\0" + bytes([transform])


def without_jfif(data: bytes) -> bytes:
    at = data.index(b"\xff\xe0")
    return data[:at] + data[at + 18 :]


ODDITIES: dict[str, Callable[[bytes], bytes]] = {
    "a version of JFIF": lambda data: data.replace(b"JFIF\0\x01", b"JFIF\0\x02", 1),
    "Adobe's colours": lambda data: without_jfif(data).replace(b"\xff\xdb", adobe(7) + b"\xff\xdb", 1),
    "bytes behind the first marker": lambda data: data[:2] + b"\0\0" + data[2:],
    "bytes before tables": after(b"\xff\xdb", b"abc"),
    "a stuffed byte before tables": after(b"\xff\xc4", b"\xff\0"),
    "bytes before the frame": after(b"\xff\xc0", b"\0"),
    "bytes before the scan": after(b"\xff\xda", b"\x12\x34"),
    "a selection in a sequential scan": lambda data: data.replace(b"\x03\x11\x00\x3f\x00", b"\x03\x11\x00\x00\x00", 1),
    "all of them": lambda data: after(b"\xff\xda", b"\0")(after(b"\xff\xdb", b"x")(data)).replace(
        b"JFIF\0\x01", b"JFIF\0\x09", 1
    ),
}


@pytest.mark.parametrize("oddity", ODDITIES)
@pytest.mark.parametrize("check_kind", ["decode", "headers"])
def test_an_oddity_that_decides_no_pixel_is_encoded_again(oddity: str, check_kind, picture, image_file) -> None:
    data = image_file(picture(90, 120), quality=90)
    odd = ODDITIES[oddity](data)
    assert odd != data
    with pytest.raises(UnreadableJpeg):
        check(odd)
    assert why_unfit(odd, 90, 120) is not None
    assert np.array_equal(decode_rgb(odd, 1), decode_rgb(data, 1))
    stored = encode(odd, ConvertSettings(check=check_kind))
    assert not stored.untouched
    assert why_unfit(stored.data, 90, 120) is None
    shown = np.asarray(Image.open(io.BytesIO(stored.data))).astype(int)
    assert np.abs(shown - decode_rgb(data, 1)).mean() < 2


@pytest.mark.parametrize("oddity", ODDITIES)
@pytest.mark.parametrize("encoded", ["original", "jpeg", "raw"])
def test_damage_after_an_oddity_is_found(oddity: str, encoded: str, picture, image_file) -> None:
    odd = ODDITIES[oddity](image_file(picture(90, 120), quality=90))
    for damaged in (odd[: len(odd) * 2 // 3], odd[: len(odd) * 2 // 3] + b"\xff\xd9"):
        with pytest.raises(DamagedJpeg):
            check(damaged)
        with pytest.raises(BadSample, match="damaged"):
            encode(damaged, ConvertSettings(encode=encoded))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["4:1:0", "3x1", "chroma finer", "4:1:0, progressive"])
def test_damage_in_a_kind_without_a_name_is_found(name: str, kinds: dict[str, bytes]) -> None:
    data = kinds[name]
    assert not encode(data, ConvertSettings()).untouched
    for damaged in (data[: len(data) * 2 // 3], data[: len(data) * 2 // 3] + b"\xff\xd9"):
        with pytest.raises(BadSample, match="damaged"):
            encode(damaged, ConvertSettings())


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_of_any_bytes_the_plain_picture_is_made_without_error(kinds: dict[str, bytes], data: st.DataObject) -> None:
    original = data.draw(st.sampled_from(sorted(kinds.values())))
    assert plain(original) == original
    at = data.draw(st.integers(2, min(len(original), 500)))
    changed = original[:at] + data.draw(st.binary(max_size=4)) + original[at + data.draw(st.integers(0, 4)) :]
    once = plain(changed)
    assert plain(once) == once
    assert len(once) <= len(changed)


# Tables of its own


def without(data: bytes, marker: int) -> bytes:
    """Without the segments of that kind."""
    parts, at = [data[:2]], 2
    while data[at + 1] != 0xDA:
        end = at + 2 + (data[at + 2] << 8 | data[at + 3])
        if data[at + 1] != marker:
            parts.append(data[at:end])
        at = end
    return b"".join(parts) + data[at:]


def test_a_file_without_its_tables_is_encoded_again_or_refused(picture, image_file, judge: Judge) -> None:
    """The standard's are meant; a decoder that ran before, as the stock loader's, still has another's."""
    data = image_file(picture(90, 120), quality=90)
    bare = without(data, 0xC4)
    check(bare)
    for check_kind in ("decode", "headers"):
        stored = encode(bare, ConvertSettings(check=check_kind))  # type: ignore[arg-type]
        assert not stored.untouched
        whole = decode_rgb(stored.data, 1)
        assert np.array_equal(judge.behind_another(stored.data, 90, 120), whole)
        assert np.abs(whole.astype(int) - decode_rgb(data, 1)).mean() < 2
    assert not np.array_equal(judge.behind_another(bare, 90, 120), decode_rgb(data, 1))  # what must not be stored
    assert "tables" in str(why_unfit(bare, 90, 120))
    for check_kind in ("decode", "headers"):
        for table in re.finditer(b"\xff\xc4", data):
            at = table.start()
            fewer = data[:at] + data[at + 2 + (data[at + 2] << 8 | data[at + 3]) :]
            assert not encode(fewer, ConvertSettings(check=check_kind)).untouched  # type: ignore[arg-type]
        with pytest.raises(BadSample, match="Quantization table 0x00 was not defined"):
            encode(without(data, 0xDB), ConvertSettings(check=check_kind))  # type: ignore[arg-type]


def test_tables_that_come_too_late_are_none(kinds: dict[str, bytes]) -> None:
    """Of a file of several scans, whose second uses a table that is defined behind it."""
    data = kinds["4:2:0, a scan for each"]
    assert is_read_by_ffcv(read_jpeg_header(data))
    second = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    other = data[:second] + data[second:].replace(b"\xff\xda\x00\x08\x01\x02\x00", b"\xff\xda\x00\x08\x01\x02\x10", 1)
    assert other != data
    header = read_jpeg_header(other)
    assert header is not None
    assert not header.has_tables


# One set of limits


def test_the_first_scan_tells_whether_all_is_held(kinds: dict[str, bytes]) -> None:
    """Whatever a later one has: else a file of a few bytes would take gigabytes."""
    held = {name: coefficient_bytes(header) for name, data in kinds.items() if (header := read_jpeg_header(data))}
    assert len(held) == len(kinds)
    several = ("progressive", "only DC", "a scan for each", "one and three", "two and one", "a component missing")
    assert {name for name, held_bytes in held.items() if held_bytes} == {
        name for name in kinds if any(word in name for word in several)
    }


def test_the_loaders_c_has_the_limits_of_python() -> None:
    native = Path(__file__).parents[3] / "resnet_dist" / "data" / "native" / "jpeg_region.c"
    source = native.read_text(encoding="utf-8")
    assert f"MAX_COEFFICIENT_BYTES = {LIMITS.coefficient_bytes >> 20} << 20;" in source
    assert f"MAX_SCAN_PIXELS = {LIMITS.scan_pixels};" in source
    assert f"MAX_SCANS = {LIMITS.scans} " in source
