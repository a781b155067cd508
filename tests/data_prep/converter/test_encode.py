"""Encoding one sample: what is kept, what is encoded again and how, what is refused and why."""

from __future__ import annotations

import io
import json
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_prep.beton import layout
from data_prep.converter import picture as reading
from data_prep.converter.encode import (
    Encoded,
    encode,
    encode_all,
    ends_may_do,
    leave_in_source,
)
from data_prep.converter.picture import BadSample
from data_prep.converter.settings import ConvertSettings
from data_prep.errors import UserError
from data_prep.jpeg.turbojpeg import decode_as_ffcv
from data_prep.pixels import to_rgb
from data_prep.sources.files.paths import HEAD_BYTES, TAIL_BYTES, empty_ends
from tests.data_prep.bare_jpegs import in_scans, progressive


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(
    ("size", "max_side", "expected", "untouched"),
    [
        ((30, 40), None, (30, 40), True),
        ((30, 40), 40, (30, 40), True),
        ((30, 40), 20, (15, 20), False),
        ((300, 2), 10, (10, 1), False),
    ],
)
def test_original_keeps_the_bytes_up_to_max_side_and_shrinks_larger_images_in_proportion(
    size: tuple[int, int], max_side: int | None, expected: tuple[int, int], untouched: bool, picture, image_file
) -> None:
    data = image_file(picture(*size), quality=60)
    encoded = encode(data, ConvertSettings(max_side=max_side))
    assert (encoded.height, encoded.width) == expected
    assert encoded.untouched == (encoded.data == data) == untouched
    assert encoded.mode == layout.MODE_JPEG
    assert pixels(encoded.data).shape == (*expected, 3)


def test_jpeg_always_encodes_again_with_the_given_options(picture, image_file) -> None:
    data = image_file(picture(), quality=90)
    low, high = (encode(data, ConvertSettings(encode="jpeg", quality=q)) for q in (30, 95))
    assert not high.untouched
    assert len(low.data) < len(high.data)
    assert np.abs(pixels(high.data).astype(int) - pixels(data)).mean() < 2
    for subsampling, factor in (("4:4:4", 0x11), ("4:2:2", 0x21), ("4:2:0", 0x22)):
        encoded = encode(data, ConvertSettings(encode="jpeg", subsampling=subsampling))
        frame = encoded.data.index(b"\xff\xc0")
        assert encoded.data[frame + 11] == factor


def difference(image: Image.Image, other: Image.Image) -> float:
    """Mean grey levels."""
    assert image.size == other.size
    return float(np.abs(np.asarray(image).astype(int) - np.asarray(other.convert("RGB"))).mean())


def test_kinds_of_jpeg_that_the_stock_decoder_misreads_end_as_the_right_pixels(picture, image_file, turbo_file) -> None:
    """Compared with the picture they were made of, not with a decoder that might share the mistake."""
    colour = picture()
    inverted = 255 - np.asarray(colour.convert("CMYK"))
    for data in (
        turbo_file(inverted, "ycck"),
        image_file(colour.convert("CMYK"), quality=100, subsampling="4:4:4"),
        turbo_file(np.asarray(colour), "arithmetic"),
    ):
        encoded = encode(data, ConvertSettings())
        assert not encoded.untouched
        assert difference(Image.open(io.BytesIO(encoded.data)), colour) < 3


