"""The native kernel alone: Pillow's pixels from parts of any JPEG, a status for every bad one, no stray byte."""

from __future__ import annotations

import ctypes
import ctypes.util
import io
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import data_prep
from data_prep import native
from data_prep.jpeg.header import read_jpeg_header
from data_prep.pixels import resampling
from resnet_dist.config.recipe import DataConfig, Interpolation
from resnet_dist.data import native_kernel
from resnet_dist.data.augment import OPERATION
from resnet_dist.data.crops import VIEW
from resnet_dist.data.decoder import open_kernel
from resnet_dist.data.kernel import STORED_IMAGE
from resnet_dist.data.native_kernel import NativeKernel, Status
from resnet_dist.errors import UserError
from resnet_dist.fuzz.jpegs import made_kinds

Pixels = NDArray[np.uint8]
ToJpeg = Callable[..., bytes]

NATIVE = Path(native_kernel.__file__).parent / "native"
SHARED = Path(data_prep.__file__).parent / "native"
LIBRARIES = ("-ljpeg", "-lm", "-ldl", "-pthread")
SAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2, "grey": 3, "4:4:0": 4, "4:1:1": 5}
"""As libturbojpeg numbers them; Pillow does not write the last two."""


@pytest.fixture(scope="session")
def picture(photographs: list[Pixels]) -> Pixels:
    """187 x 235 px, neither a multiple of a block, with edges and noise: everything that a wrong px would show in."""
    noise = np.random.default_rng(3).integers(0, 256, (187, 235, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(photographs[0]).resize((235, 187))).copy()
    image[40:90, 60:140] = noise[40:90, 60:140]
    image[100:, ::7] = 255 - image[100:, ::7]
    return image


def by_turbojpeg(pixels: Pixels, sampling: str, quality: int = 90) -> bytes:
    library = ctypes.CDLL(ctypes.util.find_library("turbojpeg"))
    library.tjInitCompress.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(library.tjInitCompress())
    buffer, size = ctypes.c_void_p(), ctypes.c_ulong()
    source = np.ascontiguousarray(pixels)
    height, width = pixels.shape[:2]
    result = library.tjCompress2(
        handle, ctypes.c_void_p(source.ctypes.data), width, 0, height, 0, ctypes.byref(buffer), ctypes.byref(size),
        SAMPLINGS[sampling], quality, 0,
    )  # fmt: skip
    assert result == 0
    data = ctypes.string_at(buffer, size.value)
    library.tjFree(buffer)
    library.tjDestroy(handle)
    return data


def jpeg_kinds(pixels: Pixels, to_jpeg: ToJpeg) -> dict[str, bytes]:
    """One JPEG of every kind that the kernel decodes."""
    grey = io.BytesIO()
    Image.fromarray(pixels).convert("L").save(grey, "JPEG", quality=90)
    # A single component's blocks are decoded one by one whatever its sampling says; some encoders write 2 x 2.
    doubled = bytearray(grey.getvalue())
    doubled[grey.getvalue().index(b"\xff\xc0") + 11] = 0x22
    return {
        **{sampling: by_turbojpeg(pixels, sampling) for sampling in SAMPLINGS},
        "quality 100": by_turbojpeg(pixels, "4:4:4", 100),
        "quality 5": by_turbojpeg(pixels, "4:2:0", 5),
        "optimised": to_jpeg(pixels, optimize=True),
        "progressive": to_jpeg(pixels, progressive=True),
        "progressive 4:4:4": to_jpeg(pixels, progressive=True, subsampling=0),
        "restarts": to_jpeg(pixels, restart_marker_blocks=5),
        "restarts 4:4:4": to_jpeg(pixels, restart_marker_rows=1, subsampling=0),
        "RGB": to_jpeg(pixels, keep_rgb=True),
        "grey doubled": bytes(doubled),
        "exif": to_jpeg(pixels, exif=b"Exif\0\0" + bytes(300)),
        "junk behind": by_turbojpeg(pixels, "4:2:0") + b"junk",
    }


def decode(
    image: bytes | Pixels,
    sides: tuple[int, int],
    views: Sequence[Sequence[int]],
    size: int,
    *,
    mirrored: bool = False,
    mode: int | None = None,
    interpolation: Interpolation = "bilinear",
) -> tuple[Pixels, list[int]]:
    """One stored image under many views, in one call."""
    file = np.frombuffer(bytes(image), np.uint8)
    mode = int(isinstance(image, np.ndarray)) if mode is None else mode
    stored = np.array([(0, len(file), *sides, mode)] * len(views), STORED_IMAGE)
    images = np.empty((len(views), size, size, 3), np.uint8)
    operations = np.zeros((len(views), 0), OPERATION)
    shown = np.array([(*view, mirrored) for view in views], VIEW)
    return images, NativeKernel(interpolation=interpolation).decode(file, stored, shown, operations, images).tolist()


def whole(image: bytes) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def resized(pixels: Pixels, height: int, width: int, interpolation: Interpolation = "bilinear") -> Pixels:
    """By Pillow, columns first."""
    image = Image.fromarray(pixels)
    image = image.resize((width, image.height), resampling(interpolation))
    return np.asarray(image.resize((width, height), resampling(interpolation)))


def test_a_part_equals_that_part_of_the_full_image(picture: Pixels, to_jpeg: ToJpeg) -> None:
    """Every kind of JPEG, windows of three sizes at 200 random places and in the corners."""
    rng = np.random.default_rng(11)
    height, width = picture.shape[:2]
    for kind, image in jpeg_kinds(picture, to_jpeg).items():
        expected = whole(image)
        for size in (1, 16, 61):
            corners = [(top, left) for top in (0, 1, height - size) for left in (0, 1, width - size)]
            places = rng.integers(0, (height - size + 1, width - size + 1), (200, 2)).tolist() + corners
            views = [(top, left, size, size, size, size, 0, 0) for top, left in places]
            ours, statuses = decode(image, (height, width), views, size)
            assert statuses == [Status.OK] * len(places), kind
            for (top, left), shown in zip(places, ours, strict=True):
                assert np.array_equal(shown, expected[top : top + size, left : left + size]), (kind, size, top, left)


@pytest.mark.parametrize("stored", ["jpeg", "raw"])
@pytest.mark.parametrize("size", [1, 7, 32, 224])
def test_a_resized_box_is_pillows(stored: str, size: int, picture: Pixels) -> None:
    """Enlarged, reduced, by different factors in height and width, mirrored or not."""
    image: bytes | Pixels = by_turbojpeg(picture, "4:2:2") if stored == "jpeg" else picture
    expected = whole(image) if isinstance(image, bytes) else picture
    rng = np.random.default_rng(size)
    height, width = picture.shape[:2]
    h, w = rng.integers(1, height + 1, 40), rng.integers(1, width + 1, 40)
    h[:3], w[:3] = (height, height, 1), (width, 1, 1)
    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
    views = [(*box, size, size, 0, 0) for box in zip(*(side.tolist() for side in (top, left, h, w)), strict=True)]
    ours, statuses = decode(image, (height, width), views, size)
    mirrored, _ = decode(image, (height, width), views, size, mirrored=True)
    assert statuses == [Status.OK] * 40
    assert np.array_equal(mirrored, ours[:, :, ::-1])
    for k in range(40):
        box = expected[top[k] : top[k] + h[k], left[k] : left[k] + w[k]]
        assert np.array_equal(ours[k], resized(box, size, size)), views[k]
        close = np.asarray(Image.fromarray(box).resize((size, size), Image.Resampling.BILINEAR))
        assert np.abs(ours[k].astype(int) - close).max() <= 1


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_bicubic_is_pillows(data: st.DataObject) -> None:
    """Noise of black and white makes it overshoot on both sides; reduced and enlarged by different factors."""
    sides = st.integers(1, 12) | st.integers(1, 400)
    height, width, seed = data.draw(sides), data.draw(sides), data.draw(st.integers(0, 9))
    size = data.draw(st.integers(1, 64))
    resized_height, resized_width = (size + data.draw(st.integers(0, 500)) for _ in range(2))
    top, left = (data.draw(st.integers(0, side - size)) for side in (resized_height, resized_width))
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if seed % 2:
        pixels = np.where(pixels < 128, 0, 255).astype(np.uint8)
    view = (0, 0, height, width, resized_height, resized_width, top, left)
    (ours,), statuses = decode(pixels, (height, width), [view], size, interpolation="bicubic")
    assert statuses == [Status.OK]
    shown = resized(pixels, resized_height, resized_width, "bicubic")[top : top + size, left : left + size]
    assert np.array_equal(ours, shown)


def test_a_window_is_that_part_of_the_resized_image(picture: Pixels) -> None:
    """Resizing first and cropping then: px beyond the window's edge have their share in it."""
    rng = np.random.default_rng(2)
    height, width = picture.shape[:2]
    for _ in range(20):
        resized_height, resized_width = rng.integers(24, 300, 2).tolist()
        top, left = rng.integers(0, (resized_height - 23, resized_width - 23)).tolist()
        view = (0, 0, height, width, resized_height, resized_width, top, left)
        (ours,), statuses = decode(picture, (height, width), [view], 24)
        assert statuses == [Status.OK]
        shown = resized(picture, resized_height, resized_width)[top : top + 24, left : left + 24]
        assert np.array_equal(ours, shown)


def test_a_window_that_sticks_out_shows_zeros_there(picture: Pixels, to_jpeg: ToJpeg) -> None:
    padded = np.pad(picture, ((60, 60), (60, 60), (0, 0)))
    height, width = picture.shape[:2]
    places = [(-9, 3), (5, -20), (-40, -40), (height - 10, width - 30), (height, 0), (-50, -50), (10, width + 3)]
    views = [(0, 0, height, width, height, width, top, left) for top, left in places]
    for mirrored in (False, True):
        ours, statuses = decode(picture, (height, width), views, 50, mirrored=mirrored)
        assert statuses == [Status.OK] * len(places)
        for (top, left), shown in zip(places, ours, strict=True):
            expected = padded[top + 60 : top + 110, left + 60 : left + 110]
            assert np.array_equal(shown, expected[:, ::-1] if mirrored else expected)


@pytest.mark.parametrize("sides", [(1, 1), (1, 65500), (65500, 1), (3, 40000), (2, 2)])
def test_extreme_sides(sides: tuple[int, int], to_jpeg: ToJpeg) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*sides, 3), dtype=np.uint8)
    data = to_jpeg(image)
    (ours,), statuses = decode(data, sides, [(0, 0, *sides, 9, 9, 0, 0)], 9)
    assert statuses == [Status.OK]
    assert np.array_equal(ours, resized(whole(data), 9, 9))


