"""Pictures, trees and conversions that the tests of data_prep share."""

from __future__ import annotations

import ctypes
import ctypes.util
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.cli import main
from data_prep.converter.convert import ConvertReport, convert
from data_prep.converter.plan import UNIT_SAMPLES
from data_prep.converter.settings import BadPolicy, ConvertSettings, OnError
from data_prep.sources import open_source
from data_prep.sources.base import Source
from data_prep.sources.files.paths import HEAD_BYTES, Ends, empty_ends, ends_bytes
from data_prep.sources.splits import requested_split

Picture = Callable[..., Image.Image]
Encode = Callable[..., bytes]
TurboFile = Callable[[np.ndarray, str], bytes]
ConvertHere = Callable[..., ConvertReport]
EndsIn = Callable[..., Ends]


@pytest.fixture(scope="session")
def picture() -> Picture:
    """A smooth colour picture, different for every seed: `picture(height, width, seed)`."""

    def make(height: int = 48, width: int = 64, seed: int = 0) -> Image.Image:
        rows, columns = np.mgrid[0:height, 0:width]
        waves = [np.sin((rows * (1 + c) + columns * (2 + seed % 3)) / 9 + seed + c) for c in range(3)]
        return Image.fromarray((np.stack(waves, axis=-1) * 90 + 128).astype(np.uint8))

    return make


@pytest.fixture(scope="session")
def image_file() -> Encode:
    """An image as the bytes of a file: `image_file(image, "JPEG", quality=95, ...)`."""

    def encode(image: Image.Image, file_format: str = "JPEG", **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, file_format, **options)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def turbo_file() -> TurboFile:
    """Kinds of JPEG that Pillow does not write: `turbo_file(pixels, "arithmetic")`, `turbo_file(pixels, "ycck")`.

    `pixels`: uint8 [height, width, 3], or of 4 channels for `ycck`, inverted as Adobe stores them.
    """

    def encode(pixels: np.ndarray, kind: str) -> bytes:
        library = ctypes.CDLL(ctypes.util.find_library("turbojpeg") or "libturbojpeg.so.0")
        library.tjInitCompress.restype = ctypes.c_void_p
        pointer, number = ctypes.c_void_p, ctypes.c_int
        library.tjCompress2.argtypes = [pointer, ctypes.c_char_p, *[number] * 4, pointer, pointer, *[number] * 3]
        library.tjFree.argtypes = library.tjDestroy.argtypes = [pointer]
        handle = library.tjInitCompress()
        data, size = pointer(), ctypes.c_ulong()
        height, width = pixels.shape[:2]
        pixel_format = 11 if kind == "ycck" else 0
        if kind == "arithmetic":
            os.environ["TJ_ARITHMETIC"] = "1"  # the library looks there
        try:
            arguments = (pixels.tobytes(), width, 0, height, pixel_format, ctypes.byref(data), ctypes.byref(size))
            assert library.tjCompress2(handle, *arguments, 0, 95, 0) == 0
        finally:
            os.environ.pop("TJ_ARITHMETIC", None)
        file = ctypes.string_at(data.value, size.value)
        library.tjFree(data)
        library.tjDestroy(handle)
        return file

    return encode