def turned(image_file, picture, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return image_file(picture(30, 40), quality=95, exif=exif)


@pytest.mark.parametrize("max_side", [None, 256, 255])
def test_a_file_is_left_in_its_source_by_its_ends_only_where_its_bytes_would_be_stored(
    max_side: int | None, picture, image_file, turbo_file, ends_in
) -> None:
    big = picture(192, 256)
    plain = image_file(big, quality=100)
    assert len(plain) > HEAD_BYTES
    told = {
        "plain": plain,
        "progressive": image_file(big, quality=100, progressive=True),
        "small": image_file(big, quality=20),
        "gray": image_file(big.convert("L")),
        "junk behind": plain + b"j" * (TAIL_BYTES - 2),
    }
    read_whole = {
        "headers beyond the head": image_file(picture(), comment=b"c" * HEAD_BYTES),
        "much junk behind": plain + b"j" * TAIL_BYTES,
        "cut short": plain[:-2],
        "CMYK": image_file(picture().convert("CMYK")),
        "arithmetic": turbo_file(np.asarray(picture()), "arithmetic"),
        "PNG": image_file(picture(), "PNG"),
        "empty": b"",
    }
    settings = ConvertSettings(check="headers", max_side=max_side)
    for (name, data), left in zip(told.items(), leave_in_source(ends_in(told.values()), settings), strict=True):
        stored = encode(data, settings)
        assert (left is not None) == stored.untouched == (max_side != 255), name
        if left is not None:
            assert (left.height, left.width, left.num_bytes) == (stored.height, stored.width, len(stored.data))
    assert leave_in_source(ends_in(read_whole.values()), settings) == [None] * len(read_whole)
    assert leave_in_source(empty_ends(2), settings) == [None, None]  # they could not be read
    assert ends_may_do(settings, 0)
    for other in (
        {"check": "decode"},
        {"exif": "apply"},
        {"encode": "jpeg"},
        {"encode": "mixed", "raw_share": 1.0},
        {"page_bytes": 128 << 20},
    ):
        assert not ends_may_do(ConvertSettings(**{"check": "headers", **other}), 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_exif_orientation_is_applied_only_when_asked_for(orientation: int, picture, image_file) -> None:
    data = turned(image_file, picture, orientation)
    ignored = encode(data, ConvertSettings(encode="raw"))
    assert (ignored.height, ignored.width) == (30, 40)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    raw = encode(data, ConvertSettings(encode="raw", exif="apply"))
    assert raw.data == upright.tobytes()
    assert (raw.width, raw.height) == upright.size
    stored = encode(data, ConvertSettings(exif="apply"))
    assert stored.untouched == (orientation == 1)
    image = Image.open(io.BytesIO(stored.data))
    assert image.getexif().get(0x0112, 1) == 1
    assert difference(image, upright) < 3
    small = encode(data, ConvertSettings(encode="raw", exif="apply", max_side=20))
    size = (15, 20) if orientation >= 5 else (20, 15)
    assert (small.width, small.height) == size
    pixels_of_small = Image.frombytes("RGB", size, small.data)
    assert difference(pixels_of_small, upright.resize(size, Image.Resampling.HAMMING)) < 3


def test_bad_files_are_refused_with_a_reason(picture, image_file) -> None:
    jpeg, png = image_file(picture()), image_file(picture(), "PNG")
    height = jpeg.index(b"\xff\xc0") + 5
    for strictness in ("decode", "headers"):
        for data, reason in [
            (b"", "is empty"),
            (b"hello", "is no picture of a format that is read"),
            (b"\xff\xd8\xff", "is damaged"),
            (jpeg[: len(jpeg) // 2], "is damaged: Premature end of JPEG file"),
            (jpeg[:100], "is damaged"),
            (jpeg[:height] + b"\0\0" + jpeg[height + 2 :], "x 0 px: it has no pixels"),
            (png[: len(png) // 2], "is damaged or of an unusual kind: image file is truncated"),
            (png[:60] + bytes([png[60] ^ 255]) + png[61:], "is damaged or of an unusual kind: broken"),
            (image_file(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "has gray values that are fractions"),
        ]:
            for mode in ("original", "jpeg", "raw"):
                with pytest.raises(BadSample, match=reason):
                    encode(data, ConvertSettings(encode=mode, check=strictness))


def rot(data: bytes, share: float) -> bytes:
    """Wrong bytes within the image's data, as a dying disk leaves them."""
    at = data.index(b"\xff\xda") + 20
    at += int((len(data) - at) * share)
    wrong = np.random.default_rng(5).bytes(512)
    return data[:at] + wrong + data[at + len(wrong) :]


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_bit_rot_that_the_decoder_notices_makes_a_bad_sample(options: dict[str, object], picture, image_file) -> None:
    data = image_file(picture(300, 400, seed=3), quality=95, **options)
    rotten = [rot(data, share) for share in (0.2, 0.5, 0.8)]
    noticed = 0
    for damaged in rotten:
        for settings in (ConvertSettings(), ConvertSettings(encode="jpeg"), ConvertSettings(max_side=100)):
            try:
                encode(damaged, settings)
            except BadSample as error:
                assert str(error).startswith(("is damaged: Corrupt JPEG data", "is damaged: Premature end"))  # noqa: PT017
                noticed += 1
    assert noticed == 9
    assert encode(rotten[1], ConvertSettings(check="headers")).untouched


def checkerboard(across: int, down: int, low: int, high: int) -> Image.Image:
    y, x = np.mgrid[0:64, 0:64]
    gray = np.where((x // across + y // down) % 2, high, low).astype(np.uint8)
    return Image.fromarray(gray).convert("RGB")


@pytest.mark.parametrize("with_c", [True, False])
@pytest.mark.parametrize("options", [{}, {"encode": "jpeg"}, {"quality": 100}, {"quality": 90, "subsampling": "4:2:0"}])
def test_the_stock_decoder_shows_what_is_encoded(
    options: dict[str, object], with_c: bool, picture, image_file, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_c:
        monkeypatch.setattr(reading, "native_library", lambda: None)
    settings = ConvertSettings(**options)
    photo = encode(image_file(picture(50, 70), "PNG"), settings)
    assert photo.mode == layout.MODE_JPEG
    stored_as = {}
    for across, down in ((1, 1), (2, 4), (4, 4), (4, 7), (8, 4), (5, 5), (64, 1)):
        for low, high in ((0, 255), (60, 200)):
            image = checkerboard(across, down, low, high)
            encoded = encode(image_file(image, "PNG"), settings)
            shown = encoded.data if encoded.mode == layout.MODE_RAW else decode_as_ffcv(encoded.data, 64, 64).tobytes()
            off = np.abs(np.frombuffer(shown, np.uint8).astype(int) - np.frombuffer(image.tobytes(), np.uint8))
            assert off.max() < 80, (across, down, low)
            stored_as[across, down, low] = encoded.mode
    assert stored_as[4, 4, 0] == layout.MODE_RAW  # at any quality its sums overflow
    assert list(stored_as.values()).count(layout.MODE_RAW) < 4


def test_the_pixels_of_a_large_file_are_made_when_they_are_asked_for(image_file) -> None:
    drawing = image_file(Image.new("L", (1500, 1500)), "PNG")
    assert len(drawing) < 20_000
    tracemalloc.start()
    for encoded in encode_all([drawing] * 8, range(8), ConvertSettings(encode="raw")):
        assert isinstance(encoded, Encoded)
        assert len(encoded.data) == 6_750_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 6_750_000


def test_one_image_that_breaks_the_reader_is_a_bad_sample(picture, image_file, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever error it is: here of a decoder that does not say how it fails."""
    good, other = image_file(picture(), "PNG"), image_file(picture(seed=3), "PNG")

    def break_on_other(data: bytes, *_: object, **__: object) -> Image.Image:
        if data == other:
            return 1 // 0
        return to_rgb(data)

    monkeypatch.setattr(reading, "to_rgb", break_on_other)
    found = list(encode_all([good, other, good], range(3), ConvertSettings()))
    assert [isinstance(one, BadSample) for one in found] == [False, True, False]
    assert str(found[1]).startswith("cannot be stored: ZeroDivisionError: ")


def test_a_background_is_shown_through_transparent_pixels(image_file) -> None:
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    white = ConvertSettings(encode="raw", background=(255, 255, 255))
    assert encode(image_file(image, "PNG"), white).data == bytes([255] * 48)
    assert encode(image_file(image, "PNG"), ConvertSettings(encode="raw")).data == bytes([200, 100, 50] * 16)
    assert ConvertSettings.from_dict(json.loads(json.dumps(white.as_dict()))) == white
    older = {name: value for name, value in ConvertSettings().as_dict().items() if name != "background"}
    assert ConvertSettings.from_dict(older) == ConvertSettings()
    assert ConvertSettings().made(older)
    assert not white.made(older)


def test_mixed_is_a_share_of_raw_that_depends_on_seed_and_index_alone(picture, image_file) -> None:
    data = image_file(picture(8, 8), quality=90)
    settings = ConvertSettings(encode="mixed", raw_share=0.3)
    modes = [encode(data, settings, index).mode for index in range(1000)]
    assert 250 < modes.count(layout.MODE_RAW) < 350
    assert modes == [encode(data, settings, index).mode for index in range(1000)]
    assert [i for i in range(40) if modes[i] == layout.MODE_RAW] == [1, 6, 12, 14, 19, 20, 22, 29, 31, 34]
    other_seed = ConvertSettings(encode="mixed", raw_share=0.3, seed=1)
    assert modes != [encode(data, other_seed, index).mode for index in range(1000)]
    for share, mode in ((0.0, layout.MODE_JPEG), (1.0, layout.MODE_RAW)):
        assert {encode(data, ConvertSettings(encode="mixed", raw_share=share), i).mode for i in range(50)} == {mode}
    jpegs = [encode(data, settings, i) for i in range(50) if modes[i] == layout.MODE_JPEG]
    assert all(encoded.untouched for encoded in jpegs)


def test_images_that_would_not_fit_in_memory_are_refused(image_file) -> None:
    huge = image_file(Image.new("1", (8000, 8000)), "PNG")
    with pytest.raises(BadSample, match="is 8000 x 8000 px, more than 36,000,000 px in all; make it smaller first"):
        encode(huge, ConvertSettings(max_side=100))
    for mode in ("L", "CMYK"):
        jpeg = image_file(Image.new(mode, (8000, 8000)), "JPEG")  # decoded at 1/8
        assert encode(jpeg, ConvertSettings(max_side=100)).width == 100
        for kind in ("original", "jpeg", "raw"):
            with pytest.raises(BadSample, match="is 8000 x 8000 px, more than 36,000,000 px in all; use --max-side"):
                encode(jpeg, ConvertSettings(encode=kind))


@pytest.mark.parametrize("check_kind", ["decode", "headers"])
def test_small_files_that_take_much_to_decode_are_refused(check_kind: str) -> None:
    settings = ConvertSettings(check=check_kind)  # type: ignore[arg-type]
    assert encode(progressive(64, 2), settings).untouched
    settings = ConvertSettings(check=check_kind, max_side=100)  # type: ignore[arg-type]
    for file, reason in (
        (
            progressive(12_000, 1),
            "12000 x 12000 px in several scans are 274 MiB of coefficients at once, more than 256",
        ),
        (in_scans(10_000, 10_000), "10000 x 10000 px in several scans are 572 MiB"),
        (progressive(2300, 400), "400 scans of 2300 x 2300 px"),
    ):
        with pytest.raises(BadSample, match=f"is too large to decode: {reason}"):
            encode(file, settings)
    with pytest.raises(BadSample, match="is 12000 x 12000 px, more than 36,000,000 px in all; use --max-side"):
        encode(progressive(12_000, 1), ConvertSettings(check=check_kind))  # type: ignore[arg-type]
    with pytest.raises(BadSample, match="is damaged: Progressive JPEG image has more than 500 scans"):
        encode(progressive(64, 600), ConvertSettings())
    assert encode(in_scans(64, 100), ConvertSettings(check=check_kind)).untouched  # type: ignore[arg-type]


def test_documents_are_not_handed_to_their_interpreters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n{} loop\n%%EOF\n"
    with pytest.raises(BadSample, match="is a PostScript file; convert it to JPEG or PNG first"):
        encode(eps, ConvertSettings())
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("check_kind", ["decode", "headers"])
def test_sides_that_libjpeg_refuses_are_not_kept(check_kind: str, image_file) -> None:
    data = bytearray(image_file(Image.new("RGB", (65_500, 66))))
    settings = ConvertSettings(check=check_kind)  # type: ignore[arg-type]
    assert encode(bytes(data), settings).untouched
    at = data.find(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 66, 65_501)
    with pytest.raises(BadSample):
        encode(bytes(data), settings)
    with pytest.raises(BadSample, match="is 65501 x 66 px, more than 65,500 px on a side; make it smaller first"):
        encode(image_file(Image.new("RGB", (65_501, 66)), "PNG"), settings)


def test_an_image_larger_than_a_page_is_refused(image_file) -> None:
    settings = ConvertSettings(encode="raw", page_bytes=layout.MIN_PAGE_BYTES)
    fits = image_file(Image.new("RGB", (1024, 682)), "PNG")
    too_large = image_file(Image.new("RGB", (1024, 683)), "PNG")
    assert len(encode(fits, settings).data) == 1024 * 682 * 3
    with pytest.raises(BadSample, match=r"has 2098176 bytes to store, more than a page of 2097152; use --max-side"):
        encode(too_large, settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encode": "png"}, "--encode png: expected one of original, jpeg, raw, mixed"),
        ({"raw_share": 1.5}, r"--raw-share 1.5: expected 0\.\.1"),
        ({"seed": -1}, "--seed -1"),
        ({"exif": "maybe"}, "--exif maybe: expected one of ignore, apply"),
        ({"background": (0, 0, 256)}, r"--background \(0, 0, 256\): expected R,G,B"),
        ({"check": "none"}, "--check none: expected one of decode, headers"),
        ({"quality": 0}, r"--quality 0: expected 1\.\.100"),
        ({"max_side": 0}, "--max-side 0"),
        ({"max_side": 65536}, "--max-side 65536"),
        ({"subsampling": "4:1:0"}, "--subsampling 4:1:0"),
        ({"page_bytes": 3 << 20}, "--page-mib 3: expected a power of two"),
        ({"page_bytes": 1 << 20}, "--page-mib 1"),
    ],
)
def test_settings_out_of_range_are_the_users(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ConvertSettings(**values)
