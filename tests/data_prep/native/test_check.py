"""libjpeg-turbo reads without a warning whatever the check in C calls sound; unusual files are left to it."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_prep
from data_prep import native as native_library
from data_prep.converter import encode as encoding
from data_prep.converter.encode import encode_all
from data_prep.converter.picture import BadSample
from data_prep.converter.settings import ConvertSettings
from data_prep.jpeg.check import are_sound
from resnet_dist.fuzz.jpegs import KINDS, made_kinds, mutate
from resnet_dist.fuzz.verdicts import is_read_without_a_warning

pytestmark = pytest.mark.skipif(not native_library.is_built(), reason="the C was not built")


@pytest.fixture(scope="module")
def noisy() -> Image.Image:
    """Noise uses codes of every length, runs of zeros and full blocks; odd sizes leave blocks filled up."""
    draw = np.random.default_rng(0)
    pixels = draw.normal(128, 60, (93, 117, 3))
    pixels[:40] = draw.normal(128, 3, (40, 117, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def baseline(noisy, image_file) -> dict[str, bytes]:
    gray = noisy.convert("L")
    files = {
        f"{subsampling}, quality {quality}, {'own' if optimize else 'standard'} tables": image_file(
            noisy, subsampling=subsampling, quality=quality, optimize=optimize
        )
        for subsampling in ("4:4:4", "4:2:2", "4:2:0")
        for quality in (5, 60, 100)
        for optimize in (False, True)
    }
    files |= {f"gray, quality {quality}": image_file(gray, quality=quality) for quality in (5, 95)}
    files |= {f"{size} px": image_file(noisy.resize((size, size)), subsampling="4:2:0") for size in (1, 8, 9, 17)}
    files["1 px gray"] = image_file(gray.resize((1, 1)))
    files["with comment and EXIF"] = image_file(noisy, comment=b"\xff\xd9 \xff\xda", exif=b"Exif\0\0" + b"\xff\xd9" * 9)
    files["junk behind the end"] = image_file(noisy) + b"\xff\xd8 anything"
    return files


def test_plain_baseline_files_are_sound(baseline) -> None:
    assert {name: are_sound([data])[0] for name, data in baseline.items()} == dict.fromkeys(baseline, True)
    assert all(is_read_without_a_warning(data) for data in baseline.values())


def test_other_kinds_are_left_to_libjpeg_turbo(noisy, image_file, turbo_file) -> None:
    ycck = np.dstack([np.asarray(noisy), np.asarray(noisy.convert("L"))])
    files = [
        image_file(noisy, progressive=True),
        image_file(noisy, restart_marker_blocks=2),
        image_file(noisy.convert("CMYK")),
        image_file(noisy, "PNG"),
        turbo_file(np.asarray(noisy), "arithmetic"),
        turbo_file(np.ascontiguousarray(ycck), "ycck"),
        b"",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xd9",
    ]
    assert are_sound(files) == [False] * len(files)


@pytest.mark.parametrize("kind", ["4:4:4, quality 60, own tables", "4:2:0, quality 100, standard tables"])
def test_a_file_cut_short_anywhere_is_not_sound(kind: str, baseline) -> None:
    data = baseline[kind]
    for size in {*range(0, len(data) - 2, 97), len(data) - 3, len(data) - 1}:
        assert not are_sound([data[:size]])[0]
        assert not are_sound([data[:size] + b"\xff\xd9"])[0]


def test_bytes_too_many_before_the_end_are_not_sound(baseline) -> None:
    """libjpeg does not see a few of them, which are in its bit buffer; of more it warns."""
    data = baseline["4:4:4, quality 60, own tables"]
    longer = [data[:-2] + extra + data[-2:] for extra in (b"\0", b"\xff\0", b"\x5a" * 300)]
    assert are_sound(longer) == [False] * 3
    assert not is_read_without_a_warning(longer[-1])


def test_files_checked_together_get_the_verdicts_they_get_alone(baseline) -> None:
    draw = random.Random(1)
    files = [*baseline.values()]
    files += [mutate(data, draw.choice(KINDS), draw) for data in files * 4]
    draw.shuffle(files)
    assert are_sound(files) == [are_sound([data])[0] for data in files]


def test_no_damaged_file_that_libjpeg_turbo_refuses_is_called_sound(baseline) -> None:
    draw = random.Random(2)
    originals = [data for data in baseline.values() if len(data) > 1000]
    damaged = [mutate(draw.choice(originals), kind, draw) for kind in KINDS for _ in range(250)]
    sound = are_sound(damaged)
    refused = [not is_read_without_a_warning(data) for data in damaged]
    assert not any(verdict and refusal for verdict, refusal in zip(sound, refused, strict=True))
    assert sum(refused) > 1000
    assert sum(sound) > 100


def test_every_flipped_bit_of_a_small_file(noisy, image_file) -> None:
    data = image_file(noisy.resize((24, 16)), subsampling="4:2:0", quality=80, optimize=True)
    flipped = [data[: k // 8] + bytes([data[k // 8] ^ 1 << k % 8]) + data[k // 8 + 1 :] for k in range(8 * len(data))]
    for verdict, file in zip(are_sound(flipped), flipped, strict=True):
        assert not verdict or is_read_without_a_warning(file)


def test_where_it_is_not_built_the_outcome_is_the_same(baseline, monkeypatch) -> None:
    draw = random.Random(3)
    files = [*baseline.values(), *(mutate(data, draw.choice(KINDS), draw) for data in baseline.values())]

    def outcomes() -> list[object]:
        results = encode_all(files, range(len(files)), ConvertSettings(max_side=110))
        return [str(result) if isinstance(result, BadSample) else result for result in results]

    with_it = outcomes()
    monkeypatch.setattr(encoding, "are_sound", lambda files: [False] * len(files))
    assert outcomes() == with_it


def test_no_byte_is_touched_that_should_not_be(baseline, tmp_path: Path) -> None:
    """Under AddressSanitizer, which ends the process at the first stray access or leak."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler is not None, "a C compiler built the extension; where has it gone?"
    package, program = Path(data_prep.__file__).parent, tmp_path / "sanitized"
    folders = (package / "converter" / "native", package / "native")
    sources = [str(path) for folder in folders for path in sorted(folder.glob("*.c"))]
    flags = [f"-I{package / 'native'}", "-g", "-O1", "-std=gnu11", "-fno-sanitize-recover=all"]
    driver = str(Path(__file__).with_name("sanitized.c"))
    command = [compiler, *flags, "-fsanitize=address,undefined", "-o", str(program), driver, *sources, "-lm"]
    build = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if build.returncode != 0 and "asan" in build.stderr:
        pytest.skip("this compiler comes without AddressSanitizer")
    assert build.returncode == 0, build.stderr
    files = [*baseline.values(), *made_kinds().values()]
    records = b"".join(len(data).to_bytes(8, "little") + data for data in files)
    run = subprocess.run([program, "60"], input=records, capture_output=True, timeout=250)
    assert run.returncode == 0, run.stderr[-3000:]
    num_read, num_told, num_sound = map(int, run.stdout.split())
    assert num_read == 61 * len(files)
    assert num_told > num_read / 4
    assert num_sound > len(baseline)
