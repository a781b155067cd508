"""The C shrinks images to the bytes that Pillow gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_prep import native as native_library
from data_prep.converter import picture as shrinking
from data_prep.converter.picture import shrink
from data_prep.pixels import shrunk_size

pytestmark = pytest.mark.skipif(not native_library.is_built(), reason="the C was not built")

SIDES = st.integers(1, 400)
CONTENTS = {
    "noise": lambda draw, shape: draw.integers(0, 256, shape, dtype=np.uint8),
    "white": lambda draw, shape: np.full(shape, 255, np.uint8),
    "black and white": lambda draw, shape: draw.integers(0, 2, shape, dtype=np.uint8) * np.uint8(255),
}


@given(SIDES, SIDES, st.integers(1, 400), st.sampled_from(sorted(CONTENTS)))
@example(1, 3000, 500, "noise")
@example(3000, 1, 500, "noise")
@example(800, 400, 399, "noise")
@example(400, 800, 799, "white")
@example(1, 1, 1, "noise")
def test_the_bytes_are_pillows(height: int, width: int, max_side: int, content: str) -> None:
    pixels = CONTENTS[content](np.random.default_rng(height * 401 + width), (height, width, 3))
    size = shrunk_size((width, height), max_side)
    wanted = pixels if size == (width, height) else shrinking._with_pillow(pixels, size)
    assert np.array_equal(shrink(pixels, size), wanted)


@pytest.mark.parametrize("shape", [(900, 1200), (1200, 900), (1500, 751), (200, 2000)])
@pytest.mark.parametrize("max_side", [500, 256, 60])
def test_the_bytes_are_pillows_at_the_sizes_of_photographs(shape: tuple[int, int], max_side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    size = shrunk_size(shape[::-1], max_side)
    assert np.array_equal(shrink(pixels, size), shrinking._with_pillow(pixels, size))


def test_nothing_outside_the_output_is_written() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (301, 203, 3), dtype=np.uint8)
    around = np.full(3 * 100 * 67 + 64, 170, np.uint8)
    library = native_library.library()
    assert library.data_prep_shrink(pixels.ctypes.data, 301, 203, 100, 67, around[32:].ctypes.data) == 0
    assert (around[:32] == 170).all()
    assert (around[-32:] == 170).all()
    assert np.array_equal(around[32:-32].reshape(100, 67, 3), shrink(pixels, (67, 100)))