@pytest.fixture(scope="session")
def png_of_16_bits() -> Callable[[np.ndarray], bytes]:
    """A PNG of 16-bit colour, which Pillow reads but does not write. `pixels`: uint16 [height, width, 3]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def encode(pixels: np.ndarray) -> bytes:
        height, width, _ = pixels.shape
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")

    return encode


@pytest.fixture
def image_tree(tmp_path: Path, picture: Picture, image_file: Encode) -> Path:
    """A folder per class, two JPEGs each: `cat`, `dog`, `emu`."""
    root = tmp_path / "tree"
    for label, name in enumerate(["cat", "dog", "emu"]):
        (root / name).mkdir(parents=True)
        for number in range(2):
            data = image_file(picture(seed=10 * label + number), quality=90)
            (root / name / f"{number}.JPEG").write_bytes(data)
    return root


@pytest.fixture(scope="session")
def ends_in() -> EndsIn:
    """The ends of files that are in memory: `ends_in([b"..."], max_head_bytes=300)`."""

    def ends_of_all(files: Collection[bytes], max_head_bytes: int = HEAD_BYTES) -> Ends:
        ends = empty_ends(len(files), max_head_bytes)
        ends.rows[:] = 0xFF  # what lies behind must not matter
        for number, data in enumerate(files):
            head, tail = ends_bytes(len(data), max_head_bytes)
            ends.rows[number, : head + tail] = np.frombuffer(data[:head] + data[len(data) - tail :], dtype=np.uint8)
            ends.num_bytes[number] = len(data)
        return ends

    return ends_of_all


@pytest.fixture(scope="session")
def large_tree(tmp_path_factory: pytest.TempPathFactory, picture: Picture, image_file: Encode) -> Path:
    """Two units of JPEGs and 100 more, some 43 MB in all, most of it comments."""
    root = tmp_path_factory.mktemp("large") / "tree"
    draw = np.random.default_rng(0)
    data = image_file(picture(16, 16))
    for number in range(2 * UNIT_SAMPLES + 100):
        comment = draw.bytes(int(draw.integers(10_000, 30_000)))
        path = root / f"class-{number // 300}" / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + data[2:])
    return root


@pytest.fixture(scope="session")
def convert_here() -> ConvertHere:
    """A whole conversion in this process: `convert_here("synthetic", "n=5", output, encode="raw")`.

    With `max_bad` bad samples are quarantined, or what `on_error` says.
    """

    def run(
        source: str | Source,
        location: str | None,
        output: Path,
        max_bad: str | None = None,
        on_error: OnError = "quarantine",
        **settings: object,
    ) -> ConvertReport:
        opened = open_source(source, location, requested_split(None, output)) if isinstance(source, str) else source
        return convert(
            opened,
            output,
            settings=ConvertSettings(**settings),  # type: ignore[arg-type]
            bad_policy=BadPolicy() if max_bad is None else BadPolicy(on_error, max_bad),
        )

    return run


OPEN_ALL = """
import json, resource, sys
import numpy, pyarrow.parquet, PIL.Image, scipy.io
import data_prep.sources.hf_parquet, data_prep.sources.webdataset
from data_prep.sources.datasets import cifar, ilsvrc
from data_prep.errors import Fault, UserError
from data_prep.sources import SourceOptions, open_source
from data_prep.sources.splits import SplitRequest

mib, cases = json.load(sys.stdin)
with open("/proc/self/statm") as statm:
    now = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (mib << 20),) * 2)
outcomes = []
for source, location, options in cases:
    try:
        split = {"cifar10": "test", "ilsvrc": "val"}.get(source)
        opened = open_source(source, location, SplitRequest(split, explicit=False), SourceOptions(**options))
        bad = []
        for index in range(len(opened)):
            try:
                opened[index]
            except (OSError, ValueError) as error:
                bad.append(str(error))
        outcomes.append(f"read {len(opened) - len(bad)} of {len(opened)}{': ' if bad else ''}{'; '.join(bad[:3])}")
        opened = None
    except (Fault, UserError) as error:
        outcomes.append(f"refused: {error}")
    except BaseException as error:
        outcomes.append(f"unexpected {type(error).__name__}: {error}")
json.dump(outcomes, sys.stdout)
"""


@pytest.fixture(scope="session")
def open_all_within() -> Callable[[int, list[tuple[str, str, dict[str, str]]]], list[str]]:
    """Opens sources and reads all their samples, in a process of its own that may take `mib` MiB more than it has at
    its start: `open_all_within(200, [("webdataset", "a.tar", {})])`. Returns a line for each: what came of it."""

    def run(mib: int, cases: list[tuple[str, str, dict[str, str]]]) -> list[str]:
        environment = os.environ | {"MALLOC_ARENA_MAX": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", OPEN_ALL],
            input=json.dumps([mib, cases]).encode(),
            capture_output=True,
            timeout=120,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def tar_of() -> Callable[[dict[str, bytes]], bytes]:
    """A tar of plain files, as GNU tar and Python write it: `tar_of({"a/b.jpg": data})`."""

    def make(files: dict[str, bytes]) -> bytes:
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode="w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return target.getvalue()

    return make


@pytest.fixture
def data_prep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in this process."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["data-prep", *map(str, arguments)])
        environment = dict(os.environ)
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:  # the command corrects it
            os.environ.clear()
            os.environ.update(environment)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(ended.value.code or 0), out, err)

    return run
