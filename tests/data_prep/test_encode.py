"""One sample: what is kept, what is encoded anew and how, what is refused and why."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.beton import layout
from data_prep.convert.config import ConvertSettings
from data_prep.convert.encode import BadSample, decode_rgb, encode
from data_prep.errors import UserError


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_original_keeps_the_bytes_up_to_max_side(picture, image_file) -> None:
    data = image_file(picture(30, 40), quality=60)
    for max_side in (None, 40, 41):
        encoded = encode(data, ConvertSettings(max_side=max_side))
        assert (encoded.data, encoded.untouched) == (data, True)
        assert (encoded.height, encoded.width, encoded.mode) == (30, 40, layout.MODE_JPEG)


def test_larger_images_are_shrunk_in_proportion(picture, image_file) -> None:
    encoded = encode(image_file(picture(30, 40)), ConvertSettings(max_side=20))
    assert (encoded.height, encoded.width, encoded.untouched) == (15, 20, False)
    assert pixels(encoded.data).shape == (15, 20, 3)
    tall = encode(image_file(picture(300, 2)), ConvertSettings(max_side=10))
    assert (tall.height, tall.width) == (10, 1)


def test_jpeg_always_encodes_anew_with_the_given_options(picture, image_file) -> None:
    data = image_file(picture(), quality=90)
    low, high = (encode(data, ConvertSettings(encode="jpeg", quality=q)) for q in (30, 95))
    assert not high.untouched
    assert len(low.data) < len(high.data)
    assert np.abs(pixels(high.data).astype(int) - pixels(data)).mean() < 2
    for subsampling, factor in (("4:4:4", 0x11), ("4:2:2", 0x21), ("4:2:0", 0x22)):
        encoded = encode(data, ConvertSettings(encode="jpeg", subsampling=subsampling))
        frame = encoded.data.index(b"\xff\xc0")
        assert encoded.data[frame + 11] == factor


def test_raw_stores_the_pixels(picture, image_file) -> None:
    image = picture(5, 6)
    encoded = encode(image_file(image, "PNG"), ConvertSettings(encode="raw"))
    assert encoded.mode == layout.MODE_RAW
    assert encoded.data == image.tobytes()
    assert (encoded.height, encoded.width) == (5, 6)


def test_other_pixel_formats_become_rgb(picture, image_file) -> None:
    colour = picture()
    gray = np.asarray(colour.convert("L"))
    expected_gray = np.stack([gray] * 3, axis=-1)
    sixteen = Image.fromarray((gray.astype(np.uint16) << 8) + 77)
    assert np.array_equal(np.asarray(decode_rgb(image_file(colour.convert("L"), "PNG"))), expected_gray)
    assert np.array_equal(np.asarray(decode_rgb(image_file(sixteen, "PNG"))), expected_gray)
    assert np.array_equal(np.asarray(decode_rgb(image_file(colour.convert("RGBA"), "PNG"))), np.asarray(colour))
    palette = colour.quantize(16)
    assert np.array_equal(np.asarray(decode_rgb(image_file(palette, "PNG"))), np.asarray(palette.convert("RGB")))
    cmyk = decode_rgb(image_file(colour.convert("CMYK"), quality=100, subsampling="4:4:4"))
    assert np.abs(np.asarray(cmyk).astype(int) - np.asarray(colour)).mean() < 3


def test_an_exif_orientation_is_ignored(picture, image_file) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = image_file(picture(30, 40), exif=exif)
    for mode in ("original", "jpeg", "raw"):
        encoded = encode(data, ConvertSettings(encode=mode))
        assert (encoded.height, encoded.width) == (30, 40)


def test_bad_files_are_refused_with_a_reason(picture, image_file) -> None:
    jpeg, png = image_file(picture()), image_file(picture(), "PNG")
    for data, reason in [
        (b"", "is empty"),
        (b"hello", "is not an image that Pillow knows"),
        (jpeg[: len(jpeg) // 2], "cannot be decoded"),
        (jpeg[:100], "(cannot be decoded|is not an image)"),
        (png[: len(png) // 2], "cannot be decoded"),
        (image_file(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), "has pixels of 32 bits"),
    ]:
        for mode in ("original", "jpeg", "raw"):
            with pytest.raises(BadSample, match=reason):
                encode(data, ConvertSettings(encode=mode))


def test_an_image_larger_than_a_page_is_refused(image_file) -> None:
    settings = ConvertSettings(encode="raw", page_bytes=layout.MIN_PAGE_BYTES)
    fits = image_file(Image.new("RGB", (1024, 682)), "PNG")
    too_large = image_file(Image.new("RGB", (1024, 683)), "PNG")
    assert len(encode(fits, settings).data) == 1024 * 682 * 3
    with pytest.raises(BadSample, match=r"has 2098176 bytes to store, more than a page of 2097152; use --max-side"):
        encode(too_large, settings)


def test_an_image_wider_than_the_format_is_refused(image_file) -> None:
    wide = image_file(Image.new("RGB", (70_000, 1)), "PNG")
    with pytest.raises(BadSample, match="is 70000 x 1 px, the format ends at 65535"):
        encode(wide, ConvertSettings())
    assert encode(wide, ConvertSettings(max_side=700)).width == 700


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encode": "mixed"}, "--encode mixed: expected one of original, jpeg, raw"),
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
