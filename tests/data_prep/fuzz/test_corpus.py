"""`make test-corpora` on a small synthetic corpus: all formats, modes, orientations and kinds of damage."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import native as native_library
from resnet_dist.fuzz.corpus import ENCODINGS, PAGE_BYTES, FileResult, as_table, examine
from resnet_dist.fuzz.jpegs import made_kinds
from resnet_dist.fuzz.verdicts import Judge

ImageFile = Callable[..., bytes]


@pytest.fixture
def corpus(picture: Callable[..., Image.Image], image_file: ImageFile) -> dict[str, bytes]:
    colour, gray = picture(40, 52), picture(40, 52).convert("L")
    turn = Image.Exif()
    turn[0x0112] = 5
    sixteen = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    files = {
        "jpeg": image_file(colour, quality=90, exif=turn),
        "jpeg cmyk": image_file(colour.convert("CMYK"), exif=turn),
        "jpeg gray progressive": image_file(gray, progressive=True),
        "png": image_file(colour, "PNG", exif=turn),
        "png palette": image_file(colour.quantize(9), "PNG", transparency=3),
        "png alpha": image_file(colour.convert("RGBA"), "PNG"),
        "png 16": image_file(sixteen, "PNG"),
        "gif": image_file(colour.quantize(9), "GIF", transparency=2),
        "bmp": image_file(colour, "BMP"),
        "tiff": image_file(colour, "TIFF", tiffinfo={274: 6}),
        "tiff lzw": image_file(gray, "TIFF", compression="tiff_lzw", tiffinfo={274: 3}),
        "tiff la": image_file(gray.convert("LA"), "TIFF"),
        "tiff lab": image_file(colour.convert("LAB"), "TIFF"),
        "tiff float": image_file(gray.convert("F"), "TIFF"),
        "webp": image_file(colour, "WEBP", exif=turn),
        "webp alpha": image_file(colour.convert("RGBA"), "WEBP", lossless=True),
        "pgm 16": image_file(sixteen.convert("I"), "PPM"),
        "jp2": image_file(colour, "JPEG2000"),
        "strip": image_file(picture(2, 600)),
        "nothing": b"",
        "text": b"hello",
    }
    # Where scans are missing, libjpeg-turbo smooths blocks, and its versions differ: Pillow brings another than ffcv's.
    files |= {name: data for name, data in made_kinds().items() if not name.endswith(("only DC", "incomplete"))}
    draw = random.Random(3)
    for number in range(120):
        name = draw.choice(list(files))
        data = bytearray(files[name])
        for _ in range(min(len(data), draw.choice((1, 1, 3)))):
            data[draw.randrange(min(len(data), draw.choice((120, len(data)))))] ^= 1 << draw.randrange(8)
        files[f"{name} damaged {number}"] = bytes(data)
    return files


@pytest.mark.skipif(find_spec(native_library.DECODE_MODULE) is None, reason="the native kernel was not built")
def test_all_tools_agree(corpus: dict[str, bytes]) -> None:
    judge = Judge(before=next(iter(made_kinds().values())))
    outcomes = {name: examine(name, data, judge) for name, data in corpus.items()}
    assert {name: outcome.disagreements for name, outcome in outcomes.items() if outcome.disagreements} == {}
    sound = [outcome for name, outcome in outcomes.items() if "damaged" not in name]
    refused = {outcome.path for outcome in sound if outcome.result == "refused"}
    assert refused == {"tiff float", "nothing", "text"}
    assert outcomes["jpeg"].result == outcomes["strip"].result == "kept"


@pytest.mark.slow  # conversions as commands, and ffcv compiles for 10 s
@pytest.mark.skipif(find_spec(native_library.DECODE_MODULE) is None, reason="the native kernel was not built")
def test_an_entire_folder(corpus: dict[str, bytes], tmp_path: Path) -> None:
    for name, data in corpus.items():
        if "damaged" not in name:
            (tmp_path / name.replace(" ", "_")).write_bytes(data)
    command = [sys.executable, "-m", "resnet_dist.fuzz.corpus", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    # numba's finalizers may print to stderr when the interpreter ends.
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" 0 disagreements\n")


def test_the_table_counts_formats_and_outcomes() -> None:
    outcomes = [
        FileResult("a", "PNG", "encoded"),
        FileResult("b", "PNG", "refused", "is empty"),
        FileResult("c", "JPEG", "kept"),
    ]
    assert as_table(outcomes).splitlines()[2:] == ["| JPEG | 1 | 0 | 0 |", "| PNG | 0 | 1 | 1 |"]
    assert ENCODINGS == ("original", "jpeg", "raw")
    assert PAGE_BYTES >= 3 * 36_000_000