# Refusals


def cmyk(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(buffer, "JPEG")
    return buffer.getvalue()


def test_each_kind_of_undecodable_image_has_its_own_status(picture: Pixels, to_jpeg: ToJpeg) -> None:
    height, width = picture.shape[:2]
    good, view = to_jpeg(picture), (0, 0, height, width, 32, 32, 0, 0)
    at = good.index(b"\xff\xda") + 200
    no_quantisation = good[: good.index(b"\xff\xdb")] + good[good.index(b"\xff\xc0") :]
    cases: list[tuple[bytes | Pixels, tuple[int, int], int | None, Status]] = [
        (good, (height, width), None, Status.OK),
        (good[:-2], (height, width), None, Status.JPEG_BROKEN),  # every px is there, but libjpeg misses the end
        (good[: len(good) // 2], (height, width), None, Status.JPEG_BROKEN),
        (good[:at] + b"\xff\xd9" + good[at:], (height, width), None, Status.JPEG_BROKEN),
        (b"\xff" * 500, (height, width), None, Status.JPEG_BROKEN),
        (b"GIF89a" + good, (height, width), None, Status.JPEG_BROKEN),
        (b"\xff", (height, width), None, Status.JPEG_BROKEN),
        (b"", (height, width), None, Status.OUTSIDE_FILE),
        (good, (height + 1, width), None, Status.JPEG_SIZE_DIFFERS),
        (good, (height, width - 1), None, Status.VIEW_UNFIT),
        (cmyk(picture), (height, width), None, Status.COLOURS_UNKNOWN),
        (picture, (height, width), None, Status.OK),
        (picture[:-1], (height, width), None, Status.RAW_SIZE_DIFFERS),
        (good, (height, width), 2, Status.MODE_UNKNOWN),
        (good, (0, 0), None, Status.VIEW_UNFIT),
        (no_quantisation, (height, width), None, Status.JPEG_BROKEN),
    ]
    results = [decode(image, sides, [view], 32, mode=mode)[1] for image, sides, mode, _ in cases]
    assert results == [[expected] for *_, expected in cases]


def test_a_jpeg_of_several_scans_may_not_hold_much(to_jpeg: ToJpeg) -> None:
    """Its frame says 60,000 x 60,000 px, so a decoder would reserve 20 GB before it looks at the data."""
    for options, status in (({"progressive": True}, Status.TOO_MUCH_HELD), ({}, Status.JPEG_BROKEN)):
        data = bytearray(to_jpeg(np.zeros((16, 16, 3), np.uint8), **options))
        at = data.index(b"\xff\xc2" if options else b"\xff\xc0") + 5
        data[at : at + 4] = 2 * (60_000).to_bytes(2, "big")
        view = (0, 0, 60_000, 60_000, 32, 32, 0, 0)
        assert decode(bytes(data), (60_000, 60_000), [view], 32)[1] == [status]


@pytest.mark.parametrize(
    ("sides", "shorter"), [((600, 2), 256), ((2, 600), 232), ((1, 300), 256), ((10, 3000), 256), ((20, 3000), 512)]
)
def test_a_window_of_an_elongated_picture_is_pillows(sides: tuple[int, int], shorter: int) -> None:
    """A side passes 65,535 px when the shorter one is resized to the net's; only the window is computed."""
    image = np.random.default_rng(4).integers(0, 256, (*sides, 3), dtype=np.uint8)
    tall, wide = (shorter * side // min(sides) for side in sides)
    assert max(tall, wide) > 65_535
    top, left = (tall - 224) // 2, (wide - 224) // 2
    expected = resized(image, tall, wide)[top : top + 224, left : left + 224]
    for mirrored in (False, True):
        view = (0, 0, *sides, tall, wide, top, left)
        (ours,), statuses = decode(image, sides, [view], 224, mirrored=mirrored)
        assert statuses == [Status.OK]
        assert np.array_equal(ours, expected[:, ::-1] if mirrored else expected)


@pytest.mark.parametrize("sides", [(65_500, 1), (1, 65_500)])
def test_the_most_elongated_picture_has_windows_anywhere(sides: tuple[int, int]) -> None:
    """Every row or column is of its own gray, by steps of 3, so what is shown tells where it was."""
    factor, size, most = 16_384, 256, max(sides)
    grays = (np.arange(most) % 80 * 3).astype(np.uint8)
    image = np.repeat(grays.reshape(*sides, 1), 3, axis=2)
    for place in (0, 79, most // 2, most - 1):
        start = min(place * factor + factor // 2, most * factor - size)  # the middle of that row: no other has a share
        top, left = (start, 0) if sides[1] == 1 else (0, start)
        view = (0, 0, *sides, *(factor * side for side in sides), top, left)
        (ours,), statuses = decode(image, sides, [view], size)
        assert statuses == [Status.OK]
        assert ours[0, 0].tolist() == [grays[place]] * 3


def test_an_image_without_tables_does_not_use_an_earlier_images(picture: Pixels, to_jpeg: ToJpeg) -> None:
    """Without quantisation it cannot be decoded; without Huffman tables the standard's are meant."""
    height, width = picture.shape[:2]
    optimised, standard = to_jpeg(picture, optimize=True), to_jpeg(picture)
    no_quantisation = standard[: standard.index(b"\xff\xdb")] + standard[standard.index(b"\xff\xc0") :]
    no_codes = standard[: standard.index(b"\xff\xc4")] + standard[standard.index(b"\xff\xda") :]
    files = [optimised, no_quantisation, no_codes, optimised]
    offsets = [sum(map(len, files[:k])) for k in range(4)]
    stored = np.array([(offsets[k], len(files[k]), height, width, 0) for k in range(4)], STORED_IMAGE)
    views = np.array([(0, 0, height, width, 32, 32, 0, 0, False)] * 4, VIEW)
    images, no_operations = np.empty((4, 32, 32, 3), np.uint8), np.zeros((4, 0), OPERATION)
    file = np.frombuffer(b"".join(files), np.uint8)
    statuses = NativeKernel().decode(file, stored, views, no_operations, images)
    assert statuses.tolist() == [Status.OK, Status.JPEG_BROKEN, Status.OK, Status.OK]
    assert all(np.array_equal(images[k], images[0]) for k in (2, 3))


@pytest.mark.parametrize(
    "view",
    [
        [0, 0, 188, 235, 32, 32, 0, 0],
        [1, 0, 187, 235, 32, 32, 0, 0],
        [-1, 0, 10, 10, 32, 32, 0, 0],
        [0, 0, 0, 10, 32, 32, 0, 0],
        [0, 0, 2**62, 10, 32, 32, 0, 0],
        [2**62, 2**62, 2**62, 10, 32, 32, 0, 0],
        [0, 0, 10, 10, 31, 32, 0, 0],
        [0, 0, 10, 10, 40, 40, 9, 0],
        [0, 0, 10, 10, 40, 40, -1, 0],
        [0, 0, 10, 10, 10, 10, 2**40, 0],
        [0, 0, 10, 10, 10, 10, -(2**63), 0],
        [0, 0, 10, 10, 2**40, 32, 0, 0],
        [0, 0, 10, 10, 2**31, 32, 0, 0],
    ],
)
def test_a_view_that_does_not_fit_is_refused(view: list[int], picture: Pixels) -> None:
    assert decode(picture, (187, 235), [view], 32)[1] == [Status.VIEW_UNFIT]


def test_arrays_of_another_kind_are_refused(picture: Pixels) -> None:
    file = picture.reshape(-1)
    stored = np.array([(0, file.size, 187, 235, 1)], STORED_IMAGE)
    views, images = np.array([(0, 0, 187, 235, 8, 8, 0, 0, False)], VIEW), np.empty((1, 8, 8, 3), np.uint8)
    kernel, none = NativeKernel(), np.zeros((1, 0), OPERATION)
    kernel.decode(file, stored, views, none, images)
    for bad in (
        (file, stored, views.view(np.int64), none, images),
        (file, stored, np.zeros(2, VIEW), none, images),
        (file, stored, views, none, np.empty((1, 8, 9, 3), np.uint8)),
        (file, stored, views, none, np.empty((1, 3, 8, 8), np.uint8).transpose(0, 2, 3, 1)),
        (file, stored, views, np.zeros((1, 0)), images),
        (file[::2], stored, views, none, images),
        (file, np.zeros((1, 5), np.int64), views, none, images),
    ):
        with pytest.raises(ValueError, match="expected a contiguous"):
            kernel.decode(*bad)


def test_callers_take_turns_and_a_closed_kernel_works_without_threads(picture: Pixels, to_jpeg: ToJpeg) -> None:
    """Six threads call one kernel of three threads, which is closed between their first calls and their last."""
    file = np.frombuffer(to_jpeg(picture), np.uint8)
    num, closed = 12, threading.Event()
    stored = np.array([(0, len(file), 187, 235, 0)] * num, STORED_IMAGE)
    views = np.array([(k, 2 * k, 187 - k, 235 - 2 * k, 48, 48, 0, 0, k % 2) for k in range(num)], VIEW)
    operations = np.zeros((num, 0), OPERATION)
    kernel = NativeKernel(3)

    def show(_: int) -> list[bytes]:
        shown = []
        for call in range(6):
            images = np.zeros((num, 48, 48, 3), np.uint8)
            statuses = kernel.decode(file, stored, views, operations, images)
            assert statuses.tolist() == [Status.OK] * num
            shown.append(images.tobytes())
            if call == 2:
                closed.wait(30)
        return shown

    with ThreadPoolExecutor(6) as callers:
        answers = callers.map(show, range(6))
        kernel.close()
        closed.set()
        assert len({images for shown in answers for images in shown}) == 1


def test_without_the_extension_the_native_decoder_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "DECODE_MODULE", "no_such_kernel")
    assert DataConfig.model_fields["decoder"].default == "native"
    with pytest.raises(UserError, match=r"was not built.*libjpeg-dev.*make setup.*data\.decoder: ffcv"):
        open_kernel("native", 1, 1)


# Memory


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None, "a C compiler built the kernel; where has it gone?"
    program = tmp_path_factory.mktemp("sanitized") / "sanitized"
    sources = [str(path) for path in sorted([*NATIVE.glob("*.c"), *SHARED.glob("*.c")])]
    driver = str(Path(__file__).with_name("sanitized.c"))
    flags = [f"-I{SHARED}", f"-I{NATIVE}", "-g", "-O1", "-std=gnu11", "-ffp-contract=off", "-fno-sanitize-recover=all"]
    build = subprocess.run(
        [compiler, *flags, "-fsanitize=address,undefined", "-o", str(program), driver, *sources, *LIBRARIES],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if build.returncode != 0 and "asan" in build.stderr:
        pytest.skip("this compiler comes without AddressSanitizer")
    assert build.returncode == 0, build.stderr
    return program


def corpus(photographs: list[Pixels], to_jpeg: ToJpeg) -> list[tuple[bytes, int, int, int]]:
    """(bytes, mode, height, width): small images of every kind, odd ones, and every one cut off at 12 places."""
    small = photographs[3][:45, :39]
    arithmetic = bytearray(to_jpeg(small))
    arithmetic[arithmetic.index(b"\xff\xc0") + 1] = 0xC9  # what follows is no arithmetic code, but is read as such
    made = [(data, header.height, header.width) for data in made_kinds().values() if (header := read_jpeg_header(data))]
    sizes = [small[:1, :1], small[:1], small[:, :1], small[:9, :17]]
    wide = np.tile(small[:3], (1, 300, 1))
    records = [(image, 0, *small.shape[:2]) for image in (*jpeg_kinds(small, to_jpeg).values(), cmyk(small))]
    records += [(by_turbojpeg(p, s), 0, *p.shape[:2]) for p in sizes for s in SAMPLINGS]
    records += [(bytes(arithmetic), 0, *small.shape[:2]), (to_jpeg(wide), 0, *wide.shape[:2])]
    records += [(small.tobytes(), 1, *small.shape[:2]), (bytes(10), 0, 5, 5), (b"\xff\xd8\xff", 0, 5, 5)]
    cuts = [
        (data[: max(len(data) * part // 12, 1)], mode, height, width)
        for data, mode, height, width in records
        for part in range(12)
    ]
    return records + cuts + [(data, 0, height, width) for data, height, width in made]


def test_no_byte_is_touched_that_should_not_be(
    sanitized: Path, photographs: list[Pixels], to_jpeg: ToJpeg, tmp_path: Path
) -> None:
    """Under AddressSanitizer, some 20,000 damaged images: it ends the process at the first stray access or leak."""
    records = corpus(photographs, to_jpeg)
    file = tmp_path / "records"
    file.write_bytes(b"".join(np.array([len(d), *rest], "<i8").tobytes() + d for d, *rest in records))
    with file.open("rb") as source:
        run = subprocess.run([sanitized, "1", "30"], stdin=source, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stderr[-3000:]
    intact, damaged = ([int(n) for n in line.split()] for line in run.stdout.splitlines())
    assert sum(intact) == len(records)
    assert sum(damaged) == 30 * len(records)
    for seen in (Status.OK, Status.JPEG_BROKEN, Status.COLOURS_UNKNOWN, Status.VIEW_UNFIT, Status.JPEG_SIZE_DIFFERS):
        assert damaged[seen] > 0
    assert intact[Status.OK] > 40
